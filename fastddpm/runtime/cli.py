"""What the commands share: options from dataclasses, errors in one line, exit codes. Imports no torch."""

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from fastddpm.errors import FastddpmError, StorageError, UsageError

from . import distributed

T = TypeVar("T")

_OF_STORAGE = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command on this process's arguments; a user's mistake becomes one line and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a table may hold what a terminal's encoding does not: Σ, ±
        sys.stdout.reconfigure(errors="backslashreplace")
    distributed.exit_now(_exit_code(main))


def _exit_code(main: Callable[[Sequence[str]], None]) -> int:
    try:
        main(sys.argv[1:])
        if sys.stdout is not None:  # a full disk or a reader that has gone is found here, not while Python ends
            sys.stdout.flush()
    except FastddpmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        _forget_output()
        return 141
    except OSError as error:
        if error.errno not in _OF_STORAGE:
            raise
        print(f"error: {error.filename or 'a file or the output'}: {error.strerror}", file=sys.stderr)
        _forget_output()
        return StorageError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        print(f"error: {_too_little_memory(error)}", file=sys.stderr)
        return UsageError.exit_code
    return 0


def _forget_output() -> None:
    """Have what standard output cannot take go nowhere, rather than fail again while Python ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_of_memory(error: Exception) -> bool:
    """Whether NumPy, PyTorch on a CPU or PyTorch on a GPU could not allocate."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's own, without importing torch
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def _too_little_memory(error: Exception) -> str:
    said = " ".join(str(error).split()) or "an allocation failed"
    return f"not enough memory: {said[:200]}. Take a smaller --batch (training: or --accumulate, --checkpoint-blocks)"


def parse(command: type[T], arguments: Sequence[str], *, program: str, default: T | None = None) -> T:
    """The command's dataclass from its arguments; exits 2 for a mistyped flag or a value that it refuses."""
    options: Any = {} if default is None else {"default": default}
    return tyro.cli(command, args=list(arguments), prog=f"python -m {program}", **options)


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """The value of `--flag value` or `--flag=value`, read before the arguments are parsed."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None


def run_of(checkpoint: Path) -> Path:
    """The run's directory, beside whose checkpoints the commands write, of a checkpoint in it or of itself."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def check_out(directory: Path) -> None:
    """Raise `StorageError` unless files can be put into `directory`, or it can be made; before hours of work.

    Makes nothing.
    """
    found = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(path))
    if not found.is_dir():
        raise StorageError(f"{directory} cannot hold what is to be written: {found} is not a directory")
    if not os.access(found, os.W_OK | os.X_OK):
        raise StorageError(f"{directory} cannot hold what is to be written: {found} takes no files from this user")
