"""The parts of a model, which the reader of each format returns."""

from dataclasses import dataclass

from fastddpm.config import Preset
from fastddpm.diffusion import Diffusion
from fastddpm.unet import UNet


@dataclass(frozen=True)
class Parts:
    """A network with its weights, the diffusion that it was trained for, and the configuration of both.

    `steps`: the training steps that the weights have taken from random ones; None if unknown, or if the training began
    with another model's weights.
    """

    unet: UNet
    diffusion: Diffusion
    preset: Preset
    steps: int | None = None
