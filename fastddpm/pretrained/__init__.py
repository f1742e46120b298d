"""Other libraries' model formats, one module each; none of those libraries is imported."""

import dataclasses
import os
from pathlib import Path

import torch

from . import diffusers, model

__all__ = ["diffusers", "load"]


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> model.Model:
    """The model of a directory in any of the formats: a run, a checkpoint, or a pipeline of diffusers.

    In evaluation mode, with EMA weights where there are some. Raises `UsageError` and `DataError` as the readers do.
    """
    path = Path(path)
    if (path / "model_index.json").exists() or (path / "unet" / "config.json").exists():
        loaded = diffusers.load(path)
        return dataclasses.replace(loaded, unet=loaded.unet.to(device))
    return model.load(path, device)
