"""inference_norm: group_norm_silu of a sum, the stored sum, and an output in e4m3."""

from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from helpers import contract
from helpers.marks import with_large
from torch import Tensor

from fastddpm.ops import inference_norm
from fastddpm.ops.conv3x3_fp8 import E4M3

# (N, C1, C2, groups, H, W): tiles without borders, a seam between two of them and inside of one, groups of 12 channels
# with the seam in the middle of one, tiles of two and of four such groups, and tiles with borders.
SHAPES = [
    (2, 32, 0, 4, 8, 8), (2, 32, 32, 4, 8, 8), (1, 20, 28, 4, 4, 4), (2, 32, 16, 4, 16, 16), (2, 32, 64, 8, 4, 4),
    (3, 24, 0, 2, 5, 7), (1, 8, 4, 3, 1, 3),
]  # fmt: skip
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def arguments(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> dict[str, Any]:
    n, c1, c2, groups, height, width = shape

    def image(channels: int) -> Tensor:
        made = torch.randn(n, channels, height, width, device=device, dtype=dtype) + 3
        return made.contiguous(memory_format=LAYOUTS[layout])

    row = torch.randn(1, c1 + c2, device=device).expand(n, -1)
    return {
        "x": image(c1), "residual": image(c1), "skip": image(c2) if c2 else None, "groups": groups, "temb": row,
        "weight": torch.randn(c1 + c2, device=device), "bias": torch.randn(c1 + c2, device=device),
    }  # fmt: skip


def in_numpy(a: dict[str, Any], silu: bool = True) -> np.ndarray:
    """The norm in float64."""
    total = contract.float64(a["x"]) + (0 if a["residual"] is None else contract.float64(a["residual"]))
    h = total if a["skip"] is None else np.concatenate([total, contract.float64(a["skip"])], 1)
    h = h + contract.float64(a["temb"])[:, :, None, None]
    groups = h.reshape(len(h), a["groups"], -1)
    normed = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-6)
    weight, bias = (contract.float64(a[name])[:, None, None] for name in ("weight", "bias"))
    y = normed.reshape(h.shape) * weight + bias
    return y * scipy.special.expit(y) if silu else y


@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device, implementation: str
) -> None:
    a = arguments(shape, dtype, layout, device)
    for silu in (True, False):
        y, total = inference_norm(**a, silu=silu)
        expected, rounding = in_numpy(a, silu), torch.finfo(dtype).eps
        # A backend without a fused kernel norms the rounded sum, whose error the norm multiplies by weight / deviation.
        tolerance = 2e-5 if dtype == torch.float32 else 16 * rounding
        assert y.dtype == total.dtype == dtype and y.is_contiguous(memory_format=LAYOUTS[layout])
        assert np.abs(contract.float64(y) - expected).max() <= tolerance * max(1, np.abs(expected).max())
        exact = contract.float64(a["x"]) + contract.float64(a["residual"])
        assert (np.abs(contract.float64(total) - exact) <= rounding * np.abs(exact)).all()


@pytest.mark.parametrize("shape", [SHAPES[0], (1, 8, 0, 2, 40, 40)])
def test_outputs_in_e4m3(shape: tuple[int, ...], device: torch.device, implementation: str) -> None:
    """Half a step of e4m3, 1/16, or 2^-10 near zero; clamped to 448.

    Triton's interpreter cuts digits off, and what it should round up to a power of two it halves: not compared.
    """
    a = arguments(shape, torch.float32, "channels_last", device) | {"residual": None}
    a["weight"] = a["weight"] * 200
    y, total = inference_norm(**a, dtype=E4M3)
    expected = in_numpy(a).clip(-448, 448)
    assert y.dtype == E4M3 and total is a["x"] and np.abs(expected).max() == 448
    found = y.float().cpu().numpy()
    interpreted = implementation == "triton" and device.type == "cpu"
    near = (1 + interpreted) * np.maximum(2.0**-10, np.abs(expected) / 16) + 2e-3
    mantissa = np.frexp(expected)[0]
    compared = np.abs(mantissa) < 0.93 if interpreted else np.full(expected.shape, True)
    assert compared.mean() > 0.8 and (np.abs(found - expected) <= near)[compared].all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual": torch.zeros(2, 32, 8, 7)}, r"residual must be like x, torch.float32 \(2, 32, 8, 8\)"),
        ({"dtype": torch.float16}, "dtype must be that of x, torch.float32, or torch.float8_e4m3fn"),
        ({"weight": torch.zeros(3)}, r"weight must be \(32,\); got \(3,\)"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str, implementation: str) -> None:
    a = arguments(SHAPES[0], torch.float32, "contiguous", torch.device("cpu")) | changed
    with pytest.raises(ValueError, match=message):
        inference_norm(**a)


@pytest.mark.slow
def test_opcheck(implementation: str, device: torch.device) -> None:
    a = arguments(SHAPES[1], torch.float32, "channels_last", device)
    args = (a["x"], a["residual"], a["weight"], a["bias"], a["groups"], 1e-6, a["skip"], a["temb"], None, None, True)
    torch.library.opcheck(torch.ops.fastddpm.inference_norm.default, (*args, torch.float32))
