"""The frame of every command: options from dataclasses, one-line errors, exit codes. Imports no torch."""

import dataclasses
import errno
import functools
import inspect
import io
import itertools
import operator
import os
import re
import sys
import tempfile
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from fastddpm.errors import FastddpmError, StorageError, UsageError, all_problems, printable

from . import distributed
from .options import is_built_in, is_hub_name

T = TypeVar("T")

METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}  # what an option takes, in help and messages

_STORAGE_ERRNOS = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE,
}  # fmt: skip
_LIMITS = {errno.EMFILE: "ulimit -n", errno.ENFILE: "the system's limit", errno.EAGAIN: "ulimit -u"}


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command on this process's arguments. Prints a user's mistake as one line and exits with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # for characters that the terminal's encoding lacks: Σ, ±
        sys.stdout.reconfigure(errors="backslashreplace")
    distributed.exit_now(_exit_code(main))


def _exit_code(main: Callable[[Sequence[str]], None]) -> int:
    try:
        _check_surroundings()
        main(sys.argv[1:])
        if sys.stdout is not None:  # so that a full disk or a closed pipe raises here, not while Python exits
            sys.stdout.flush()
    except FastddpmError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        _discard_output()
        return 141
    except OSError as error:
        if error.errno in _LIMITS:
            print(f"error: {error.strerror}; raise {_LIMITS[error.errno]}, or close other programs", file=sys.stderr)
            return UsageError.exit_code
        if error.errno not in _STORAGE_ERRNOS:
            raise
        print(f"error: {error.filename or 'a file or the output'}: {error.strerror}", file=sys.stderr)
        _discard_output()
        return StorageError.exit_code
    except (MemoryError, RuntimeError) as error:
        if "can't start new thread" in str(error):
            print("error: the system allows this user no more threads; raise ulimit -u, or end others", file=sys.stderr)
            return UsageError.exit_code
        if not _is_out_of_memory(error):
            raise
        print(f"error: {_out_of_memory_message(error)}", file=sys.stderr)
        return UsageError.exit_code
    return 0


def _check_surroundings() -> None:
    """Raise `UsageError` if the current directory is gone, or no directory for temporary files can be written."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(f"the current directory cannot be used ({error.strerror}); change to another one") from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UsageError(f"{error.strerror}; set TMPDIR to a directory that can be written to") from error


def _discard_output() -> None:
    """Send unwritten standard output to os.devnull, so that flushing it does not fail again while Python exits."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether NumPy, or PyTorch on a CPU or GPU, raised this because it could not allocate memory."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch.OutOfMemoryError, without importing torch
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def _out_of_memory_message(error: Exception) -> str:
    reason = " ".join(str(error).split()) or "an allocation failed"
    return (
        f"not enough memory: {reason[:200]}. Take a smaller --batch (or, in training, a larger --accumulate or "
        "--checkpoint-blocks)"
    )


def parse(
    command: type[T],
    arguments: Sequence[str],
    *,
    program: str,
    default: T | None = None,
    common: Collection[str] | None = None,
) -> T:
    """Parse arguments into the command's dataclass; exits with 2 for an unknown flag or a value it refuses.

    `program`: the module name in the usage line. `default`: default values other than the dataclass's own. `common`:
    names of the options that `--help` shows; the others are shown by `--help-all`. Default: `--help` shows all.
    """
    rules = ConstructorRegistry()
    rules.primitive_rule(_optional)
    for kind, metavar in METAVARS.items():
        rules.primitive_rule(functools.partial(_named, kind, metavar))
    options: dict[str, Any] = {"prog": f"python -m {program}", "registry": rules}
    if not {"-h", "--help", "--help-all"}.isdisjoint(arguments):
        _print_help(command, arguments, default, common, options)
    if default is not None:
        options["default"] = default
    with all_problems():
        return tyro.cli(command, args=[f"./{word}" if _is_dashed_path(word) else word for word in arguments], **options)


def _is_dashed_path(word: str) -> bool:
    """Return whether an argument is the path of something here that begins with one dash, as no option does but -h."""
    dashed = word.startswith("-") and not word.startswith("--") and word not in ("-", "-h")
    return dashed and not word[1:].replace(".", "").isdigit() and os.path.lexists(word)


def _print_help(
    command: Any, arguments: Sequence[str], default: Any, common: Collection[str] | None, options: dict[str, Any]
) -> NoReturn:
    """Print the options of a command, or of the subcommand that `arguments` name, and exit."""
    from .help import COMMON_ONLY, described

    if "--help-all" in arguments:
        common = None
    if common is not None:
        options["description"] = f"{inspect.getdoc(command)}\n{COMMON_ONLY}"
    words = ["--help" if word in ("-h", "--help-all") else word for word in arguments]
    tyro.cli(described(command, default, common), args=words[: words.index("--help") + 1], **options)
    raise SystemExit


def _named(kind: type, metavar: str, info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Call what an option of type `kind` takes `metavar`."""
    if info.type is not kind:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: isinstance(value, kind) or (kind is float and isinstance(value, int)),
        str_from_instance=lambda value: [str(value)],
    )


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """Show an option of type T | None as T alone: the help says INT, not {None}|INT. None is still a value."""
    kinds = typing.get_args(info.type)
    if type(None) not in kinds:
        return None
    others: Any = functools.reduce(operator.or_, (kind for kind in kinds if kind is not type(None)))
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(others, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return spec
    return dataclasses.replace(
        spec,
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of `--flag value` or `--flag=value` before the arguments are parsed, or None.

    As the parser does, takes `--long_flag` for `--long-flag`, and the last value of an option that is given twice.
    """
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag and (equals or i + 1 < len(arguments)):
            found = value if equals else arguments[i + 1]
    return found


def peek_all(arguments: Sequence[str], flag: str) -> list[str]:
    """Return all values of an option that takes several, before the arguments are parsed; as `peek` for the rest."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            after = itertools.takewhile(lambda word: not word.startswith("-"), arguments[i + 1 :])
            found = [value] if equals else list(after)
    return found


def run_of(checkpoint: Path) -> Path:
    """Return the directory for results of a model: the run of a checkpoint, or the directory that the model lies in.

    For a packed file that is the directory of its name without .safetensors, runs/digits for the built-in model, and
    runs/hub-USER-NAME for hub:USER/NAME.
    """
    if is_hub_name(checkpoint):
        return Path("runs") / re.sub("[:/@]", "-", str(checkpoint))
    if is_built_in(checkpoint):
        return Path("runs") / checkpoint
    if checkpoint.suffix == ".safetensors":
        return checkpoint.with_suffix("")
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
