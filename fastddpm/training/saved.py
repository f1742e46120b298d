"""The documents of a checkpoint beside its tensors, and the options that a run is resumed with. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.options import ResizeName
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
    background: str | None = None
    skip_bad: bool = False
    allow_bad: float = 0.0
    data_workers: int | None = None
    timeout: float = 600.0
    wandb: str | None = None

    def write(self, run: Path) -> None:
        """Write options.json into `run`. A path of images is kept absolute. Raises `StorageError`."""
        document = to_dict(self)
        if self.data is not None and Path(self.data).exists():
            document["data"] = str(Path(self.data).absolute())
        write_json(run / _OPTIONS, document)

    @property
    def bad_share(self) -> float:
        """The share of bad images that may be left out: `skip_bad` of `open_dataset`."""
        return 1.0 if self.skip_bad else self.allow_bad

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
