"""Reader of fastddpm's own checkpoints: the EMA weights of a training run."""

import os
from pathlib import Path

from fastddpm.config import Preset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import from_dict
from fastddpm.unet import UNet

from .parts import Parts


def load(path: str | os.PathLike[str]) -> Parts:
    """Read the EMA weights of a checkpoint, in evaluation mode, on the CPU.

    `path`: a checkpoint, or a run directory, whose newest checkpoint is read. Checksums are verified first. Raises
    `UsageError` if there is nothing at `path`, and `DataError` if a file is damaged or does not fit the network of its
    configuration.
    """
    saved = checkpoint.load(Path(path), parts={"model"})
    preset: Preset = from_dict(Preset, saved.documents["config"], f"{saved.path / 'config.json'}")
    unet = UNet(preset.unet)
    try:
        unet.load_state_dict(saved.tensors["model"])
    except RuntimeError as error:
        raise DataError(f"{saved.path}: the weights do not fit the network of its configuration: {error}") from error
    return Parts(unet.channels_last().eval(), Diffusion(preset.diffusion), preset, saved.step)
