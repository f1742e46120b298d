"""conv3x3_fp8: exact products of e4m3 numbers, summed in float32; and how numbers become e4m3."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import contract
from helpers.marks import with_large
from torch import Tensor

from fastddpm.ops import conv3x3_fp8
from fastddpm.ops.conv3x3_fp8 import E4M3, quantised, to_e4m3

# (N, C, K, H, W): several tiles of pixels, images that share a tile, one channel block and part of another, 1x1; of
# sides that are powers of two: part of the images of a tile, several tiles to an image, and blocks of all kinds.
SHAPES = [(2, 32, 16, 12, 10), (5, 16, 48, 3, 5), (3, 16, 16, 1, 1), (1, 16, 16, 1, 40),
          (1, 96, 144, 4, 4), (11, 64, 16, 8, 4), (1, 32, 16, 2, 256), (2, 32, 272, 16, 16)]  # fmt: skip


def arguments(shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    n, c, k, height, width = shape
    weight, scale = quantised(torch.randn(k, c, 3, 3, device=device) * torch.rand(k, 1, 1, 1, device=device))
    x = to_e4m3(2 * torch.randn(n, c, height, width, device=device))
    return {"x": x, "weight": weight, "scale": scale, "bias": torch.randn(k, device=device)}


def expected(a: dict[str, Any], of: Callable[[Tensor], Tensor] = torch.clone) -> np.ndarray:
    """The result in float64 for `of` every input."""
    exact = {name: of(value.cpu().float().double()) for name, value in a.items()}
    out = F.conv2d(exact["x"], exact["weight"], padding=1) * exact["scale"][:, None, None]
    return (out + exact["bias"][:, None, None]).numpy()


@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, implementation: str) -> None:
    """Within one rounding of the output, and of float32 sums of the largest. Triton's interpreter cuts bfloat16 off.

    Ada's and Hopper's matrix units cut a sum to 14 bits each time 32 products are added, at most 27 times here: in a
    model of them that costs up to 2^-11.6 of what is added up.
    """
    a = arguments(shape, device)
    ours, exact = conv3x3_fp8(**a, dtype=dtype), expected(a)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    error = np.abs(contract.float64(ours) - exact)
    rounding = torch.finfo(dtype).eps / (1 if implementation == "triton" else 2)
    sums = 2.0**-10 * expected(a, torch.abs) if keeps_14_bits(device, implementation) else 3e-6 * np.abs(exact).max()
    assert (error <= rounding * np.abs(exact) + sums).all()


def keeps_14_bits(device: torch.device, implementation: str) -> bool:
    matrix_unit = device.type == "cuda" and implementation in ("triton", "auto")
    return matrix_unit and torch.cuda.get_device_capability(device) in ((8, 9), (9, 0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "offset", "transposed"])
def test_layout_of_the_input_changes_nothing(layout: str, device: torch.device) -> None:
    a = arguments((2, 16, 16, 4, 6), device)
    before = conv3x3_fp8(**a)
    # In bytes: 8-bit numbers do few things themselves.
    a["x"] = contract.LAYOUTS[layout](a["x"].view(torch.uint8)).view(E4M3)
    assert torch.equal(conv3x3_fp8(**a), before)


def test_without_a_bias(device: torch.device) -> None:
    a = arguments((1, 16, 16, 4, 4), device)
    a["bias"] = torch.zeros_like(a["bias"])
    zero = conv3x3_fp8(**a)
    a["bias"] = None
    assert torch.equal(conv3x3_fp8(**a), zero)


def test_nan_stays_in_its_neighbourhood(device: torch.device, implementation: str) -> None:
    if implementation == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter reads the NaN of e4m3 as 480")
    a = arguments((2, 16, 16, 8, 8), device)
    values = a["x"].float()
    values[1, 3, 4, 5] = torch.nan
    a["x"] = to_e4m3(values)
    spoilt = conv3x3_fp8(**a).isnan()
    assert spoilt[1, :, 3:6, 4:7].all() and spoilt.sum() == 16 * 9


def test_channels_that_no_kernel_takes(device: torch.device) -> None:
    a = arguments((1, 5, 7, 4, 4), device)
    np.testing.assert_allclose(contract.float64(conv3x3_fp8(**a, dtype=torch.float32)), expected(a), atol=1e-4)


def test_empty_batch(device: torch.device) -> None:
    a = arguments((1, 16, 32, 4, 4), device)
    assert conv3x3_fp8(**(a | {"x": a["x"][:0]})).shape == (0, 32, 4, 4)


def test_is_never_differentiable(device: torch.device) -> None:
    a = arguments((1, 16, 16, 4, 4), device)
    a["bias"].requires_grad_()
    assert not conv3x3_fp8(**a).requires_grad


def test_opcheck(device: torch.device) -> None:
    a = arguments((2, 16, 16, 4, 4), device)
    # Whether an argument was mutated torch cannot compare in 8 bits; here in bytes.
    before = {name: value.clone() for name, value in a.items()}
    contract.opcheck(torch.ops.fastddpm.conv3x3_fp8, (*a.values(), torch.bfloat16), contract.OPCHECKS[1:])
    assert all(torch.equal(a[name].view(torch.uint8), before[name].view(torch.uint8)) for name in a)


@pytest.mark.large
def test_compiles_with_a_dynamic_batch(device: torch.device) -> None:
    """Rounding included."""

    def inputs(n: int) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(n)
        rest = [torch.randn(16, 16, 3, 3, device=device), torch.randn(16, device=device)]
        return [torch.randn(n, 16, 4, 4, device=device)], rest

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv3x3_fp8(to_e4m3(x), *quantised(weight), bias, dtype=torch.float32) * 2

    contract.assert_compiles_for_any_batch(function, inputs, [2, 3, 5])


# Rounding


def test_weights_are_rounded_by_a_sixteenth_at_most() -> None:
    """e4m3 has three bits behind the leading one; the largest of each output channel becomes 448."""
    weight = torch.randn(8, 4, 3, 3) * torch.logspace(-6, 6, 8)[:, None, None, None]
    rounded, scale = quantised(weight)
    again = rounded.float() * scale[:, None, None, None]
    large = weight.abs() > weight.abs().amax((1, 2, 3), keepdim=True) / 448 / 16  # not subnormal
    error = (again - weight).abs() / weight.abs()
    assert 0.04 < error[large].max() <= 1 / 16 + 1e-6
    assert (rounded.float().abs().amax((1, 2, 3)) == 448).all()


def test_zero_weights_stay_zero() -> None:
    rounded, scale = quantised(torch.zeros(2, 4, 3, 3))
    assert not rounded.float().any() and (scale == 1).all()


def test_what_is_too_large_becomes_the_largest() -> None:
    values = to_e4m3(torch.tensor([1e6, -torch.inf, 448.0, 0.0625, torch.nan])).float()
    assert values[:4].tolist() == [448.0, -448.0, 448.0, 0.0625] and values[4].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 16, 4, 4)}, r"x must be torch.float8_e4m3fn \(N, C, H, W\); got torch.float32"),
        (
            {"weight": torch.zeros(16, 16, 3, 3)},
            r"weight must be torch.float8_e4m3fn \(K, 16, 3, 3\); got torch.float32",
        ),
        ({"scale": torch.ones(3)}, r"scale must be floating \(16,\); got torch.float32 \(3,\)"),
        ({"bias": torch.ones(16, dtype=torch.int64)}, r"bias must be floating \(16,\); got torch.int64"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="conv3x3_fp8: " + message):
        conv3x3_fp8(**(arguments((2, 16, 16, 4, 4), torch.device("cpu")) | change))


def test_memory_that_the_copy_engine_does_not_take(device: torch.device, implementation: str) -> None:
    """An image of H W C bytes seen as a batch of one, whose strides are not those of a batch; and odd addresses."""
    a = arguments((1, 32, 16, 4, 8), device)
    expected = conv3x3_fp8(**a)
    rows = a["x"].view(torch.uint8).permute(2, 3, 1, 0).contiguous()  # (H, W, C, 1)
    assert torch.equal(conv3x3_fp8(**a | {"x": rows.permute(3, 2, 0, 1).view(E4M3)}), expected)
    shifted = torch.empty(rows.numel() + 1, dtype=torch.uint8, device=device)[1:].view(rows.shape).copy_(rows)
    assert torch.equal(conv3x3_fp8(**a | {"x": shifted.permute(3, 2, 0, 1).view(E4M3)}), expected)
