"""Previews: a grid of fixed seeds, drawn from the moving average while training goes on."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddpm.config import EngineConfig, Preset, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, StorageError
from fastddpm.figures import grid, save_png, to_uint8
from fastddpm.processes import ALONE, Place, gathered
from fastddpm.sampler import Sampler
from fastddpm.unet import UNet


def network_with(config: UNetConfig, weights: Mapping[str, Tensor]) -> UNet:
    """A network whose parameters are the tensors `weights`, by name: no copies, so it changes as they do.

    In evaluation mode. What is prepared from it for inference notices when they have changed.
    """
    with torch.device("meta"):
        unet = UNet(config)
    unet.load_state_dict(dict(weights), assign=True)
    return unet.requires_grad_(False).eval()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Previews:
    """Grids of the seeds 0..count-1 in `run`: previews/step-00001000.png, and the newest as preview.png.

    Drawn by DDIM, which few `steps` harm least, with the run's own guidance; every `every` steps of training, 0 for
    never. Nothing of the training changes by it: all noise is a function of the seeds. Of several processes each draws
    its `place`'s part, and the first writes.
    """

    run: Path
    preset: Preset
    every: int
    steps: int = 20
    count: int = 16
    place: Place = ALONE
    say: Callable[[str], None] = _to_stderr

    def due(self, step: int) -> bool:
        """Whether to draw after `step` steps."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def draw(self, step: int, unet: UNet, diffusion: Diffusion) -> Path | None:
        """Draw and write a grid; its path, in the first process. All processes call this.

        What keeps it from being drawn or written is told by `say`: training is worth more than a picture.
        """
        parts = gathered(self._part(unet, diffusion), self.place)
        if not self.place.first:
            return None
        problems = [part for part in parts if isinstance(part, str)]
        if problems:
            self.say(f"no preview at step {step}: {problems[0]}")
            return None
        picture = grid(np.concatenate([part for part in parts if not isinstance(part, str)]))
        path = self.run / "previews" / f"step-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            save_png(picture, path)
            save_png(picture, self.run / "preview.png")
        except (OSError, StorageError) as error:
            self.say(f"no preview at step {step}: {error}")
            return None
        return path

    def _part(self, unet: UNet, diffusion: Diffusion) -> np.ndarray | str:
        """This process's images, uint8 (n, C, H, W), or why there are none."""
        config = unet.config
        seeds = self.place.part(self.count)
        if not seeds:
            return np.zeros((0, config.image_channels, config.image_size, config.image_size), np.uint8)
        steps = min(self.steps, diffusion.timesteps)
        # A sampler of its own each time: kept, it would hold memory that training needs in between. No CUDA graph: its
        # capture costs more than so few steps gain, and NCCL's threads may disturb it.
        engine = EngineConfig(graph=False)
        sampler = Sampler(unet, diffusion, steps, "ddim", guidance=self.preset.sample.guidance, engine=engine)
        try:
            return to_uint8(sampler.sample(seeds))
        except (DataError, torch.OutOfMemoryError) as error:
            return str(error).partition("\n")[0]
