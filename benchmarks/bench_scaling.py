"""How the cost of an evaluation grows with the batch and with the image, and that of a chain with its steps."""

from dataclasses import replace
from typing import Any

import pytest
from harness import DEVICE, ON_GPU, forward_flop, record, synchronised_timer

import fastddpm

pytestmark = pytest.mark.benchmark(timer=synchronised_timer, min_rounds=3, max_time=1.0, warmup=True,
                                   warmup_iterations=1)  # fmt: skip
PRESET = "cifar10" if ON_GPU else "mnist"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if ON_GPU else (1, 2, 4, 8, 16, 32, 64)
SIZES = (16, 32, 64, 128) if ON_GPU else (8, 16, 32, 64)
STEPS = (10, 20, 50, 100, 200)


def sampler(size: int | None = None, steps: int = 1) -> fastddpm.Sampler:
    preset = fastddpm.preset(PRESET)
    config = preset.unet if size is None else replace(preset.unet, image_size=size)
    return fastddpm.Sampler(fastddpm.UNet(config).to(DEVICE), fastddpm.Diffusion(preset.diffusion), steps)


@pytest.mark.parametrize("batch", BATCHES)
def test_batch(benchmark: Any, batch: int) -> None:
    benchmark.group = f"scaling of {PRESET} with the batch"
    chain = sampler()
    benchmark(chain.sample, range(batch))
    record(benchmark, "fastddpm", images=batch, flop=forward_flop(PRESET, batch), scaling="batch", value=batch,
           preset=PRESET)  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_resolution(benchmark: Any, size: int) -> None:
    """Attention stays at 16x16, where the preset has it: where the image has no such level, in the middle alone."""
    benchmark.group = f"scaling of {PRESET} with the image"
    chain = sampler(size)
    benchmark(chain.sample, range(4))
    record(benchmark, "fastddpm", images=4, flop=forward_flop(PRESET, 4, size), scaling="resolution", value=size,
           preset=PRESET)  # fmt: skip


@pytest.mark.parametrize("steps", STEPS)
def test_steps(benchmark: Any, steps: int) -> None:
    benchmark.group = f"scaling of {PRESET} with the steps"
    chain = sampler(steps=steps)
    benchmark(chain.sample, range(4))
    record(benchmark, "fastddpm", images=4, flop=steps * forward_flop(PRESET, 4), scaling="steps", value=steps,
           preset=PRESET)  # fmt: skip
