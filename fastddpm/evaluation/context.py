"""The context of an evaluation, shared by all metrics and pictures."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastddpm.data import Dataset
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.sampler import Sampler


@dataclass(frozen=True)
class EvaluationContext:
    """The sampler of the model to evaluate, the data set to compare it with, and the directory of the results.

    `name`: of the model, in the results; the paper's figures are shown beside those of its presets. `dataset`: images
    of the model's size and channels. `batch`: images evaluated at once. `out`: directory of the results, which exists.
    `group`: the processes that evaluate together.
    """

    name: str
    sampler: Sampler
    dataset: Dataset
    batch: int
    device: torch.device
    out: Path
    group: ProcessGroup
