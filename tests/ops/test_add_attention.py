"""add_attention: attention, and an image added to its output before that is rounded."""

from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from helpers import contract
from helpers.marks import with_large

from fastddpm.ops import add_attention

# (N, L, C): one block of rows, several of them, fewer channels than a chunk.
SHAPES = [(2, 16, 32), (1, 72, 16), (1, 5, 8)]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """q and v are parts of one product's output, as the network's are."""
    q, v = torch.randn(*shape[:2], 2 * shape[2], device=device, dtype=dtype).split(shape[2], dim=2)
    k, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    return {"q": q, "k": k, "v": v, "residual": residual}


@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, implementation: str) -> None:
    a = arguments(shape, dtype, device)
    q, k, v, residual = (contract.float64(value) for value in a.values())
    weights = scipy.special.softmax(q @ k.transpose(0, 2, 1) / np.sqrt(shape[2]), axis=2)
    expected = residual + weights @ v
    ours = add_attention(**a)
    assert ours.dtype == dtype and ours.shape == shape
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert np.abs(contract.float64(ours) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", ["k", "residual"])
def test_other_shapes_and_dtypes_are_refused(name: str, implementation: str) -> None:
    a = arguments(SHAPES[0], torch.float32, torch.device("cpu"))
    for wrong in (torch.zeros(2, 16, 31), torch.zeros(2, 16, 32, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"q, k, v, residual must be floating \(N, L, C\), all alike"):
            add_attention(**a | {name: wrong})


@pytest.mark.slow
def test_opcheck(implementation: str, device: torch.device) -> None:
    a = arguments(SHAPES[0], torch.float32, device)
    torch.library.opcheck(torch.ops.fastddpm.add_attention.default, (*a.values(), 0.2))
