"""What the commands share: options from dataclasses, errors in one line, exit codes. Imports no torch."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from . import processes
from .config import Preset, difference, from_dict, to_dict
from .errors import DataError, FastddpmError, UsageError

T = TypeVar("T")
EXIT_CODES = """exit codes: 0 done, 2 a mistake in the options, 3 images or a checkpoint that cannot be read,
4 the loss diverged, 5 the disk is full or failing, 75 another process died or did not answer (start again to go on),
130 SIGINT and 143 SIGTERM (what was done is saved)"""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command on this process's arguments; a user's mistake becomes one line and an exit code."""
    processes.finish(_exit_code(main))


def _exit_code(main: Callable[[Sequence[str]], None]) -> int:
    try:
        main(sys.argv[1:])
    except FastddpmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


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


def read_preset(path: Path) -> Preset:
    """The configuration that a run saved."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return from_dict(Preset, data, str(path))


def describe(preset: Preset, base: Preset) -> str:
    """The resolved configuration, a line for each part, and what differs from `base`."""
    lines = [f"configuration {preset.name}"]
    for part in ("unet", "diffusion", "train", "sample"):
        values = dataclasses.asdict(getattr(preset, part))
        lines.append(f"  {part}: " + ", ".join(f"{name}={_plain(value)}" for name, value in values.items()))
    changed = difference(base, preset)
    if changed:
        lines.append(f"changed from preset {base.name}: " + "; ".join(changed))
    return "\n".join(lines)


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def write_preset(preset: Preset, path: Path) -> None:
    """Save a configuration as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(to_dict(preset), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
