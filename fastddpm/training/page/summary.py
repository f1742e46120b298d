"""What a run directory tells, read so that anything in it may be missing or damaged."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddpm.config import Preset, TrainConfig
from fastddpm.errors import DataError, UsageError
from fastddpm.presets import read_preset
from fastddpm.pretrained.facts import Facts, TrainingSet, parameters_of
from fastddpm.pretrained.scores import FILE, Scores, read_scores
from fastddpm.runtime.progress import duration
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import read_object
from fastddpm.storage.reading import read_bytes
from fastddpm.training.environment import changes
from fastddpm.training.run_log import Record, read_log_thinned

_MOST_RECORDS = 3000  # of the log; a chart is some 400 pixels wide
_MOST_STARTS = 50  # the latest ones
_LATEST = 20  # records of which speed and loss are the medians
_MOST_SKIPPED = 2**22  # bytes of not_finite.jsonl


@dataclass(frozen=True)
class Start:
    """A start of a run, as environment.json tells it: all texts, empty if unknown."""

    date: str
    step: str
    command: str
    device: str
    processes: str
    versions: str


@dataclass(frozen=True)
class Summary:
    """A run directory: its facts and its history.

    `facts`: None if there is no readable config.json. `records`: of the log, evenly thinned; `lines`: how many the log
    has. `changes`: the steps at which --override changed options, each with the changes as text. `step`: the last one
    taken. `skipped`: steps whose loss or gradient was not finite. `scores_step`: that of the weights that were
    measured, None if unknown. `problems`: a sentence for each damaged file. `training`: whether a process trains in it.
    """

    run: Path
    facts: Facts | None
    records: Sequence[Record]
    lines: int
    changes: Sequence[tuple[int, str]]
    starts: Sequence[Start]
    step: int
    skipped: int
    scores_step: int | None
    problems: Sequence[str]
    training: bool

    @property
    def config(self) -> TrainConfig | None:
        return None if self.facts is None else self.facts.preset.train

    @property
    def state(self) -> str:
        """One of "training", "drawing samples", "finished", "stopped" and "not begun"."""
        trained = self.config is not None and self.step >= self.config.steps
        if self.training:
            return "drawing samples" if trained else "training"
        if trained:
            return "finished"
        return "stopped" if self.step else "not begun"

    def latest(self, name: str) -> float | None:
        """Return the median of a number over the last records that have it; None if none has."""
        values = [value for record in self.records if (value := _finite(record.get(name))) is not None]
        return statistics.median(values[-_LATEST:]) if values else None

    def time_left(self) -> str | None:
        """Return the time that the remaining steps take at the latest speed, as text; None if nobody trains."""
        rate = self.latest("images_per_s")
        if self.config is None or self.state != "training" or not rate:
            return None
        return _duration((self.config.steps - self.step) * self.config.batch / rate)

    def time_spent(self) -> str | None:
        """Return the time that the steps in the log took, as text, without previews and saving; None if unknown."""
        if self.config is None:
            return None
        seconds, before = 0.0, 0
        for record in self.records:
            rate = _finite(record.get("images_per_s"))
            if rate and record["step"] > before:
                seconds += (record["step"] - before) * self.config.batch / rate
            before = record["step"]
        return _duration(seconds)


def summarize(run: Path, *, training: bool | None = None) -> Summary:
    """Read a run directory. `training`: whether a process trains in it; None: look whether one holds its lock.

    Raises nothing for missing or damaged files: they are in `problems`, or left out.
    """
    problems: list[str] = []
    preset = _preset(run, problems)
    records, lines = _records(run, problems)
    sessions = _sessions(run, problems)
    scores = _scores(run, problems)
    saved = checkpoint.newest_step(run)
    step = max([records[-1]["step"] if records else 0, saved or 0])
    facts = None
    if preset is not None:
        data = next((found for s in reversed(sessions) if (found := TrainingSet.of(s.get("data"))) is not None), None)
        facts = Facts(preset, parameters_of(preset), step or None, data, scores.scores)
    return Summary(
        run=run,
        facts=facts,
        records=records,
        lines=lines,
        changes=changes(run),
        starts=[_start(session) for session in sessions[-_MOST_STARTS:]],
        step=step,
        skipped=_skipped(run),
        scores_step=scores.step,
        problems=problems,
        training=checkpoint.in_use(run) if training is None else training,
    )


def _preset(run: Path, problems: list[str]) -> Preset | None:
    try:
        return read_preset(run / "config.json")
    except (UsageError, DataError) as error:
        problems.append(f"The configuration cannot be read: {error}.")
        return None


def _records(run: Path, problems: list[str]) -> tuple[list[Record], int]:
    path = run / "log.jsonl"
    if not path.exists():
        return [], 0
    try:
        records, lines = read_log_thinned(path, _MOST_RECORDS)
    except DataError as error:
        problems.append(f"The log cannot be read: {error}.")
        return [], 0
    # Sorted, because of a log that someone has put together from several.
    return sorted(records, key=lambda record: record["step"]), lines


def _sessions(run: Path, problems: list[str]) -> list[Mapping[str, Any]]:
    try:
        sessions = read_object(run / "environment.json").get("sessions")
    except FileNotFoundError:
        return []
    except DataError as error:
        problems.append(f"The starts of the run cannot be read: {error}.")
        return []
    return [session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else []


def _scores(run: Path, problems: list[str]) -> Scores:
    try:
        return read_scores(run / "evaluation" / FILE)
    except FileNotFoundError:
        pass
    except DataError as error:
        problems.append(f"The scores cannot be read: {error}.")
    return Scores("", None, ())


def _skipped(run: Path) -> int:
    """Return the number of steps that were skipped because their loss or gradient was not finite."""
    try:
        return read_bytes(run / "not_finite.jsonl", _MOST_SKIPPED).count(b"\n")
    except (OSError, ValueError):
        return 0


def _start(session: Mapping[str, Any]) -> Start:
    command, libraries = session.get("command"), session.get("libraries")
    versions = [f"fastddpm {session.get('fastddpm', '')}"]
    if isinstance(libraries, dict):
        versions += [f"{name} {version}" for name, version in libraries.items() if isinstance(version, str)]
    return Start(
        date=_text(session.get("started")),
        step=_text(session.get("step")),
        command=shlex.join(map(_text, command)) if isinstance(command, list) else "",
        device=_text(session.get("device")),
        processes=_text(session.get("processes")),
        versions=", ".join(versions),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _duration(seconds: float) -> str | None:
    return duration(seconds) if 0 < seconds < 1e12 else None


def _text(value: object) -> str:
    return "" if value is None else str(value)[:1000]
