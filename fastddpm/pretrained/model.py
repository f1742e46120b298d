"""A trained model, read from any format and written as a diffusers pipeline."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from fastddpm.config import Preset
from fastddpm.errors import UsageError
from fastddpm.runtime.options import HUB, check_hub_name, is_built_in, is_hub_name

from . import compact, diffusers, run
from .facts import OWN
from .foreign import read
from .parts import Parts


@dataclass(frozen=True)
class Model(Parts):
    """A network with its weights (`unet`), its diffusion (`diffusion`), and the configuration of both (`preset`).

    `steps`: the training steps that the weights have taken; `data`: the images that they were trained on; `run`: the
    run directory that they are from. Each is None if unknown, as of a pipeline. `average`: the power-function average
    that the weights are (`python -m fastddpm.average`), None if they are the run's EMA.

    `Model(unet, diffusion)` is made of a `UNet` and a `Diffusion` that were trained in one's own loop. The default of
    `preset` then has their configurations, and is named "own": how they were trained is not known.
    """

    preset: Preset = None  # type: ignore[assignment]  # replaced below

    def __post_init__(self) -> None:
        if self.preset is None:
            preset = Preset(OWN, self.unet.config, self.diffusion.config)
            object.__setattr__(self, "preset", preset)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "Model":
        """Read the model of a run directory, one of its checkpoints, a diffusers directory, a packed or converted file.

        Also of a TensorFlow checkpoint of the paper's released code, named by its prefix or its directory.

        "digits" is the model that comes with fastddpm, which the first command of the README trained. From a run the
        EMA weights are read. "hub:USER/NAME" or "hub:USER/NAME@REVISION" is a model of the Hugging Face hub, which is
        downloaded unless it is cached (pretrained/hub.py). The network is in evaluation mode, on `device` (default: the
        CPU). Raises `UsageError` if there is nothing at `path`, and `DataError` if a file is damaged or describes a
        network that fastddpm cannot represent.
        """
        source, reader = _located(path)
        parts: Parts = reader.load(source)
        return cls(**vars(parts) | {"unet": parts.unet.to(device)})

    def save_pretrained(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, license: str | None = None
    ) -> None:
        """Write the model as a `DDPMPipeline` directory of diffusers, atomically, with a model card, README.md.

        The card names what is known: configuration, data, steps, and the scores of these weights in the run directory.
        `license`: the hub's identifier of the license that the card states, as apache-2.0. Default: none is stated.
        Raises `UsageError` if diffusers cannot express the process (prediction xprev, schedules const and jsd, variance
        learned), for a license of another form, or if `path` is not empty, unless it is a pipeline and `overwrite` is
        true. Raises `StorageError` if it cannot be written.
        """
        diffusers.save(self, path, overwrite=overwrite, license=license)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "A model of fastddpm",
        license: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes as the model `name`, USER/NAME, of the Hugging Face hub.

        The model is made there if it is new, for all to see unless `private` is true. Default: as the owner's settings
        there say. `revision`: the branch to write. Default: main. `message`: of the commit. Returns the address of the
        commit. `license`: what the card states, as for `save_pretrained`.

        Raises as `save_pretrained` does, and `UsageError` without huggingface_hub (pip install 'fastddpm[hub]'), or if
        the hub refuses it, as it does without a login.
        """
        from . import hub

        check_hub_name(f"{HUB}{name}")
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(Path(directory) / "model", license=license)
            return hub.push(Path(directory) / "model", name, private=private, revision=revision, message=message)


load = Model.from_pretrained


def read_preset(path: str | os.PathLike[str]) -> Preset:
    """Return the configuration of what `Model.from_pretrained` reads at `path`. Raises as it does; reads no weights."""
    source, reader = _located(path, weights=False)
    preset: Preset = reader.read_preset(source)
    return preset


def _located(path: str | os.PathLike[str], *, weights: bool = True) -> tuple[Path, ModuleType]:
    """Return where the model at `path` lies, and the module that reads its format.

    `weights`: whether the weights of a model of the hub are wanted, too.
    """
    if is_built_in(path):
        return compact.DIGITS, compact
    if is_hub_name(path):
        from . import hub

        source = hub.fetch(os.fspath(path), weights=weights)
    else:
        source = Path(path)
    if source.suffix == ".safetensors":
        return source, compact
    if diffusers.is_pipeline(source):
        return source, diffusers
    if read.is_checkpoint(source):
        return source, read
    if source.is_file():
        raise UsageError(
            f"{source} is a file, and no .safetensors; a checkpoint of another implementation is converted by "
            "python -m fastddpm.convert, a run of fastddpm is a directory"
        )
    return source, run
