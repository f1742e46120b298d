"""Samples that a run draws from its EMA weights: previews during training, and the final samples."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastddpm.config import EngineConfig, Preset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, StorageError
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup, all_gather_object
from fastddpm.runtime.network import interface_of
from fastddpm.runtime.progress import log
from fastddpm.sampling.generate import FrameRecorder, sample_batches, save_pictures
from fastddpm.sampling.images import animation_suffix, grid, save_png, to_uint8
from fastddpm.sampling.sampler import Sampler


@dataclass(frozen=True)
class Previews:
    """Grids of seeds 0..count-1 in `run`: previews/step-00001000.png and so on, and the newest as preview.png.

    `every`: training steps between previews; 0: never. `steps`: DDIM steps of the reverse chain; DDIM suffers least
    from few. Guidance is the run's own. Training is not affected, as all noise is a function of the seeds. Each process
    of `group` draws its share, and rank 0 writes.
    """

    run: Path
    preset: Preset
    every: int
    steps: int = 20
    count: int = 16
    group: ProcessGroup = SINGLE_PROCESS
    report: Callable[[str], None] = log

    def due(self, step: int) -> bool:
        """Return whether to draw after `step` training steps."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def draw(self, step: int, network: nn.Module, diffusion: Diffusion) -> Path | None:
        """Draw a grid, write it, and return its path (None in other ranks than 0). Every process calls this.

        A failure is reported and returns None, because it must not stop training.
        """
        parts = all_gather_object(self._part(network, diffusion), self.group)
        if not self.group.is_main:
            return None
        problems = [part for part in parts if isinstance(part, str)]
        if problems:
            self.report(f"no preview at step {step}: {problems[0]}")
            return None
        picture = grid(np.concatenate([part for part in parts if not isinstance(part, str)]))
        path = self.run / "previews" / f"step-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            save_png(picture, path)
            save_png(picture, self.run / "preview.png")
        except (OSError, StorageError) as error:
            self.report(f"no preview at step {step}: {error}")
            return None
        return path

    def _part(self, network: nn.Module, diffusion: Diffusion) -> np.ndarray | str:
        """Return this process's images, uint8 (n, C, H, W), or a line that says why they cannot be drawn."""
        seeds = self.group.share(self.count)
        if not seeds:
            return np.zeros((0, *interface_of(network).shape), np.uint8)
        steps = min(self.steps, diffusion.timesteps)
        # A new sampler each time, because it would hold memory that training needs. No CUDA graph: capturing it costs
        # more than it saves in a few steps, and NCCL's threads may disturb the capture.
        engine = EngineConfig(graph=False)
        sampler = Sampler(network, diffusion, steps, "ddim", **guidance_of(network, self.preset), engine=engine)
        try:
            return to_uint8(sampler.sample(seeds))
        except (DataError, torch.OutOfMemoryError) as error:
            return str(error).partition("\n")[0]


def guidance_of(network: nn.Module, preset: Preset) -> dict[str, Any]:
    """Return the preset's guidance as `Sampler` takes it, of scale 1 for a network without a null label."""
    return preset.sample.guidance_options() | ({"guidance": 1.0} if interface_of(network).null_label is None else {})


def draw_final_samples(
    network: nn.Module, diffusion: Diffusion, preset: Preset, run: Path, group: ProcessGroup
) -> list[Path]:
    """Draw the final samples, seeds 0, 1, .., each process its share; rank 0 writes them into `run`.

    Returns the paths of samples.png, samples.npz and denoising.webp (of rank 0's images; .gif if Pillow lacks WebP); an
    empty list in other ranks.
    """
    config = preset.sample
    if config.count == 0:
        return []
    sampler = Sampler(
        network, diffusion, config.steps, config.method, config.eta, **config.spacing_options(),
        **guidance_of(network, preset),
    )  # fmt: skip
    seeds = group.share(config.count)
    recorder = FrameRecorder(sampler, len(seeds))
    drawn = [batch.images for batch in sample_batches(sampler, seeds, recorder=recorder)]
    parts = [part for of_rank in all_gather_object(drawn, group) for part in of_rank]
    if not group.is_main:
        return []
    everything = range(config.count)
    labels, suffix = sampler.labels_for(everything), animation_suffix()
    return save_pictures(np.concatenate(parts), everything, labels, recorder.frames, run, suffix)
