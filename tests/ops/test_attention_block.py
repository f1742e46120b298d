"""attention_block: an image plus attention over its normalised pixels, in one operation."""

from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from helpers import contract
from helpers.marks import with_large

from fastddpm.ops import attention_block

# (N, C, groups, H, W): whole tiles, several pieces of keys and of rows, borders of channels and pixels.
SHAPES = [(2, 32, 4, 4, 4), (1, 64, 8, 12, 12), (2, 24, 2, 5, 3)]


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, more: bool = True, mean: float = 1.0
) -> dict[str, Any]:
    n, c, groups, height, width = shape

    def real(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(size, device=device)).to(dtype)

    return {
        "x": (real(n, c, height, width) + mean).to(dtype).to(memory_format=torch.channels_last),
        "norm_weight": real(c), "norm_bias": real(c), "groups": groups,
        "query": real(c, c, dtype=dtype, scale=c**-0.5), "query_bias": real(c),
        "value": real(c, c, dtype=dtype, scale=c**-0.5), "value_bias": real(c),
        "residual": real(n, c, height, width, dtype=dtype) if more else None, "added": real(c) if more else None,
    }  # fmt: skip


def in_numpy(a: dict[str, Any]) -> np.ndarray:
    """Return the result in float64, by its definition."""
    e = {name: contract.float64(value) if isinstance(value, torch.Tensor) else value for name, value in a.items()}
    total = e["x"] if e["residual"] is None else e["x"] + e["residual"]
    n, c = total.shape[:2]
    grouped = (total if e["added"] is None else total + e["added"][:, None, None]).reshape(n, e["groups"], -1)
    normed = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-6)
    normed = normed.reshape(n, c, -1) * e["norm_weight"][:, None] + e["norm_bias"][:, None]
    q = e["query"] @ normed + e["query_bias"][:, None]
    weights = scipy.special.softmax(q.transpose(0, 2, 1) @ normed / np.sqrt(c), axis=2)
    out = e["value"] @ (normed @ weights.transpose(0, 2, 1)) + e["value_bias"][:, None]
    return total + out.reshape(total.shape)


@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("more", [False, True], ids=["alone", "residual and bias"])
def test_numbers(
    shape: tuple[int, ...], more: bool, dtype: torch.dtype, device: torch.device, implementation: str
) -> None:
    a = arguments(shape, dtype, device, more=more)
    ours, expected = attention_block(**a), in_numpy(a)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert np.abs(contract.float64(ours) - expected).max() <= tolerance * np.abs(expected).max()


def test_a_mean_that_is_large_beside_the_deviation(device: torch.device, implementation: str) -> None:
    """Keys are not normalised: softmax takes the part of a score that all of its row share."""
    a = arguments(SHAPES[0], torch.float32, device, more=False, mean=20.0)
    ours, expected = attention_block(**a), in_numpy(a)
    assert np.abs(contract.float64(ours) - expected).max() <= 5e-5 * np.abs(expected - 20).max()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 32)}, r"x must be floating \(N, C, H, W\)"),
        ({"groups": 5}, "32 channels cannot be divided into 5 groups"),
        ({"residual": torch.zeros(2, 32, 4, 5)}, r"residual must be torch.float32 \(2, 32, 4, 4\)"),
        ({"query": torch.zeros(32, 31)}, r"query must be torch.float32 \(32, 32\); got torch.float32 \(32, 31\)"),
        ({"value_bias": torch.zeros(31)}, r"value_bias must be floating \(32,\)"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(changed: dict[str, Any], message: str, implementation: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_block(**arguments(SHAPES[0], torch.float32, torch.device("cpu")) | changed)


@pytest.mark.slow
def test_opcheck(implementation: str, device: torch.device) -> None:
    a = arguments(SHAPES[0], torch.float32, device)
    order = ("x", "residual", "norm_weight", "norm_bias", "groups")
    rest = ("added", "query", "query_bias", "value", "value_bias")
    values = (*(a[name] for name in order), 1e-6, *(a[name] for name in rest), 0.2)
    torch.library.opcheck(torch.ops.fastddpm.attention_block.default, values)
