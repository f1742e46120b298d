"""Previews: a grid of fixed seeds, drawn from the moving average while training goes on."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastddpm.config import EngineConfig, Preset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, StorageError
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup, all_gather_object
from fastddpm.sampling.generate import FrameRecorder, sample_batches, save_pictures
from fastddpm.sampling.images import grid, save_png, to_uint8
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet import UNet


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Previews:
    """Grids of the seeds 0..count-1 in `run`: previews/step-00001000.png, and the newest as preview.png.

    Drawn by DDIM, which few `steps` harm least, with the run's own guidance; every `every` steps of training, 0 for
    never. Nothing of the training changes by it: all noise is a function of the seeds. Of several processes each draws
    its `group`'s part, and the first writes.
    """

    run: Path
    preset: Preset
    every: int
    steps: int = 20
    count: int = 16
    group: ProcessGroup = SINGLE_PROCESS
    say: Callable[[str], None] = _to_stderr

    def due(self, step: int) -> bool:
        """Whether to draw after `step` steps."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def draw(self, step: int, unet: UNet, diffusion: Diffusion) -> Path | None:
        """Draw and write a grid; its path, in the first process. All processes call this.

        What keeps it from being drawn or written is told by `say`: training is worth more than a picture.
        """
        parts = all_gather_object(self._part(unet, diffusion), self.group)
        if not self.group.is_main:
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
        seeds = self.group.share(self.count)
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


# The samples that a run ends with, drawn by all of its processes.


def draw_final_samples(unet: UNet, diffusion: Diffusion, preset: Preset, run: Path, group: ProcessGroup) -> list[Path]:
    """Draw the closing samples (seeds 0, 1, ..), each process its part; the first writes them into `run`.

    Returns the paths of samples.png, samples.npz and denoising.gif, which shows the first process's images.
    """
    config = preset.sample
    if config.count == 0:
        return []
    sampler = Sampler(unet, diffusion, config.steps, config.method, config.eta, guidance=config.guidance)
    seeds = group.share(config.count)
    recorder = FrameRecorder(sampler.steps, len(seeds))
    drawn = [batch.images for batch in sample_batches(sampler, seeds, recorder=recorder)]
    parts = [part for of_one in all_gather_object(drawn, group) for part in of_one]
    if not group.is_main:
        return []
    everything = range(config.count)
    return save_pictures(np.concatenate(parts), everything, sampler.labels_for(everything), recorder.frames, run)
