"""channel_sums: the sums of channels over all pixels, and the linear layer whose bias gets its gradient by them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import contract
from helpers.marks import with_large
from torch import Tensor

from fastddpm.ops import channel_sums
from fastddpm.ops.channel_sums import linear, linears

# (N, C, H, W): one part, several parts with an incomplete one, a border of channels, one pixel.
SHAPES = [(2, 64, 8, 8), (3, 24, 17, 19), (2, 72, 13, 11), (1, 3, 1, 1)]


@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, implementation: str) -> None:
    x = torch.randn(shape, device=device, dtype=dtype)
    ours, exact = channel_sums(x), contract.float64(x)
    assert ours.dtype == torch.float32
    error = np.abs(contract.float64(ours) - exact.sum((0, 2, 3)))
    assert (error <= 1e-6 * np.abs(exact).sum((0, 2, 3))).all()
    assert torch.equal(channel_sums(x), ours)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
def test_layouts(layout: str, device: torch.device, implementation: str) -> None:
    x = torch.randn(2, 24, 4, 6, device=device)
    torch.testing.assert_close(channel_sums(contract.LAYOUTS[layout](x)), x.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_float64_and_no_images(device: torch.device, implementation: str) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device)
    torch.testing.assert_close(channel_sums(x), x.sum((0, 2, 3)))
    assert torch.equal(channel_sums(torch.zeros(0, 3, 4, 4, device=device)), torch.zeros(3, device=device))


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(2, 3, 4, 4, dtype=torch.int64)])
def test_wrong_arguments_are_refused(x: Tensor, implementation: str) -> None:
    with pytest.raises(ValueError, match=r"channel_sums: x must be floating \(N, C, H, W\)"):
        channel_sums(x)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_gradient_of_a_linear_layer(shape: tuple[int, ...], device: torch.device, implementation: str) -> None:
    """In float32, also where the layer's are bfloat16."""
    x, weight = (torch.randn(size, device=device, requires_grad=True) for size in (shape, (4, 6)))
    bias = torch.randn(4, device=device, requires_grad=True)
    grad = torch.randn(*shape[:-1], 4, device=device)
    found = []
    for layer in (linear, F.linear):
        out = layer(x, weight, bias)
        found.append([out, *torch.autograd.grad(out, (x, weight, bias), grad)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        out = linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    (found_bias,) = torch.autograd.grad(out, bias, grad.bfloat16())
    exact = grad.bfloat16().double().flatten(0, -2).sum(0)
    torch.testing.assert_close(found_bias, exact.float(), rtol=1e-6, atol=1e-6)


def test_a_second_derivative_and_a_transform_of_a_linear_layer(device: torch.device) -> None:
    x, weight, bias = (
        torch.randn(size, dtype=torch.float64, device=device, requires_grad=True) for size in ((3, 2), (4, 2), (4,))
    )

    def energy(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (linear(x, weight, bias) ** 3).sum()

    assert torch.autograd.gradgradcheck(energy, (x, weight, bias))
    ours = torch.func.grad(energy, argnums=2)(x, weight, bias)
    torch.testing.assert_close(ours, (3 * F.linear(x, weight, bias) ** 2).sum(0))


def layers(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = torch.randn(2, 5, 6, dtype=dtype, device=device, requires_grad=True)
    weights = [torch.randn(4, 6, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    return x, weights, [torch.randn(4, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_of_one_input(autocast: bool, device: torch.device, implementation: str) -> None:
    """Numbers and gradients of each layer by itself, in bfloat16 up to its rounding."""
    x, weights, biases = layers(torch.float32, device)
    found = []
    for together in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            given = x.bfloat16() if autocast else x
            if together:
                outs = linears(given, weights, biases)
            else:
                outs = [linear(given, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        loss = sum((i + 1) * out.float().square().sum() for i, out in enumerate(outs))
        found.append([*outs, *torch.autograd.grad(loss, [x, *weights, *biases])])  # type: ignore[arg-type]
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=10 * tolerance)


def test_a_second_derivative_and_a_transform_of_layers_of_one_input(device: torch.device) -> None:
    x, weights, biases = layers(torch.float64, device)

    def energy(x: Tensor, *parameters: Tensor) -> Tensor:
        q, k, v = linears(x, parameters[:3], parameters[3:])
        return (q * k * v).sum()

    assert torch.autograd.gradgradcheck(energy, (x, *weights, *biases))
    ours = torch.func.grad(energy)(x, *weights, *biases)
    torch.testing.assert_close(ours, torch.autograd.grad(energy(x, *weights, *biases), x)[0])


@pytest.mark.slow
def test_opcheck(implementation: str, device: torch.device) -> None:
    torch.library.opcheck(torch.ops.fastddpm.channel_sums.default, (torch.randn(2, 8, 4, 4, device=device),))
