"""Atomic writes: a file or directory is written completely or not at all. Imports no torch, NumPy only for arrays."""

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastddpm.errors import StorageError

if TYPE_CHECKING:
    import numpy as np

try:
    import fcntl
except ImportError:  # Windows, where nothing is swept
    fcntl = None  # type: ignore[assignment]

_ASIDE = ".old"  # not .tmp: it may be the only copy
_TEMPORARY = re.compile(r"\.(.+)\.([\w-]+)\.([0-9]{1,9})\.(?:tmp|old)", re.DOTALL)


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Write a file atomically: `write` creates a temporary file beside `path`, which is then renamed to `path`.

    Readers find either the old file or the new one. With `durable` file and name are synced to disk. Raises
    `StorageError` if it cannot be written.
    """
    temporary = temporary_beside(path)
    try:
        with _held(temporary):
            write(temporary)
            if durable:
                sync(temporary)
            os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, with `write_whole`; halves of characters, which names and JSON may hold, are escaped."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, document: Any) -> None:
    """Write JSON, indented by one space and ending in a newline, with `write_whole`."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def save_arrays(
    arrays: "Mapping[str, np.ndarray]", path: Path, *, compress: bool = True, durable: bool = False
) -> None:
    """Write an .npz, compressed by default, with `write_whole`."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, write, durable=durable)


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target`, which is renamed to `target` if the block ends without an error.

    An existing `target` is removed, or restored if the rename fails. Raises `OSError` if the file system fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    aside = temporary.with_suffix(_ASIDE)
    with temporary_directory(temporary):
        yield temporary
        move_into_place(temporary, target, aside)
        shutil.rmtree(aside, ignore_errors=True)


def move_into_place(new: Path, target: Path, aside: Path) -> None:
    """Rename the directory `new` to `target`; an existing `target` becomes `aside`, or is restored after a failure.

    `aside` must not exist if `target` does. Raises `OSError`.
    """
    if os.path.lexists(target):
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it meanwhile
            os.rename(target, aside)
    try:
        os.rename(new, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise


def temporary_beside(path: Path) -> Path:
    """Return a hidden path beside `path`, with host and process id, for this process to write and then rename."""
    return path.with_name(f".{path.name}.{host()}.{os.getpid()}.tmp")


@contextlib.contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """Make the directory `path`, named as `temporary_beside` names, lock it in the block, and remove it afterwards."""
    try:
        path.mkdir()
        with _held(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """Lock a temporary file, made if missing, or directory inside the block."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(temporary, os.O_RDONLY if temporary.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        hold(descriptor)
        yield
    finally:
        os.close(descriptor)


def hold(descriptor: int) -> None:
    """Lock an open temporary file until it is closed, so that no `sweep` takes it for one that a dead process left."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: the process id has to do
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep(directory: Path) -> None:
    """Remove the temporary files and directories in `directory` that dead processes left; ignore failures.

    Removed are only those named by `temporary_beside` on this host, of a process that is dead, that nobody has locked.
    A directory that such a process had moved aside is moved back if nothing has taken its place.
    """
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            named = _TEMPORARY.fullmatch(entry.name)
            if named and named[2] == host() and not alive(int(named[3])) and not entry.is_symlink():
                _remove_unless_locked(Path(entry.path), directory / named[1])


def _remove_unless_locked(path: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            # Held by a process in another container of this host name, whose process id is not visible.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.suffix == _ASIDE and not os.path.lexists(target):
                os.rename(path, target)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(descriptor)


def check_out(directory: Path) -> None:
    """Raise `StorageError` if `directory` can neither be written to nor made, and `sweep` it if it exists.

    Makes nothing that stays. Commands call this before hours of work.
    """
    if "\0" in str(directory):
        raise StorageError(f"cannot write into {str(directory)!r}: a path holds no NUL character")
    try:
        above = directory.absolute()
        existing = next(path for path in (above, *above.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise StorageError(f"cannot write into {directory}: {existing} is not a directory")
        trial = temporary_beside(existing / "trial")
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT, 0o666))
        trial.unlink()
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"cannot write into {directory}: {existing} cannot be written to ({reason})") from error
    sweep(directory)


def open_to_append(path: Path, report: Callable[[str], None]) -> TextIO:
    """Open a text file for appending. Raises `StorageError`.

    What is in its place and cannot be appended to, such as a directory, a broken link or a pipe that nobody reads, is
    set aside, with a line to `report`.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)  # not to wait for a pipe's reader
    try:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError:
            if not os.path.lexists(path) or path.is_file():
                raise
            report(f"{path} is no file that can be written; it is {set_aside(path).name} beside it from here on")
            descriptor = os.open(path, flags, 0o666)
        os.set_blocking(descriptor, True)
        return open(descriptor, "a", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def set_aside(path: Path) -> Path:
    """Rename what is at `path` to the first free name of PATH.damaged, PATH.damaged-2, .. and return that.

    Raises `StorageError`.
    """
    number = 1
    while os.path.lexists(to := path.with_name(f"{path.name}.damaged{'' if number == 1 else f'-{number}'}")):
        number += 1
    try:
        os.rename(path, to)
    except OSError as error:
        raise StorageError(f"cannot rename {path}: {error.strerror or error}") from error
    return to


def alive(pid: int) -> bool:
    """Return whether a process with the id `pid` runs on this host; True if the system cannot tell."""
    if os.name == "nt":  # there, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync(path: Path) -> None:
    """Sync a file's content, or a directory's names, to disk. Raises `OSError`."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def host() -> str:
    """Return the name of this host with only letters, digits, - and _, as it stands in temporary names."""
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "localhost"
