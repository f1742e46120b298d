"""The library's attention behind ours: on the CPU, whose operator has the interface of those for GPUs."""

import numpy as np
import pytest
import torch
from helpers import contract, oracle
from helpers.attention_cases import expected_gradients, inputs, low_precision
from helpers.triton_ladder import forget_choices

from fastddpm.kernels.attention import Arguments, sdpa
from fastddpm.ops import attention, backend


@pytest.mark.parametrize("shape", [(2, 300, 64), (1, 1024, 32), (3, 16, 256)])
def test_numbers(shape: tuple[int, int, int]) -> None:
    """Output, log-sum-exp and gradients, against float64."""
    q, k, v, grad = (torch.randn(shape) for _ in range(4))
    scale = 1.5 * shape[2] ** -0.5
    assert sdpa.unsupported(q=q, k=k, v=v, scale=scale) is None
    arguments = Arguments(q, k, v, scale)
    out, lse = sdpa.forward(arguments)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].transpose(1, 2) * scale
    expected = torch.softmax(scores, -1) @ exact[2]
    np.testing.assert_allclose(contract.float64(out), contract.float64(expected), atol=3e-6)
    np.testing.assert_allclose(contract.float64(lse), contract.float64(torch.logsumexp(scores, -1)), atol=1e-5)
    assert out.shape == shape and out.is_contiguous() and lse.shape == shape[:2]
    expected.backward(grad.double())
    for ours, x in zip(sdpa.backward(arguments, grad, lse), exact, strict=True):
        assert ours.is_contiguous()
        np.testing.assert_allclose(contract.float64(ours), contract.float64(x.grad), atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 512])
def test_numbers_on_a_gpu(channels: int, dtype: torch.dtype) -> None:
    """Its flash kernels, and the efficient ones for float32 and for more channels; rows that fill no block."""
    device, shape = torch.device("cuda"), (2, 300, channels)
    q, k, v = (x.requires_grad_() for x in inputs(shape, dtype, device))
    grad = torch.randn(shape, device=device).to(dtype)
    scale = channels**-0.5
    assert sdpa.unsupported(q=q, k=k, v=v, scale=scale) is None
    with torch.no_grad():
        out, lse = sdpa.forward(Arguments(q, k, v, scale))
        ours = [out, *sdpa.backward(Arguments(q, k, v, scale), grad, lse)]
    plain = low_precision(q, k, v)
    low = [plain.detach(), *torch.autograd.grad(plain, (q, k, v), grad)]
    exact = tuple(map(contract.float64, (q, k, v)))
    expected = [oracle.attention(*exact), *expected_gradients(*exact, contract.float64(grad))]
    for result, plain_result, reference in zip(ours, low, expected, strict=True):
        assert result.dtype == dtype and result.shape == shape and result.is_contiguous()
        if dtype == torch.float32:
            np.testing.assert_allclose(contract.float64(result), reference, atol=1e-5 * max(1, np.abs(reference).max()))
        else:
            contract.assert_within_twice_the_error_of(plain_result, result, reference)
    assert lse.dtype == torch.float32 and lse.shape == shape[:2]
    scores = np.einsum("nic,njc->nij", *exact[:2]) * scale
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    np.testing.assert_allclose(contract.float64(lse), np.log(np.exp(scores).sum(-1)), atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 4, 8), torch.float64, "takes float32, bfloat16 and float16, not float64"),
        ((1, 4, 6), torch.float32, "takes multiples of 4 channels, not 6"),
        ((1, 4, 4), torch.bfloat16, "takes multiples of 8 channels, not 4"),
        ((0, 4, 8), torch.float32, "takes no empty tensors"),
    ],
)
def test_leaves_to_the_reference(shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    q = torch.zeros(shape, dtype=dtype)
    assert reason in str(sdpa.unsupported(q=q, k=q, v=q, scale=1.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")
def test_a_long_sequence_goes_past_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ladder of a GPU: Triton up to 256 tokens, then this, then the reference."""
    pytest.importorskip("triton")
    monkeypatch.setitem(backend.LADDERS, "cpu", backend.LADDERS["cuda"])
    forget_choices()

    def chosen(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> str:
        q = torch.zeros(1, tokens, channels, dtype=dtype)
        module = backend.implementation("attention", "cpu", {"q": q, "k": q, "v": q, "scale": 1.0})
        return module.__name__.rpartition(".")[2]

    assert [chosen(256, 512), chosen(257, 512), chosen(16, 1032), chosen(257, 6)] == [
        "triton", "sdpa", "sdpa", "reference"
    ]  # fmt: skip
    assert chosen(16, 32, torch.float64) == "reference"
    q, k, v = (torch.randn(1, 300, 16) for _ in range(3))
    expected = oracle.attention(*map(contract.float64, (q, k, v)))
    np.testing.assert_allclose(contract.float64(attention(q, k, v)), expected, atol=3e-6)
    assert "up to 256 tokens and 1024 channels" in backend.status("cpu")["attention"]
    monkeypatch.undo()
    forget_choices()
