"""group_norm_silu's dropout: which elements it keeps, how often, and what that depends on."""

import numpy as np
import pytest
import torch
from helpers import contract, oracle
from torch import Tensor

from fastddpm.ops import group_norm_silu

SHAPE = (2, 32, 64, 64)  # 2^18 elements
ROUNDED = 6554 / 65536  # 0.1 in the multiples of 2^-16 that a half word can decide


def factor(
    device: torch.device,
    shape: tuple[int, int, int, int] = SHAPE,
    p: float = 0.1,
    *,
    images: tuple[int, ...] = (0, 1),
    seed: int = 0,
    step: int = 0,
    layer: int = 0,
    layout: str = "contiguous",
) -> Tensor:
    """What dropout multiplies each element by: with weight 0, bias 1 and no SiLU the output is just that."""
    n, c, h, w = shape
    x = contract.LAYOUTS[layout](torch.randn(n, c, h, w, device=device))
    return group_norm_silu(
        x, torch.zeros(c, device=device), torch.ones(c, device=device), 1, silu=False, dropout=p, layer=layer,
        **contract.key_tensors(images, seed, step, device),
    )  # fmt: skip


# Elements that fill no Philox block of 8; more than one block; one element; an odd channel count.
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 32, 8, 8), (2, 1, 1, 1), (2, 6, 3, 1)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_is_that_of_the_philox_stream(shape: tuple[int, int, int, int], p: float, device: torch.device) -> None:
    images, seed, step, layer = (7, 2**32 - 1), -(2**33), 800_000, 21
    ours = factor(device, shape, p, images=images, seed=seed, step=step, layer=layer)
    expected = oracle.dropout_factor(shape, p, np.array(images), seed, step, layer)
    np.testing.assert_allclose(contract.float64(ours), expected, rtol=1e-6)


@pytest.mark.large
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_fraction_and_scale(p: float, device: torch.device) -> None:
    """Zero with probability p, otherwise 1/(1-p), so that the mean is 1; within five standard errors."""
    values = contract.float64(factor(device, p=p))
    num = values.size
    assert abs((values == 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / num) + 2**-17
    kept = np.unique(values[values > 0])
    assert len(kept) == 1 and abs(kept[0] * (1 - p) - 1) < 2e-5
    assert abs(values.mean() - 1) < 5 * np.sqrt(p / (1 - p) / num)


@pytest.mark.large
def test_every_position_is_dropped_alike(device: torch.device) -> None:
    """Fractions by channel, row and column: a counter used twice would show as a stripe."""
    dropped = contract.float64(factor(device)) == 0
    for axes in ((0, 2, 3), (0, 1, 3), (0, 1, 2)):
        fraction = dropped.mean(axes)
        error = np.sqrt(ROUNDED * (1 - ROUNDED) * fraction.size / dropped.size)
        assert np.abs(fraction - ROUNDED).max() < 5 * error


def test_backward_uses_the_forward_mask(device: torch.device) -> None:
    """Each shift reaches one element of a 1x1 image, so its gradient is that element's factor."""
    c = 512
    key = contract.key_tensors([3, 4], 5, 6, device)
    shift = torch.zeros(2, c, device=device, requires_grad=True)
    y = group_norm_silu(
        torch.randn(2, c, 1, 1, device=device), torch.zeros(c, device=device), torch.ones(c, device=device), 1,
        scale=torch.zeros(2, c, device=device), shift=shift, silu=False, dropout=0.3, layer=7, **key,
    )  # fmt: skip
    y.sum().backward()
    expected = oracle.dropout_factor((2, c, 1, 1), 0.3, np.array([3, 4]), 5, 6, 7)[:, :, 0, 0]
    np.testing.assert_allclose(contract.float64(shift.grad), expected, rtol=1e-6)
    np.testing.assert_allclose(contract.float64(y)[:, :, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("layout", [name for name in contract.LAYOUTS if name != "contiguous"])
def test_layout_does_not_change_the_mask(layout: str, device: torch.device) -> None:
    shape = (2, 6, 5, 4)
    assert torch.equal(factor(device, shape, 0.5, layout=layout), factor(device, shape, 0.5))


def test_dtype_does_not_change_the_mask(device: torch.device) -> None:
    zero, one = torch.zeros(8, device=device), torch.ones(8, device=device)
    key = contract.key_tensors([1, 2], 3, 4, device)
    masks = [
        group_norm_silu(
            torch.zeros(2, 8, 6, 6, device=device, dtype=dtype), zero, one, 1, silu=False, dropout=0.5, **key
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    assert all(torch.equal(mask.double(), masks[0].double()) for mask in masks)


@pytest.mark.large
@pytest.mark.parametrize("change", [{"layer": 1}, {"step": 1}, {"seed": 1}, {"images": (2, 3)}])
def test_masks_differ_by_every_part_of_the_key(change: dict, device: torch.device) -> None:
    """Two masks agree where both keep or both drop: p^2 + (1-p)^2 of the elements if independent."""
    base, other = (contract.float64(mask) == 0 for mask in (factor(device), factor(device, **change)))
    agreement = ROUNDED**2 + (1 - ROUNDED) ** 2
    assert abs((base == other).mean() - agreement) < 5 * np.sqrt(agreement * (1 - agreement) / base.size)


def test_an_images_mask_does_not_depend_on_its_batch(device: torch.device) -> None:
    shape = (4, 6, 5, 4)
    together = factor(device, shape, 0.5, images=(8, 3, 5, 2))
    apart = [factor(device, (1, 6, 5, 4), 0.5, images=(image,)) for image in (8, 3, 5, 2)]
    assert torch.equal(together, torch.cat(apart))


def test_skip_is_counted_behind_x(device: torch.device) -> None:
    """The mask belongs to the concatenated channels, whichever input they came from."""
    zero, one = torch.zeros(6, device=device), torch.ones(6, device=device)
    key = contract.key_tensors([1, 2], 3, 4, device)
    x = torch.randn(2, 6, 4, 4, device=device)
    whole = group_norm_silu(x, zero, one, 2, silu=False, dropout=0.5, **key)
    split = group_norm_silu(x[:, :4], zero, one, 2, skip=x[:, 4:], silu=False, dropout=0.5, **key)
    assert torch.equal(whole, split)
    expected = oracle.dropout_factor((2, 6, 4, 4), 0.5, np.array([1, 2]), 3, 4, 0)
    np.testing.assert_allclose(contract.float64(split), expected, rtol=1e-6)
