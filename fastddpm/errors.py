"""Errors that the user can fix, each with a clear message and an exit code for scripts."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar


class FastddpmError(Exception):
    """An error with a message for the user. Commands print it as one line and exit with `exit_code`."""

    exit_code = 1


class UsageError(FastddpmError, ValueError):
    """An argument, option or configuration that cannot be used: exit code 2."""

    exit_code = 2


class DataError(FastddpmError, ValueError):
    """Images, a data set or a checkpoint that cannot be used: exit code 3."""

    exit_code = 3


class DivergedError(FastddpmError, ArithmeticError):
    """Training produced NaN or infinity in several steps in a row, or memory is damaged: exit code 4."""

    exit_code = 4


class StorageError(FastddpmError, OSError):
    """The disk is full, read-only or failing: exit code 5."""

    exit_code = 5


def printable(text: str) -> str:
    """Return a message with control characters escaped, for a terminal: names and values in it may be from a file."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


_collected: ContextVar[list[str] | None] = ContextVar("_collected", default=None)


@contextlib.contextmanager
def all_problems() -> Iterator[None]:
    """Let configurations with impossible values be made inside the block, and refuse all of them at its end.

    So a user with three mistakes reads of three. Raises `UsageError` at the end of the block, or of the outermost of
    several, with one line for each problem; also if an error follows from an impossible value, which is then its cause.
    """
    if _collected.get() is not None:
        yield
        return
    problems: list[str] = []
    token = _collected.set(problems)
    try:
        yield
    except Exception as error:
        if not problems:
            raise
        raise _refusal([*problems, *([str(error)] if isinstance(error, UsageError) else [])]) from error
    finally:
        _collected.reset(token)
    refuse(problems)


@contextlib.contextmanager
def problem() -> Iterator[None]:
    """Inside `all_problems`, keep a `UsageError` of the block for its end, so that the next check is made as well."""
    try:
        yield
    except UsageError as error:
        refuse([str(error)])


def refuse(problems: Iterable[str]) -> None:
    """Raise `UsageError` with all `problems`, if there are any; inside `all_problems`, keep them for its end."""
    found = list(dict.fromkeys(problems))
    collected = _collected.get()
    if collected is not None:
        collected += [problem for problem in found if problem not in collected]
    elif found:
        raise _refusal(found)


def _refusal(problems: Sequence[str]) -> UsageError:
    found = list(dict.fromkeys(problems))
    return UsageError(found[0] if len(found) == 1 else "\n  ".join([f"{len(found)} options cannot be used:", *found]))
