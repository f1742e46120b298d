"""The options of every command that draws images: its chain, noise and engine. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes

from fastddpm.config import EngineConfig, Method

if TYPE_CHECKING:
    import torch

    from fastddpm.pretrained.model import Model

    from .sampler import Sampler


@dataclass(frozen=True)
class ChainOptions:
    """How the reverse chain is run. Options that are not given are the run's own (its SampleConfig)."""

    method: Method | None = None
    """ancestral (Algorithm 2) or ddim. Default: the run's own."""
    steps: int | None = None
    """Steps of the chain, 1..T. Default: the run's own."""
    eta: float | None = None
    """DDIM's noise, from 0 (deterministic) to 1 (that of ancestral sampling). Default: the run's own."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is none. Default: the run's own."""
    noise_seed: int = 0
    """64-bit key of all noise; another key gives every seed another image."""
    engine: Annotated[EngineConfig, OmitArgPrefixes] = dataclasses.field(default_factory=EngineConfig)

    def sampler(self, model: "Model") -> "Sampler":
        """Return the model's sampler with these options. Raises `UsageError` for values out of range."""
        from .sampler import Sampler

        names = ("method", "steps", "eta", "guidance")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        config = dataclasses.replace(model.preset.sample, **given)
        return Sampler(
            model.unet, model.diffusion, config.steps, config.method, config.eta,
            guidance=config.guidance, seed=self.noise_seed, engine=self.engine,
        )  # fmt: skip

    def open(self, checkpoint: Path, device: "torch.device", batch: int | None) -> "tuple[Model, Sampler, int]":
        """Load a model onto `device`; return it, its sampler and the batch size (None: from the device's memory)."""
        from fastddpm.pretrained import load

        from . import batch_size

        model = load(checkpoint, device)
        sampler = self.sampler(model)
        return model, sampler, batch or batch_size.choose(sampler.probe, model.unet.config, device)
