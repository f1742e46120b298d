"""Training on a GPU: the losses of a CPU, in bfloat16 and compiled near them, and no step that waits for the device."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.training import CPU, noise_images, tiny_preset

from fastddpm.config import Preset
from fastddpm.training.trainer import Trainer

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
STEPS = 3


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """Not TF32, in which PyTorch convolves float32 on a GPU unless it is told otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def preset(**train: object) -> Preset:
    """With channels that every kernel takes, and vectors of 16 bytes."""
    small = tiny_preset(**train)
    return dataclasses.replace(small, unet=dataclasses.replace(small.unet, width=32, groups=8))


def trainer(device: torch.device, **train: object) -> Trainer:
    return Trainer(preset(**train), noise_images(), device)


def losses_and_norms(owner: Trainer) -> np.ndarray:
    return np.array([[float(number) for number in owner.train_step()] for _ in range(STEPS)])


@pytest.mark.parametrize("mode", ["standard", "paper"])
def test_steps_are_those_of_a_cpu(mode: str) -> None:
    """Same images, t, flips, noise and dropout masks; sums in another order, and what Adam makes of the difference."""
    expected, ours = (losses_and_norms(trainer(device, mode=mode)) for device in (CPU, GPU))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(ours, expected, rtol=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_is_near(compiled: bool) -> None:
    torch._dynamo.reset()
    expected = losses_and_norms(trainer(CPU))
    ours = losses_and_norms(trainer(GPU, precision="bf16", compile=compiled))
    np.testing.assert_allclose(ours[:, 0], expected[:, 0], rtol=0.03)
    assert ours[:, 2].all()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_does_not_wait_for_the_device(accumulate: int) -> None:
    owner = trainer(GPU, precision="bf16", accumulate=accumulate)
    for _ in range(2):  # tables, kernels and the optimizer's state are made
        owner.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        owner.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
