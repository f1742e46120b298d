"""Reader of fastddpm's own checkpoints: the EMA weights of a training run."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastddpm.config import Preset, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.network import stored
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import from_dict, from_stored
from fastddpm.unet import meta_network, network_with

from .facts import TrainingSet, started_on
from .parts import Parts, PowerAverage


def read_preset(path: str | os.PathLike[str]) -> Preset:
    """Return the configuration of a checkpoint, or of a run's newest one. Raises as `load` does; reads no weights."""
    return _preset(checkpoint.load(Path(path), parts=()))


def load(path: str | os.PathLike[str]) -> Parts:
    """Read the EMA weights of a checkpoint, in evaluation mode, on the CPU.

    `path`: a checkpoint, or a run directory, whose newest checkpoint is read. Checksums are verified first. Raises
    `UsageError` if there is nothing at `path`, or the weights of a network of the user's own, and `DataError` if a file
    is damaged or does not fit the network of its configuration.
    """
    saved = checkpoint.load(Path(path), parts={"model"})
    preset = _preset(saved)
    check_fit(preset.unet, saved.tensors["model"], saved.path)
    weights = {name: tensor.to(torch.float32) for name, tensor in saved.tensors["model"].items()}
    unet = network_with(preset.unet, weights).requires_grad_(True)
    # Weights that began as those of another model are not random after 0 steps, as `steps` would say.
    steps = None if "origin" in saved.documents else saved.step
    run = saved.path.parent.parent if saved.path.parent.name == "checkpoints" else None
    data = TrainingSet.of(saved.documents.get("data"))
    started = None if run is None else started_on(run)
    if data is not None and started is not None and started.checksum == data.checksum:
        data = started  # which also has the number of images
    return Parts(unet.channels_last(), Diffusion(preset.diffusion), preset, steps, data, run, _average(saved))


def _average(saved: checkpoint.Checkpoint) -> PowerAverage | None:
    if "average" not in saved.documents:
        return None
    average: PowerAverage = from_stored(PowerAverage, saved.documents["average"], f"{saved.path / 'average.json'}")
    return average


def _preset(saved: checkpoint.Checkpoint) -> Preset:
    if "classifier" in saved.documents:
        raise UsageError(f"{saved.path} is a classifier, which draws no images; name it with --classifier")
    if "network" in saved.documents:
        raise UsageError(
            f"{saved.path} holds the weights of a network of your own ({saved.documents['network']!s:.100}); make that "
            "network, and give it to fastddpm.pretrained.load_weights with this path"
        )
    preset: Preset = from_dict(Preset, saved.documents.get("config"), f"{saved.path / 'config.json'}")
    return preset


def check_fit(config: UNetConfig, weights: Mapping[str, Tensor], where: Path) -> None:
    """Raise `DataError` if `weights`, which come from `where`, are not those of the network of `config`.

    The network is not made for that, whose weights could take more memory than there is.
    """
    check_weights(meta_network(config).state_dict(), weights, where, "the network of its configuration")


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> int:
    """Copy the EMA weights of a run, or of one of its checkpoints, into `network`; return the steps that they took.

    For networks of one's own, trained with `Trainer(.., network=network)`. Frozen parameters and buffers are copied,
    too. Raises `UsageError` if there is nothing at `path`, and `DataError` if a file is damaged or holds other tensors.
    """
    saved = checkpoint.load(Path(path), parts={"model"})
    targets = stored(network)
    check_weights(targets, saved.tensors["model"], saved.path, type(network).__name__)
    for name, target in targets.items():
        target.copy_(saved.tensors["model"][name])
    return saved.step


def check_weights(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: Path, network: str) -> None:
    """Raise `DataError` unless `weights`, which come from `where`, have the names and shapes of `targets`.

    `network`: the name of the network in the message.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} belongs to no layer" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"{where}: the weights do not fit {network}: {'; '.join(problems[:3])}{more}")
