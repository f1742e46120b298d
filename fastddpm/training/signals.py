"""Signals to a run: stop after this step, save now, stop at once."""

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
# torchrun passes on what it gets itself, and SLURM signals all processes of a job: each of these hears it twice.
_SAME_S = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
_SAVE = getattr(signal, "SIGUSR1", None)  # Windows has none


class RunInterruptedError(FastddpmError):
    """SIGINT or SIGTERM arrived; the run is saved. The exit code is the shell's own, 128 + signal number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Request:
    """What signals have asked for: the number of the one to stop for, or 0, and whether to save now."""

    stop: int = 0
    save: bool = False


class SignalWatch:
    """Turns signals into what `requested` returns: the first SIGINT or SIGTERM, and SIGUSR1.

    A second SIGINT or SIGTERM ends the process at once (under torchrun, one that comes within two seconds of the first
    is the first, passed on). Signals reach a process's main thread only; in another thread
    nothing is watched.
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
        """What has been asked for since the last call; a request to stop stays."""
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
    """Inside the block SIGINT and SIGTERM raise `RunInterruptedError` at once."""

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process
        raise RunInterruptedError(number, f"{signal.Signals(number).name}: {message}")

    with contextlib.ExitStack() as handlers:
        for number in _STOP:
            handlers.enter_context(_handled(number, stop))
        yield


@contextlib.contextmanager
def nothing_to_save() -> Iterator[None]:
    """Inside the block SIGUSR1, which ends a process that does not expect it, does nothing."""
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
