"""Configuration of a classifier of noisy images, as frozen dataclasses. Imports no torch."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from fastddpm.config import DiffusionConfig, TrainConfig, UNetConfig
from fastddpm.errors import refuse
from fastddpm.runtime.checks import check_seed, choice_problems, positive


@dataclass(frozen=True)
class ClassifierTraining:
    """Training of a classifier. Default: as the model itself was trained."""

    steps: int = 10_000
    """Optimizer steps of the whole training, including those before a resume."""
    batch: int = 128
    """Images per optimizer step."""
    lr: float = 3e-4
    """Learning rate of Adam after warm-up."""
    warmup: int = 500
    """Steps of linear learning rate warm-up."""
    decay: Literal["none", "cosine"] = "cosine"
    """Learning rate after warm-up: constant (none), or a cosine to zero at the last step."""
    clip_gradient: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    flip: bool = True
    """Flip images horizontally, with probability 1/2."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: run the network under autocast. Weights, noise and loss stay float32."""
    seed: int = 0
    """Seed of initial weights, data order, t, noise and dropout: 64 bits, -2^63..2^63-1."""
    log_every: int = 50
    """Steps between lines of the log."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of checkpoints to keep; older ones are removed."""
    patience: int = 3
    """Steps in a row with a loss or gradient that is not finite after which the training stops."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        yield from positive(
            self, "steps", "batch", "lr", "clip_gradient", "log_every", "save_every", "keep", "patience"
        )
        if self.lr == math.inf:
            yield "lr must be finite; got inf"
        if self.warmup < 0:
            yield f"warmup must be 0 or more; got {self.warmup}"
        for name in ("decay", "precision"):
            yield from choice_problems(self, name)

    @staticmethod
    def like(config: TrainConfig) -> "ClassifierTraining":
        """Return the training of a classifier with the options that `config`, a model's training, shares with it."""
        names = [each.name for each in dataclasses.fields(ClassifierTraining)]
        return ClassifierTraining(**{name: getattr(config, name) for name in names})

    def optimizer(self) -> TrainConfig:
        """Return the options of the optimizer: without an average, which a decay of 0 makes the weights themselves."""
        return TrainConfig(**dataclasses.asdict(self), ema=0.0)


@dataclass(frozen=True)
class ClassifierConfig:
    """A classifier of x_t: its network, the process whose x_t it knows, and its training.

    `unet`: the network whose first half it is, and in `num_classes` how many classes it tells apart.
    """

    unet: UNetConfig
    diffusion: DiffusionConfig
    train: ClassifierTraining = field(default_factory=ClassifierTraining)

    def __post_init__(self) -> None:
        if self.unet.num_classes < 2:
            refuse([f"a classifier tells two or more classes apart; num_classes is {self.unet.num_classes}"])
