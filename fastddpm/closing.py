"""The samples that a run ends with, drawn by all of its processes."""

from pathlib import Path

import numpy as np

from fastddpm.config import Preset
from fastddpm.diffusion import Diffusion
from fastddpm.generate import FrameRecorder, sample_batches, save_pictures
from fastddpm.processes import Place, gathered
from fastddpm.sampler import Sampler
from fastddpm.unet import UNet


def draw_closing_samples(unet: UNet, diffusion: Diffusion, preset: Preset, run: Path, where: Place) -> list[Path]:
    """Draw the closing samples (seeds 0, 1, ..), each process its part; the first writes them into `run`.

    Returns the paths of samples.png, samples.npz and denoising.gif, which shows the first process's images.
    """
    config = preset.sample
    if config.count == 0:
        return []
    sampler = Sampler(unet, diffusion, config.steps, config.method, config.eta, guidance=config.guidance)
    seeds = where.part(config.count)
    recorder = FrameRecorder(sampler.steps, len(seeds))
    drawn = [batch.images for batch in sample_batches(sampler, seeds, recorder=recorder)]
    parts = [part for of_one in gathered(drawn, where) for part in of_one]
    if not where.first:
        return []
    everything = range(config.count)
    return save_pictures(np.concatenate(parts), everything, sampler.labels_for(everything), recorder.frames, run)
