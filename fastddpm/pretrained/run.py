"""Reader of fastddpm's own checkpoints: the EMA weights of a training run."""

import os
from pathlib import Path

import torch

from fastddpm.config import Preset, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import from_dict
from fastddpm.unet import meta_network, network_with

from .facts import TrainingSet, started_on
from .parts import Parts


def load(path: str | os.PathLike[str]) -> Parts:
    """Read the EMA weights of a checkpoint, in evaluation mode, on the CPU.

    `path`: a checkpoint, or a run directory, whose newest checkpoint is read. Checksums are verified first. Raises
    `UsageError` if there is nothing at `path`, and `DataError` if a file is damaged or does not fit the network of its
    configuration.
    """
    saved = checkpoint.load(Path(path), parts={"model"})
    preset: Preset = from_dict(Preset, saved.documents.get("config"), f"{saved.path / 'config.json'}")
    check_fit(preset.unet, saved)
    weights = {name: tensor.to(torch.float32) for name, tensor in saved.tensors["model"].items()}
    unet = network_with(preset.unet, weights).requires_grad_(True)
    run = saved.path.parent.parent if saved.path.parent.name == "checkpoints" else None
    data = TrainingSet.of(saved.documents.get("data"))
    started = None if run is None else started_on(run)
    if data is not None and started is not None and started.checksum == data.checksum:
        data = started  # which also has the number of images
    return Parts(unet.channels_last(), Diffusion(preset.diffusion), preset, saved.step, data, run)


def check_fit(config: UNetConfig, saved: checkpoint.Checkpoint) -> None:
    """Raise `DataError` if the weights of a checkpoint are not those of the network of `config`.

    The network is not made for that, whose weights could take more memory than there is.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in meta_network(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.tensors.get("model", {}).items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} belongs to no layer" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(
            f"{saved.path}: the weights do not fit the network of its configuration: {'; '.join(problems[:3])}{more}"
        )
