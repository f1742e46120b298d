"""The documents of a checkpoint beside its tensors, the options that a run is resumed with, and the runs in runs/.

Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastddpm.errors import DataError, UsageError
from fastddpm.presets import read_preset
from fastddpm.runtime.options import ResizeName
from fastddpm.runtime.progress import log
from fastddpm.storage.documents import from_dict, read_json, to_dict
from fastddpm.storage.files import write_json

if TYPE_CHECKING:
    from fastddpm.data import Dataset

T = TypeVar("T")
_MAX_CLASSES = 2**20  # characters of class names as JSON, half of what a document may have
_OPTIONS = "options.json"


@dataclass(frozen=True)
class TrainingData:
    """data.json: the images that a run is trained on. `source`: what --data named, None for the embedded digits.

    `classes`: names of the classes, in the order of their labels; None without labels, or if they are too many.
    """

    name: str
    checksum: str
    source: str | None = None
    classes: tuple[str, ...] | None = None

    @staticmethod
    def of(dataset: "Dataset", source: str | None) -> "TrainingData":
        classes = dataset.classes
        if classes is not None and len(json.dumps(classes)) > _MAX_CLASSES:
            classes = None
        return TrainingData(dataset.name, dataset.checksum, source, classes)


@dataclass(frozen=True)
class Tally:
    """Sum of the losses and number of steps since the last log line, and steps skipped in a row."""

    loss_sum: float
    steps: int
    bad_in_a_row: int


@dataclass(frozen=True)
class Counters:
    """state.json: the step and what is counted over steps. `loss_by_t`: sums and counts of each bin, if any."""

    step: int
    tally: Tally
    loss_by_t: tuple[tuple[float, ...], ...] | None = None


def document(cls: type[T], documents: Mapping[str, Any], name: str, checkpoint: Path) -> T:
    """Return a checkpoint's document `name` as a `cls`. Raises `DataError` if it is missing or has another form."""
    if name not in documents:
        raise DataError(f"{checkpoint} lacks {name}.json")
    try:
        value: T = from_dict(cls, documents[name], f"{checkpoint / name}.json")
    except UsageError as error:
        raise DataError(str(error)) from error
    return value


@dataclass(frozen=True)
class RunOptions:
    """options.json of a run: the options of fastddpm.train beside the configuration, which --resume takes again."""

    data: str | None = None
    resize: ResizeName = "none"
    skip_bad: bool = False
    data_workers: int | None = None
    timeout: float = 600.0
    wandb: str | None = None
    init: str | None = None

    def write(self, run: Path) -> None:
        """Write options.json into `run`. Paths of images and of a model are kept absolute. Raises `StorageError`."""
        document = to_dict(self)
        for name in ("data", "init"):
            if document[name] is not None and Path(document[name]).exists():
                document[name] = str(Path(document[name]).absolute())
        write_json(run / _OPTIONS, document)

    def check_init(self, given: str | None, run: Path) -> None:
        """Raise `UsageError` if a resumed run is to begin with another model than it did. `given`: --init, if given."""
        began = {None, self.init, None if self.init is None else str(Path(self.init).absolute())}
        if given not in began and str(Path(str(given)).absolute()) not in began:
            raise UsageError(
                f"{run} began with {self.init or 'random weights'}, not with {given}, and a resumed run goes on with "
                "its own weights; leave --init out, or start a new run"
            )

    @staticmethod
    def read(run: Path) -> "RunOptions":
        """Read options.json of `run`; the defaults if there is none, as in runs of older versions.

        Raises `DataError` if it is damaged.
        """
        path = run / _OPTIONS
        try:
            found: RunOptions = from_dict(RunOptions, read_json(path), str(path))
        except FileNotFoundError:
            return RunOptions()
        except UsageError as error:
            raise DataError(f"{error}; give the options again and remove the file") from error
        return found


def newest_run(name: str | None) -> Path:
    """Return the run in runs/ whose last checkpoint is the newest, of the preset `name` if one is given.

    Raises `UsageError` if there is none.
    """
    runs = [path.parent for path in Path("runs").glob("*/config.json")]
    if name is not None:
        runs = [run for run in runs if _preset_name(run) == name]
    if not runs:
        what = "run" if name is None else f"run of preset {name}"
        raise UsageError(f"nothing to resume: no {what} in {Path('runs').resolve()}; name one with --out")
    return max(runs, key=_last_saved)


def _preset_name(run: Path) -> str | None:
    try:
        return read_preset(run / "config.json").name
    except (UsageError, DataError) as error:
        log(f"{run} is passed over: {error}")
        return None


def _last_saved(run: Path) -> float:
    """Return when the newest checkpoint of a run was written, or its configuration if it has none."""
    saved = [path.stat().st_mtime for path in (run / "checkpoints").glob("step-*")]
    return max(saved, default=(run / "config.json").stat().st_mtime)


def free_run(name: str) -> Path:
    """Return the first of runs/NAME, runs/NAME-2, runs/NAME-3, .. that does not exist."""
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path
