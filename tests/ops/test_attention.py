"""attention: softmax(q k^T / sqrt(C)) v with one head, forward and backward."""

import numpy as np
import pytest
import torch
from helpers import contract, oracle
from helpers.attention_cases import SHAPES, expected_gradients, inputs, low_precision
from helpers.marks import slow, with_large
from torch import Tensor

from fastddpm.ops import attention


@pytest.mark.parametrize("name", with_large(SHAPES, "cifar 16x16"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers(name: str, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = inputs(SHAPES[name], dtype, device)
    out = attention(q, k, v)
    assert out.dtype == dtype and out.is_contiguous()
    expected = oracle.attention(*map(contract.float64, (q, k, v)))
    tolerance = 1e-13 if dtype == torch.float64 else 5e-6  # a GPU's matrix unit cuts sums off where it should round
    np.testing.assert_allclose(contract.float64(out), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", with_large(SHAPES, "cifar 16x16", "256x256 model, middle 8x8", "wide"))
def test_gradient_numbers(name: str, device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(SHAPES[name], torch.float32, device))
    out = attention(q, k, v)
    grad = torch.randn_like(out)
    out.backward(grad)
    for x, expected in zip((q, k, v), expected_gradients(*map(contract.float64, (q, k, v, grad))), strict=True):
        np.testing.assert_allclose(
            contract.float64(x.grad), expected, rtol=0, atol=5e-6 * max(np.abs(expected).max(), 1)
        )


@pytest.mark.parametrize(
    "name",
    with_large(
        ["cifar 16x16", "256x256 model, middle 8x8", "odd tokens and channels, no multiple of a tile"],
        "cifar 16x16",
        "256x256 model, middle 8x8",
    ),
)
@pytest.mark.parametrize("dtype", contract.LOW_PRECISION)
def test_low_precision_error_is_that_of_its_inputs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Outputs and gradients, against float64 on the rounded inputs."""
    q, k, v = (x.requires_grad_() for x in inputs(SHAPES[name], dtype, device))
    ours, low = attention(q, k, v), low_precision(q, k, v)
    grad = torch.randn_like(ours)
    exact = tuple(map(contract.float64, (q, k, v)))
    assert ours.dtype == dtype
    contract.assert_within_twice_the_error_of(low, ours, oracle.attention(*exact))
    ours_grads, low_grads = (torch.autograd.grad(out, (q, k, v), grad) for out in (ours, low))
    expected = expected_gradients(*exact, contract.float64(grad))
    for low_grad, our_grad, expected_grad in zip(low_grads, ours_grads, expected, strict=True):
        contract.assert_within_twice_the_error_of(low_grad, our_grad, expected_grad)


@pytest.mark.parametrize("name", with_large(SHAPES, "cifar 16x16"))
def test_factors_in_bf16(name: str, device: torch.device) -> None:
    """Output and gradients stay float32; their errors are those of two factors of 8 bits."""
    q, k, v = (x.requires_grad_() for x in inputs(SHAPES[name], torch.float32, device))
    out = attention(q, k, v, bf16=True)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    exact = tuple(map(contract.float64, (q, k, v)))
    expected = (oracle.attention(*exact), *expected_gradients(*exact, contract.float64(grad)))
    scale = max(np.linalg.norm(right) for right in expected[1:])  # with one token, scores have no gradient
    for ours, right in zip((out, *gradients), expected, strict=True):
        assert ours.dtype == torch.float32
        error = np.linalg.norm(contract.float64(ours) - right)
        assert error <= 9e-3 * max(np.linalg.norm(right), 1e-2 * scale)
    if name != "one token":
        assert np.linalg.norm(contract.float64(out) - expected[0]) >= 1e-4 * np.linalg.norm(expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_beyond_exp(dtype: torch.dtype, device: torch.device) -> None:
    """Scores of some hundreds overflow exp in float32 unless the row's maximum is taken off first."""
    q, k, v = (x.requires_grad_() for x in inputs((2, 16, 64), dtype, device, sharpness=200.0))
    out = attention(q, k, v)
    out.sum().backward()
    exact = tuple(map(contract.float64, (q, k, v)))
    assert np.abs(np.einsum("nic,njc->nij", *exact[:2])).max() / 8 > 300
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(contract.float64(out), oracle.attention(*exact), atol=tolerance)
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_equal_scores_average_the_values(device: torch.device) -> None:
    q, k, v = (
        torch.zeros(1, 7, 4, device=device),
        torch.randn(1, 7, 4, device=device),
        torch.randn(1, 7, 4, device=device),
    )
    out = attention(q, k, v)
    np.testing.assert_allclose(
        contract.float64(out), np.repeat(contract.float64(v).mean(1, keepdims=True), 7, 1), atol=1e-6
    )


def test_scale(device: torch.device) -> None:
    q, k, v = inputs((2, 9, 16), torch.float32, device)
    out = attention(q, k, v, scale=0.7)
    expected = oracle.attention(*map(contract.float64, (q, k, v)), scale=0.7)
    np.testing.assert_allclose(contract.float64(out), expected, atol=1e-5)
    assert not torch.allclose(out, attention(q, k, v), atol=1e-2)


def test_strides_of_the_inputs_change_nothing(device: torch.device) -> None:
    """q, k, v as views of one fused projection, and as (N, C, L) maps seen as (N, L, C)."""
    q, k, v = inputs((2, 12, 8), torch.float32, device)
    expected = oracle.attention(*map(contract.float64, (q, k, v)))
    fused = torch.cat([q, k, v], dim=-1).split(8, dim=-1)
    maps = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    shared = attention(q, k[:1].expand(2, -1, -1), v)
    for views in (fused, maps):
        np.testing.assert_allclose(contract.float64(attention(*views)), expected, atol=2e-6)
    expected = oracle.attention(contract.float64(q), contract.float64(k[:1]).repeat(2, 0), contract.float64(v))
    np.testing.assert_allclose(contract.float64(shared), expected, atol=2e-6)


def test_expanded_gradient(device: torch.device) -> None:
    """sum() sends back a gradient of stride 0."""
    q, k, v = (x.requires_grad_() for x in inputs((2, 12, 8), torch.float32, device))
    attention(q, k, v).sum().backward()
    exact = tuple(map(contract.float64, (q, k, v)))
    for x, expected in zip((q, k, v), expected_gradients(*exact, np.ones((2, 12, 8))), strict=True):
        np.testing.assert_allclose(contract.float64(x.grad), expected, atol=5e-6)


def test_gradcheck(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in inputs((2, 5, 3), torch.float64, device))
    assert torch.autograd.gradcheck(attention, (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, 0.3), (q, k, v))


def test_backward_is_deterministic(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in inputs((2, 64, 32), torch.float32, device))
    runs = [torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_stays_where_it_belongs(device: torch.device) -> None:
    """A NaN query spoils its own row; a NaN image no other image."""
    q, k, v = inputs((2, 6, 4), torch.float32, device)
    q[0, 3] = torch.nan
    spoilt = torch.isnan(attention(q, k, v)).any(-1)
    assert spoilt.sum() == 1 and spoilt[0, 3]


def test_empty_batch(device: torch.device) -> None:
    q, k, v = (torch.zeros(0, 5, 4, device=device, requires_grad=True) for _ in range(3))
    out = attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 5, 4)


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [slow("contiguous"), "fused"])
def test_opcheck(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    q, k, v = inputs((2, 6, 4), dtype, device)
    if layout == "fused":
        q, k, v = torch.cat([q, k, v], dim=-1).split(4, dim=-1)
    grad, scale = torch.randn_like(q), 0.5
    _, lse = torch.ops.fastddpm.attention(q, k, v, scale, False)
    contract.opcheck(torch.ops.fastddpm.attention_backward, (grad, q, k, v, lse, scale, False))
    contract.opcheck(torch.ops.fastddpm.attention, (*(x.detach().requires_grad_() for x in (q, k, v)), scale, False))
    if dtype == torch.float32:
        contract.opcheck(torch.ops.fastddpm.attention_backward, (grad, q, k, v, lse, scale, True))


@pytest.mark.large
def test_compiles_with_a_dynamic_batch(device: torch.device) -> None:
    def arguments(n: int) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(n)
        return [x.requires_grad_() for x in inputs((n, 6, 4), torch.float32, device)], []

    contract.assert_compiles_for_any_batch(lambda q, k, v: attention(q, k, v) + q, arguments, [2, 3, 5])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5), (2, 5), (2, 5)), r"q, k, v must be \(N, L, C\), all alike; got \(2, 5\), \(2, 5\), \(2, 5\)"),
        (((2, 5, 4), (2, 6, 4), (2, 5, 4)), r"all alike; got \(2, 5, 4\), \(2, 6, 4\), \(2, 5, 4\)"),
        (((2, 5, 4), (2, 5, 4), (1, 5, 4)), r"all alike; got \(2, 5, 4\), \(2, 5, 4\), \(1, 5, 4\)"),
    ],
)
def test_refuses_shapes(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match="attention: .*" + message):
        attention(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((torch.float32, torch.bfloat16, torch.float32), "got torch.float32, torch.bfloat16, torch.float32"),
        ((torch.int64, torch.int64, torch.int64), "one floating dtype; got torch.int64, torch.int64, torch.int64"),
    ],
)
def test_refuses_dtypes(dtypes: tuple[torch.dtype, ...], message: str) -> None:
    with pytest.raises(ValueError, match="attention: .*" + message):
        attention(*(torch.zeros(2, 5, 4, dtype=dtype) for dtype in dtypes))
