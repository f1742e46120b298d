"""Atomic writes: a file or directory is written completely or not at all. Imports no torch, NumPy only for arrays."""

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.errors import StorageError

if TYPE_CHECKING:
    import numpy as np


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Write a file atomically: `write` creates a temporary file beside `path`, which is then renamed to `path`.

    Readers find either the old file or the new one. With `durable` file and name are synced to disk. Raises
    `StorageError` if it cannot be written.
    """
    temporary = temporary_beside(path)
    try:
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
    """Write text as UTF-8, with `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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
    aside = temporary.with_suffix(".old")  # not .tmp, which may be removed: it may be the only copy
    try:
        temporary.mkdir()
        yield temporary
        move_into_place(temporary, target, aside)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
