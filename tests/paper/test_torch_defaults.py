"""Where somebody has changed torch's default dtype or device, everything on the CPU gives the same bits."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers.networks import TINY, shaken, tiny

import fastddpm
from fastddpm import ops
from fastddpm.kernels.philox import STREAM_FORWARD
from fastddpm.ops.noise import NoiseKey


@contextlib.contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


OTHER = pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float16, "cpu"),
                                                      (torch.float32, "meta")])  # fmt: skip


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@OTHER
@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_sampler(dtype: torch.dtype, device: str, num_classes: int) -> None:
    unet = shaken(fastddpm.UNet(tiny(num_classes=num_classes)))
    x = torch.randn(2, 3, 12, 12)
    label = torch.tensor([2, 0]) if num_classes else None

    def results() -> list[torch.Tensor]:
        sampler = fastddpm.Sampler(unet, fastddpm.Diffusion(), steps=4)
        return [sampler.denoise(x, 700, label), sampler.sample([0, 5])]

    expected = results()
    with defaults(dtype, device):
        found = results()
    assert_same(found, expected)


@OTHER
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_operations(dtype: torch.dtype, device: str, backend: str) -> None:
    channels = 8
    x = torch.randn(2, channels, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.rand(channels, requires_grad=True), torch.rand(channels, requires_grad=True)
    kernel = torch.randn(16, channels, 3, 3, requires_grad=True)
    q = torch.randn(2, 10, 16, requires_grad=True)
    pixels = torch.randint(256, (2, 3, 6, 6), dtype=torch.uint8)
    images, seed, step, t = torch.arange(2), torch.tensor(3), torch.tensor(1), torch.tensor([4, 7])
    table = torch.rand(10, 2)

    def results() -> list[Any]:
        y = ops.group_norm_silu(x, weight, bias, 4, dropout=0.3, images=images, seed=seed, step=step)
        forward = [y, ops.attention(q, q, q), ops.conv3x3(x, kernel, doubled=True)]
        grads = [torch.autograd.grad(out, inputs, torch.ones_like(out))
                 for out, inputs in zip(forward, [(x, weight, bias), (q,), (x, kernel)], strict=True)]  # fmt: skip
        noise = [ops.random_normal((3, 6, 6), images, seed, step, STREAM_FORWARD),
                 *ops.q_sample(pixels, t, table, images, seed, step)]  # fmt: skip
        return [*forward, *(grad for found in grads for grad in found), *noise]

    with ops.use_backend(backend):
        expected = results()
        with defaults(dtype, device):
            found = results()
    assert_same(found, expected)


@OTHER
def test_a_training_step(dtype: torch.dtype, device: str) -> None:
    network = shaken(fastddpm.UNet(TINY))
    x0 = torch.rand(2, 3, 12, 12) * 2 - 1
    key = NoiseKey.draw(2, x0.device)
    diffusion = fastddpm.Diffusion()

    def gradients() -> tuple[torch.Tensor, ...]:
        losses, _ = diffusion.loss(network, x0, key, flip=True)
        return torch.autograd.grad(losses.sum(), list(network.parameters()))

    expected = gradients()
    with defaults(dtype, device):
        found = gradients()
    assert_same(found, expected)
