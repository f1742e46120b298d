"""Lock files, which keep two processes from writing the same results. Imports no torch."""

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from fastddpm.errors import StorageError, UsageError

from .reading import open_regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Path, in_use: Callable[[str], str], on_wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Lock the file `path`, made if missing, until the block or the process ends; it then names process and host.

    If another process holds the lock, calls `on_wait` and waits for it. Without `on_wait` raises `UsageError` with the
    message `in_use(who)`, where `who` names that process. Raises `StorageError` if the file cannot be written or is no
    regular file. On systems without flock (Windows, some network file systems) nothing is locked.
    """
    try:
        # Not to block at a pipe in its place.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        raise StorageError(f"cannot lock {path.parent}: {error.strerror or error}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StorageError(f"cannot lock {path.parent}: {path.name} in it is not a regular file; remove it")
        _acquire(descriptor, path, in_use, on_wait)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process, this one included, holds the lock file `path`; False if the system cannot tell."""
    if fcntl is None:
        return False
    try:
        with open_regular(path) as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ValueError):  # there is none, or no locks on this file system
        return False
    return False


def _acquire(descriptor: int, path: Path, in_use: Callable[[str], str], on_wait: Callable[[], object] | None) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is None:
            raise UsageError(in_use(_holder(descriptor))) from None
        on_wait()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return
        raise StorageError(f"cannot lock {path.parent}: {error.strerror or error}") from error
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
    except OSError as error:
        raise StorageError(f"cannot write into {path.parent}: {error.strerror or error}") from error


def _holder(descriptor: int) -> str:
    """Return "process N on HOST" from the content of a lock file, or "another process" if that is garbled."""
    found = re.fullmatch(rb"([0-9]{1,9}) ([\w.-]{1,255})\n", os.pread(descriptor, 300, 0))
    return f"process {found[1].decode()} on {found[2].decode()}" if found else "another process"
