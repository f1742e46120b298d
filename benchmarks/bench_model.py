"""Forward pass, training step and sampling step of whole models."""

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastddpm
from fastddpm.data import Dataset
from fastddpm.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [("mnist", 32), ("cifar10", 2)]


def synchronised_timer() -> float:
    """Seconds, after everything queued on the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


pytestmark = pytest.mark.benchmark(timer=synchronised_timer, min_rounds=5, warmup=True, warmup_iterations=2)


def _measure(benchmark: Any, images: int, call: Callable[[], object]) -> None:
    with FlopCounterMode(display=False) as counter:
        call()
    benchmark(call)
    median = benchmark.stats.stats.median if benchmark.stats else float("nan")
    benchmark.extra_info |= {
        "images_per_s": images / median,
        "gflop": counter.get_total_flops() / 1e9,
        "gflop_per_s": counter.get_total_flops() / 1e9 / median,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _unet(name: str) -> fastddpm.UNet:
    unet = fastddpm.UNet(fastddpm.preset(name).unet)
    return unet.to(DEVICE).channels_last().eval()


def _labels(unet: fastddpm.UNet, batch: int) -> torch.Tensor | None:
    return torch.zeros(batch, dtype=torch.int64, device=DEVICE) if unet.config.num_classes else None


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_forward(benchmark: Any, name: str, batch: int) -> None:
    unet = _unet(name)
    config = unet.config
    x = torch.randn(batch, config.image_channels, config.image_size, config.image_size, device=DEVICE)
    t = torch.full((batch,), 500, device=DEVICE)
    with torch.no_grad():
        _measure(benchmark, batch, lambda: unet(x, t, _labels(unet, batch)))


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_training_step(benchmark: Any, name: str, batch: int) -> None:
    preset = fastddpm.preset(name)
    shape = (64, preset.unet.image_channels, preset.unet.image_size, preset.unet.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(64, dtype=np.int64) % max(1, preset.unet.num_classes)
    preset = replace(preset, train=replace(preset.train, batch=batch))
    trainer = Trainer(preset, Dataset(images, labels, "noise", "0" * 64), DEVICE)
    _measure(benchmark, batch, trainer.train_step)


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_sampling_step(benchmark: Any, name: str, batch: int) -> None:
    """One network evaluation and reverse step; images_per_s counts image steps."""
    unet = _unet(name)
    sampler = fastddpm.Sampler(unet, fastddpm.Diffusion(fastddpm.preset(name).diffusion), timesteps=[500])
    _measure(benchmark, batch, lambda: sampler.sample(range(batch)))
