"""What is evaluated, and with what: shared by every metric and picture."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastddpm.data import Dataset
from fastddpm.pretrained.model import Model
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.sampler import Sampler


@dataclass(frozen=True)
class EvaluationContext:
    """A model with its sampler, the images that it is compared with, and where results go.

    `dataset`: decoded at the model's size and channels. `batch`: images evaluated at once. `out`: a directory that
    exists. `group`: this process among those that evaluate together.
    """

    model: Model
    sampler: Sampler
    dataset: Dataset
    batch: int
    device: torch.device
    out: Path
    group: ProcessGroup
