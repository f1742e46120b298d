"""The documents of a checkpoint beside its tensors, the options that a run is resumed with, and what may change then.

Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastddpm.config import Preset
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.options import ResizeName
from fastddpm.storage.documents import difference, from_dict, from_stored, read_json, to_dict
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
    value: T = from_stored(cls, documents[name], f"{checkpoint / name}.json")
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


# Fields of TrainConfig that may change on --resume without --override.
FREE_TO_CHANGE = {
    "steps", "accumulate", "compile", "graph", "checkpoint_blocks", "parallel", "log_every", "save_every", "keep",
    "patience", "preview_every", "preview_steps", "ema_snapshots", "ema_snapshot_dtype",
}  # fmt: skip


def refuse_changes(base: Preset, wanted: Preset, run: Path, *, override: bool) -> None:
    """Raise `UsageError` if a run of configuration `base` cannot go on as `wanted`.

    Never as another model; with other training options if `override` (--override).
    """
    refused = [
        line for part in ("unet", "diffusion") for line in difference(getattr(base, part), getattr(wanted, part))
    ]
    if refused:
        raise UsageError(f"{run} cannot continue as another model: {'; '.join(refused)}. Start a new run instead")
    others = changed(base, wanted)
    if others and not override:
        raise UsageError(
            f"{run} was trained with other options: {'; '.join(others)}. --override continues with the new ones"
        )


def changed(base: Preset, wanted: Preset) -> list[str]:
    """Return the options of training, as in "lr: 0.002 -> 0.001", that change the result of the run `base`."""
    return [line for line in difference(base.train, wanted.train) if line.partition(":")[0] not in FREE_TO_CHANGE]
