"""What a run tells: a line of JSON for each logged step, and progress for whoever watches."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastddpm.errors import StorageError
from fastddpm.files import write_text


class JsonLines:
    """An append-only log.jsonl; on resume, lines behind the checkpoint's step are dropped first."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = path
        if resume_step is not None and path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resume_step]
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and hand it to the operating system at once. Raises `StorageError`."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every record was flushed; what is left is what could not be written
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, in order; a line that is only half written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if math.isfinite(_step(line))]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, from a run that was killed


class _Bar(Progress):
    """Progress bars, each with its note on a line below."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Bars and notes; rich calls this."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Meter:
    """Progress of a known amount of work: a bar on a terminal; elsewhere a line every few seconds.

    `seconds_between_lines` None: elsewhere a line with each new note.
    """

    def __init__(
        self, title: str, total: int, unit: str, *, done: int = 0, seconds_between_lines: float | None = 10.0
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._pause = seconds_between_lines
        self._start, self._first = time.monotonic(), done
        self._last_line = self._start
        self._note = ""
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = _Bar(
                TextColumn(title), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(), TextColumn("left"), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "Meter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Units per second since the meter began."""
        return (self.done - self._first) / max(1e-9, time.monotonic() - self._start)

    def update(self, done: int, note: str | Callable[[float], str] | None = None) -> None:
        """Show that `done` units are finished, with a short note that stays until the next, or is made of the rate."""
        self.done = done
        noted = note is not None
        self._note = note = self._note if note is None else note(self.rate) if callable(note) else note
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        due = noted if self._pause is None else now - self._last_line >= self._pause
        if due or done == self.total:
            self._last_line = now
            left = (self.total - done) / max(1e-9, self.rate)
            parts = [f"{self.title} {done}/{self.total} {self.unit}", note, f"{duration(left)} left"]
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min 05 s or 3 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
