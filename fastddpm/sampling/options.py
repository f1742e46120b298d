"""The flags of every command that draws images: which chain, from which noise, evaluated how. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes

from fastddpm.config import EngineConfig, Method

if TYPE_CHECKING:
    from fastddpm.pretrained.model import Model

    from .sampler import Sampler


@dataclass(frozen=True)
class ChainOptions:
    """What is not given is the run's own choice."""

    method: Method | None = None
    """ancestral (Algorithm 2) or ddim; the run's own choice unless given."""
    steps: int | None = None
    """Steps of the chain; the run's own choice unless given."""
    eta: float | None = None
    """DDIM's noise, 0 to 1."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    noise_seed: int = 0
    """64-bit key of all noise: another value gives every seed another image."""
    engine: Annotated[EngineConfig, OmitArgPrefixes] = dataclasses.field(default_factory=EngineConfig)

    def sampler(self, model: "Model") -> "Sampler":
        """The model's sampler with these choices; `UsageError` for values out of range."""
        from .sampler import Sampler

        names = ("method", "steps", "eta", "guidance")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        config = dataclasses.replace(model.preset.sample, **given)
        return Sampler(
            model.unet, model.diffusion, config.steps, config.method, config.eta,
            guidance=config.guidance, seed=self.noise_seed, engine=self.engine,
        )  # fmt: skip
