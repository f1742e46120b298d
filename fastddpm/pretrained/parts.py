"""The parts of a model, which the reader of each format returns."""

from dataclasses import dataclass
from pathlib import Path

from fastddpm.config import Preset
from fastddpm.diffusion import Diffusion
from fastddpm.unet import UNet

from .facts import TrainingSet


@dataclass(frozen=True)
class PowerAverage:
    """The weights are a power-function average of length `sigma_rel`, combined from `combined` stored averages.

    `error`: how far its weighting of the steps is from the one asked for, relative to its norm (`Combination`).
    """

    sigma_rel: float
    error: float
    combined: int


@dataclass(frozen=True)
class Parts:
    """A network with its weights, the diffusion that it was trained for, and the configuration of both.

    `steps`: the training steps that the weights have taken from random ones, None if unknown, or if the training began
    with another model's weights. `data`: the images; `run`: the run directory; None if unknown. `average`: None if the
    weights are the run's EMA, or unknown.
    """

    unet: UNet
    diffusion: Diffusion
    preset: Preset
    steps: int | None = None
    data: TrainingSet | None = None
    run: Path | None = None
    average: PowerAverage | None = None
