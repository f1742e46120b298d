"""The context of an evaluation, shared by all metrics and pictures."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastddpm.data import Dataset
from fastddpm.errors import UsageError
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.sampler import Sampler


@dataclass(frozen=True)
class EvaluationContext:
    """The sampler of the model to evaluate, the data set to compare it with, and the directory of the results.

    `name`: of the model, in the results; the paper's figures are shown beside those of its presets. `data`: images of
    the model's size and channels; None if only their statistics are known. `batch`: images evaluated at once. `out`:
    directory of the results, which exists. `group`: the processes that evaluate together. `steps`: the training
    steps of the model; None if unknown.
    """

    name: str
    sampler: Sampler
    data: Dataset | None
    batch: int
    device: torch.device
    out: Path
    group: ProcessGroup
    steps: int | None = None

    @property
    def dataset(self) -> Dataset:
        """The images to compare with. Raises `UsageError` if there are none."""
        if self.data is None:
            raise UsageError("statistics alone give fid and is; name the images with --data for everything else")
        return self.data
