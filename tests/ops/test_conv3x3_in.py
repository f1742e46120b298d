"""conv3x3_in: the first convolution, of images of few channels as they come."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import contract
from helpers.marks import with_large
from torch import Tensor

from fastddpm.ops import conv3x3_in

# (N, C, H, W), K: several blocks of pixels, of which the last is not full; part of a block of channels; 1x1; no square.
SHAPES = [((2, 3, 7, 9), 24), ((1, 1, 8, 8), 16), ((1, 3, 1, 1), 8), ((3, 7, 4, 6), 144)]


def arguments(shape: tuple[int, ...], outputs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images are float32, of values that `dtype` has: Triton's interpreter cuts off where it should round."""
    weight = torch.randn(outputs, shape[1], 3, 3, device=device) / 3
    return torch.randn(shape, device=device).to(dtype).float(), weight.to(dtype)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_numbers(
    shape: tuple[int, ...], outputs: int, dtype: torch.dtype, mirrored: bool, device: torch.device, implementation: str
) -> None:
    """Within float32 sums and one rounding of the output."""
    x, weight = arguments(shape, outputs, dtype, device)
    exact = x.double().cpu()
    exact = F.conv2d(exact.flip(2, 3) if mirrored else exact, weight.double().cpu(), padding=1).numpy()
    ours = conv3x3_in(x, weight, mirrored=mirrored)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps  # the interpreter cuts off
    assert (np.abs(contract.float64(ours) - exact) <= rounding * np.abs(exact) + 3e-6 * np.abs(exact).max()).all()


@pytest.mark.parametrize("layout", ["channels_last", "strided", "offset", "transposed"])
def test_layout_of_the_input_changes_nothing(layout: str, device: torch.device, implementation: str) -> None:
    x, weight = arguments((2, 3, 4, 6), 16, torch.float32, device)
    expected = conv3x3_in(x, weight)
    ours = conv3x3_in(contract.LAYOUTS[layout](x), contract.LAYOUTS[layout](weight))
    np.testing.assert_allclose(contract.float64(ours), contract.float64(expected), rtol=0, atol=1e-6)


def test_the_image_is_rounded_to_the_dtype_of_the_weights() -> None:
    x, weight = torch.full((1, 3, 4, 4), 1 + 2**-8), torch.ones(8, 3, 3, 3).bfloat16()
    assert torch.equal(conv3x3_in(x, weight), conv3x3_in(x.bfloat16(), weight))


def test_no_images() -> None:
    out = conv3x3_in(torch.zeros(0, 3, 4, 4), torch.zeros(8, 3, 3, 3))
    assert out.shape == (0, 8, 4, 4)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must be floating \(N, C, H, W\)"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "got torch.uint8"),
        ({"weight": torch.zeros(8, 4, 3, 3)}, r"weight must be floating \(K, 3, 3, 3\); got torch.float32 \(8, 4"),
        ({"weight": torch.zeros(8, 3, 3, 3, dtype=torch.int8)}, "got torch.int8"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        conv3x3_in(**{"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(8, 3, 3, 3)} | changed)


@pytest.mark.slow
def test_opcheck(implementation: str, device: torch.device) -> None:
    x, weight = arguments((2, 3, 4, 4), 8, torch.float32, device)
    torch.library.opcheck(torch.ops.fastddpm.conv3x3_in.default, (x, weight, True))
