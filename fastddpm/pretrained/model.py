"""A trained model, and how a checkpoint becomes one."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fastddpm.config import Preset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import from_dict
from fastddpm.unet import UNet


@dataclass(frozen=True)
class Model:
    """A network with its weights, the diffusion it was trained for, and the configuration of both."""

    unet: UNet
    diffusion: Diffusion
    preset: Preset


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Model:
    """The model of a checkpoint, with its EMA weights, in evaluation mode.

    `path`: a checkpoint directory, or a run directory, of which the newest checkpoint is taken. Its
    checksums are verified first. Raises `UsageError` when there is nothing at `path`, `DataError` when a
    file is damaged or does not belong to the network that the configuration describes.
    """
    saved = checkpoint.load(Path(path), parts={"model"})
    preset: Preset = from_dict(Preset, saved.documents["config"], f"{saved.path / 'config.json'}")
    unet = UNet(preset.unet)
    try:
        unet.load_state_dict(saved.tensors["model"])
    except RuntimeError as error:
        raise DataError(f"{saved.path}: the weights do not fit the network of its configuration: {error}") from error
    unet = unet.to(device).channels_last().eval()
    return Model(unet, Diffusion(preset.diffusion), preset)
