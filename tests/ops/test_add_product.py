"""add_product: a matrix product at every pixel of one or two images, added to an image."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import contract
from helpers.marks import with_large
from torch import Tensor

from fastddpm.ops import add_product

# (N, C1, C2, K, H, W): whole tiles, borders of pixels, of both kinds of channels, no skip, one pixel.
SHAPES = [(2, 64, 64, 64, 8, 8), (3, 20, 12, 24, 5, 3), (1, 48, 0, 16, 4, 4), (1, 3, 5, 7, 1, 1)]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    n, c1, c2, k, height, width = shape

    def image(channels: int) -> Tensor:
        return torch.randn(n, channels, height, width, device=device, dtype=dtype)

    return {
        "image": image(k), "x": image(c1), "skip": image(c2).to(memory_format=torch.channels_last) if c2 else None,
        "weight": torch.randn(k, c1 + c2, device=device, dtype=dtype), "bias": torch.randn(k, device=device),
    }  # fmt: skip


def in_numpy(a: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and that of all magnitudes."""
    results = []
    for of in (lambda values: values, np.abs):
        exact = {name: None if value is None else of(contract.float64(value)) for name, value in a.items()}
        inputs = exact["x"] if exact["skip"] is None else np.concatenate([exact["x"], exact["skip"]], 1)
        out = exact["image"] + np.einsum("kc,nchw->nkhw", exact["weight"], inputs)
        results.append(out + exact["bias"][:, None, None])
    return results[0], results[1]


@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, implementation: str) -> None:
    """Within one rounding of the result (Triton's interpreter cuts bfloat16 off), and of float32 sums."""
    a = arguments(shape, dtype, device)
    ours, (exact, magnitude) = add_product(**a), in_numpy(a)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    bound = torch.finfo(dtype).eps * np.abs(exact) + 2e-6 * magnitude
    assert (np.abs(contract.float64(ours) - exact) <= bound).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": torch.zeros(2, 3)}, r"image must be floating \(N, K, H, W\)"),
        ({"x": torch.zeros(2, 64, 8, 7)}, r"x must be torch.float32 \(2, C, 8, 8\); got torch.float32 \(2, 64, 8, 7\)"),
        ({"weight": torch.zeros(64, 127)}, r"weight must be torch.float32 \(64, 128\); got torch.float32 \(64, 127\)"),
        ({"bias": torch.zeros(63)}, r"bias must be floating \(64,\)"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str, implementation: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_product(**arguments(SHAPES[0], torch.float32, torch.device("cpu")) | changed)


@pytest.mark.slow
def test_opcheck(implementation: str, device: torch.device) -> None:
    a = arguments(SHAPES[0], torch.float32, device)
    args = (a["image"].to(memory_format=torch.channels_last), a["x"], a["skip"], a["weight"], a["bias"])
    torch.library.opcheck(torch.ops.fastddpm.add_product.default, args)
