"""Errors that the user can fix, each with a clear message and an exit code for scripts."""


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
