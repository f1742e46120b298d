"""The Triton kernels at shapes that nobody chose, each way that an image can be taken apart."""

import numpy as np
import pytest
import torch
from helpers import contract, oracle
from helpers.attention_cases import expected_gradients as attention_gradients
from helpers.attention_cases import inputs as attention_inputs
from helpers.attention_cases import low_precision as plain_attention
from helpers.group_norm_silu_cases import (
    CASES,
    Case,
    expected_gradients,
    expected_output,
    gradients,
    low_precision,
    require_grad,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastddpm.ops import attention

pytestmark = pytest.mark.slow

WAYS = {"whole": 0, "loop": 1, "split in three": 3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOW = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def only_triton(implementation: str) -> None:
    if implementation != "triton":
        pytest.skip("the Triton kernels alone")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any channels per group, 12 and 3 among them; images not square; a seam anywhere; eight values to a group."""
    groups = draw(st.sampled_from([1, 2, 3, 8]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 5, 12]))
    behind = draw(st.integers(0, channels - 1))
    options = draw(st.lists(st.sampled_from(["temb", "affine", "linear"]), unique=True))
    height = draw(st.integers(1, 7))
    size = height, draw(st.integers(-(-8 * groups // (channels * height)), 9))
    return Case(draw(st.integers(1, 3)), channels - behind, size, groups, behind, tuple(options))


def take_apart(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Small tiles, so that small images have several."""
    from fastddpm.kernels.group_norm_silu import tiles

    def choose(n: int, pixels: int, groups: int, cpg: int, *rest: object) -> tiles.Tile:
        together = min(2, groups)
        block_c = tiles.next_power_of_2(together * cpg)
        block_p = tiles.next_power_of_2(pixels) if way == "whole" else 4
        chunks = min(WAYS[way], -(-pixels // block_p))
        return tiles.Tile(block_p, block_c, together, 1, chunks)

    monkeypatch.setattr(tiles, "choose", choose)


@pytest.mark.parametrize("way", WAYS)
@given(case=cases(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(["contiguous", "channels_last", "strided"]))
@SLOW
def test_group_norm_silu(
    way: str, monkeypatch: pytest.MonkeyPatch, device: torch.device, case: Case, dtype: torch.dtype, layout: str
) -> None:
    """Output and gradients have at most twice the error of the plain operations in the same dtype."""
    take_apart(monkeypatch, way)
    check(case, dtype, layout, device)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["seam, all options", "non-square", "one group"])
def test_every_way_of_every_case(way: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    take_apart(monkeypatch, way)
    check(CASES[name], torch.float32, "channels_last", device)


def check(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    torch.manual_seed(0)
    tensors = case.inputs(dtype, device)
    for image in {"x", "skip"} & set(tensors):
        tensors[image] = contract.LAYOUTS[layout](tensors[image])
    tensors = require_grad(tensors)
    ours, low = case.call(tensors), low_precision(case, tensors)
    grad = torch.randn_like(ours)
    within(low, ours, expected_output(case, tensors))
    expected = expected_gradients(case, tensors, grad)
    ours_gradients, low_gradients = (gradients(y, tensors, grad) for y in (ours, low))
    for name, reference in expected.items():
        within(low_gradients[name], ours_gradients[name], reference)


def within(low: torch.Tensor, ours: torch.Tensor, expected: np.ndarray) -> None:
    """The contract; in float32, where a few values may come out exact by luck and a GPU's matrix unit cuts off where it
    should round, some roundings of the largest."""
    if ours.dtype == torch.float32:
        np.testing.assert_allclose(contract.float64(ours), expected, rtol=0, atol=5e-6 * max(1, np.abs(expected).max()))
    else:
        contract.assert_within_twice_the_error_of(low, ours, expected)


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 80)), dtype=st.sampled_from(DTYPES))
@SLOW
def test_attention(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in attention_inputs(shape, dtype, device))
    ours, low = attention(q, k, v), plain_attention(q, k, v)
    grad = torch.randn_like(ours)
    exact = tuple(map(contract.float64, (q, k, v)))
    within(low, ours, oracle.attention(*exact))
    ours_gradients, low_gradients = (torch.autograd.grad(out, (q, k, v), grad) for out in (ours, low))
    expected = attention_gradients(*exact, contract.float64(grad))
    for low_gradient, gradient, reference in zip(low_gradients, ours_gradients, expected, strict=True):
        within(low_gradient, gradient, reference)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_on_every_run(way: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    take_apart(monkeypatch, way)
    case = CASES["seam, all options"]
    tensors = require_grad(case.inputs(torch.float32, device))
    grad = torch.randn(2, 24, 4, 4, device=device)
    first, second = (gradients(case.call(tensors), tensors, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokens_too_far_apart_for_the_kernels_numbers_are_brought_together() -> None:
    """They count what an image spans in 32 bits; (L, N, C) seen as (N, L, C) may span more."""
    from fastddpm.kernels.attention.triton import _rows_of_channels

    near, far = (torch.empty_strided((2, 256, 64), (64, apart, 1), device="meta") for apart in (2**22, 2**23))
    assert _rows_of_channels(near) is near and _rows_of_channels(far).is_contiguous()
