"""Signal handling: stop after this step (SIGINT, SIGTERM), save now (SIGUSR1), stop at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fastddpm.errors import FastddpmError

_STOP = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a second signal counts as the first: torchrun forwards signals, and SLURM sends them to all processes
# of a job, so a process under torchrun may receive each one twice.
_SAME_S = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
_SAVE = getattr(signal, "SIGUSR1", None)  # None on Windows


class RunInterruptedError(FastddpmError):
    """SIGINT or SIGTERM arrived and the run is saved: exit code 128 + signal number, as in a shell."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Request:
    """Requests by signals: `stop`, the number of the signal to stop for, or 0; `save`, whether to save now."""

    stop: int = 0
    save: bool = False


class SignalWatch:
    """Record the first SIGINT or SIGTERM, and SIGUSR1, for `requested` to return.

    A second SIGINT or SIGTERM ends the process at once, except within two seconds of the first under torchrun, which
    forwards signals. Only the main thread can handle signals: in another thread this does nothing.
    """

    def __init__(self) -> None:
        self._stop, self._save = 0, False
        self._since = 0.0

    def __enter__(self) -> "SignalWatch":
        self._handlers = contextlib.ExitStack()
        for number in _STOP:
            self._handlers.enter_context(_handled(number, self._note_stop))
        if _SAVE is not None:
            self._handlers.enter_context(_handled(_SAVE, self._note_save))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def requested(self) -> Request:
        """Return the requests since the last call. A request to stop is returned by every later call too."""
        save, self._save = self._save, False
        return Request(self._stop, save)

    def _note_stop(self, number: int, _: FrameType | None) -> None:
        if not self._stop:
            self._stop, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= _SAME_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _note_save(self, number: int, _: FrameType | None) -> None:
        self._save = True


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Raise `RunInterruptedError` at once on SIGINT or SIGTERM inside the block."""

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process
        raise RunInterruptedError(number, f"{signal.Signals(number).name}: {message}")

    with contextlib.ExitStack() as handlers:
        for number in _STOP:
            handlers.enter_context(_handled(number, stop))
        yield


@contextlib.contextmanager
def nothing_to_save() -> Iterator[None]:
    """Ignore SIGUSR1, whose default is to end the process, inside the block."""
    with contextlib.nullcontext() if _SAVE is None else _handled(_SAVE, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(number: int, handler: Callable[[int, FrameType | None], None] | Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)
