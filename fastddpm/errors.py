"""Errors that are the user's to mend: one clear message, and an exit code that scripts can rely on."""


class FastddpmError(Exception):
    """A fault with a message for the user; the commands print it in one line and exit with `exit_code`."""

    exit_code = 1


class UsageError(FastddpmError, ValueError):
    """An argument, option or configuration that cannot be used: exit code 2."""

    exit_code = 2


class DataError(FastddpmError, ValueError):
    """Images, a data set or a checkpoint that cannot be read: exit code 3."""

    exit_code = 3


class DivergedError(FastddpmError, ArithmeticError):
    """Training produced NaN or infinity several times in a row: exit code 4."""

    exit_code = 4


class StorageError(FastddpmError, OSError):
    """The disk is full, read-only or failing: exit code 5."""

    exit_code = 5
