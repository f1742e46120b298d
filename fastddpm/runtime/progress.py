"""Progress on the terminal: reported lines, announcements of long work, progress bars, durations."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from fastddpm.errors import printable

PATIENCE_S = 1.0  # seconds after which work says what it is doing


def log(line: str) -> None:
    """Print a line to standard error at once: the default of every `report` parameter."""
    print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def announced(work: str, report: Callable[[str], None] = log) -> Iterator[None]:
    """Report "`work` .." if the block takes more than a second. `work`: as in "reading the checkpoint"."""
    timer = _later(lambda: report(f"{work} .."))
    try:
        yield
    finally:
        _cancel(timer)


def discard(line: str) -> None:
    """Report nothing: the `report` parameter of all processes but the first."""


def _later(action: Callable[[], object]) -> threading.Timer:
    """Call `action` in another thread after `PATIENCE_S` seconds, unless the timer is cancelled before."""
    timer = threading.Timer(PATIENCE_S, action)
    timer.daemon = True
    with suppress(RuntimeError):  # no more threads may be started: the work goes on unannounced
        timer.start()
    return timer


def _cancel(timer: threading.Timer) -> None:
    """Cancel a timer, or wait until what it has begun is done."""
    timer.cancel()
    if timer.ident is not None:
        timer.join()


class Meter:
    """Show the progress of a known amount of work on standard error: a bar on a terminal, otherwise lines.

    `total`: the amount of work, in `unit` (a plural noun). `done`: units done before. `seconds_between_lines`: without
    a terminal, print a line every so many seconds (default: 10), the first one after a second. None: instead of every
    so many seconds, print a line with each new note. `brief`: show nothing of work that ends within a second.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        seconds_between_lines: float | None = 10.0,
        brief: bool = False,
    ) -> None:
        from .bar import bar_on_terminal  # here, because importing rich takes a fifth of a second

        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._pause, self._shown = seconds_between_lines, not brief
        self._start, self._first = time.monotonic(), done
        self._last_line = self._start
        self._note = ""
        self._bar = bar_on_terminal(title, total, done)

    def __enter__(self) -> "Meter":
        if self._bar and self._shown:
            self._bar.start()
        self._timer = _later(self._begin)
        return self

    def _begin(self) -> None:
        """Show that the work has begun, if nothing has shown it yet."""
        if self._bar:
            self._bar.start()
        elif self._last_line == self._start:
            log(f"{self.title} {self.done}/{self.total} {self.unit}")
        self._shown = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _cancel(self._timer)
        if self._bar:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Units per second since the meter was made."""
        return (self.done - self._first) / max(1e-9, time.monotonic() - self._start)

    def update(self, done: int, note: str | Callable[[float], str] | None = None) -> None:
        """Show that `done` units are finished.

        `note`: a text, or a function from units per second to a text; it stays until the next note.
        """
        self.done = done
        noted = note is not None
        self._note = note = self._note if note is None else note(self.rate) if callable(note) else note
        if self._bar:
            self._bar.advance_to(done, note)
            return
        now = time.monotonic()
        due = noted if self._pause is None else now - self._last_line >= self._pause
        if due or (done == self.total and self._shown):
            self._last_line = now
            left = (self.total - done) / max(1e-9, self.rate)
            parts = [f"{self.title} {done}/{self.total} {self.unit}", note, f"{duration(left)} left"]
            log("  ".join(part for part in parts if part))


def counted(number: float, unit: str) -> str:
    """Return a number with its unit, a plural noun whose singular lacks the s: "1 image", "2,000 images"."""
    return f"{number:,.10g} {unit.removesuffix('s') if number == 1 else unit}"


def duration(seconds: float) -> str:
    """Return a number of seconds as text: 45 s, 12 min 05 s or 3 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
