"""The context of an evaluation, shared by all metrics and pictures."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastddpm.data import Dataset
from fastddpm.pretrained.model import Model
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.sampler import Sampler


@dataclass(frozen=True)
class EvaluationContext:
    """The model to evaluate, its sampler, the data set to compare it with, and the directory of the results.

    `dataset`: images of the model's size and channels. `batch`: images evaluated at once. `out`: directory of the
    results, which exists. `group`: the processes that evaluate together.
    """

    model: Model
    sampler: Sampler
    dataset: Dataset
    batch: int
    device: torch.device
    out: Path
    group: ProcessGroup
