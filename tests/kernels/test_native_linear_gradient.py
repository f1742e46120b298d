"""The compiled library's gradient of a linear layer's weights, with factors in bfloat16, call by call."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from helpers.gradient_calls import GuardedGradient

from fastddpm.kernels import interface, native
from fastddpm.kernels.interface import BFLOAT16, FLOAT32, PATCHES

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("instruction_set"),
]


@dataclass(frozen=True)
class Case:
    """One call, of n x height x width pixels."""

    n: int
    height: int
    width: int
    c: int
    k: int
    bias: bool = True
    layout: str = "rows"

    def weight_stride(self) -> tuple[int, int]:
        return {"rows": (self.c, 1), "columns": (1, self.k), "apart": (3 * self.c + 5, 2)}[self.layout]


CASES = {
    "an attention block's": Case(2, 1, 256, 64, 64),
    "no multiple of anything": Case(3, 7, 11, 38, 50),
    "blocks of pixels": Case(1, 67, 73, 34, 18),
    "a last chunk of one pixel": Case(1, 1, 2 * 128 + 1, 16, 16),
    "one pixel": Case(1, 1, 1, 2, 2),
    "fewer columns than a vector": Case(2, 3, 5, 6, 34, bias=False),
    "columns adjacent": Case(2, 4, 4, 48, 40, layout="columns"),
    "weights that lie apart": Case(2, 5, 9, 24, 20, layout="apart"),
    "many output channels": Case(1, 8, 8, 32, 150),
    "parts of the output channels": Case(1, 9, 40, 290, 900),
    "many groups": Case(5, 64, 100, 24, 40),
}


class Call(GuardedGradient):
    """The structure of a case with random tensors."""

    def __init__(self, case: Case, *, threads: int = 2) -> None:
        stride = case.weight_stride()
        super().__init__((case.k, case.c), stride, case.bias, threads)
        self.x = torch.randn(case.n, case.height, case.width, case.c)
        self.grad = torch.randn(case.n, case.height, case.width, case.k)
        self.prepare(interface.Conv(
            x=native.pointer(self.x), n=case.n, height=case.height, width=case.width, c1=case.c, k=case.k,
            x_stride=(ctypes.c_int64 * 4)(*self.x.stride()), weight_stride=(ctypes.c_int64 * 4)(*stride), kernel=1,
            stride=1, algorithm=PATCHES, precision=BFLOAT16, grad=native.pointer(self.grad),
        ))  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str) -> None:
    """Of rounded factors all products are exact, and their sums are those of float32; the bias has no products."""
    call = Call(CASES[name])
    assert call.run() == 0
    rows, grads = call.x.flatten(0, 2), call.grad.flatten(0, 2)
    expected = grads.bfloat16().double().T @ rows.bfloat16().double()
    assert (call.grad_weight.double() - expected).norm() <= 1e-6 * expected.norm()
    if call.grad_bias is not None:
        bias = grads.double().sum(0)
        torch.testing.assert_close(
            call.grad_bias.double(), bias, rtol=1e-6, atol=1e-6 * float(grads.abs().sum(0).max())
        )


@pytest.mark.parametrize(
    "name", ["blocks of pixels", "no multiple of anything", "parts of the output channels", "many groups"]
)
def test_the_same_bits_with_any_number_of_threads(name: str) -> None:
    results = []
    for threads in (1, 2, 3, 8):
        torch.manual_seed(0)
        call = Call(CASES[name], threads=threads)
        assert call.run() == 0 and call.grad_bias is not None
        results.append((call.grad_weight, call.grad_bias))
    assert all(torch.equal(weight, results[0][0]) and torch.equal(bias, results[0][1]) for weight, bias in results)


def test_no_pixels_give_zeros() -> None:
    call = Call(Case(0, 4, 4, 20, 70))
    assert call.run() == 0 and call.grad_bias is not None
    assert (call.grad_weight == 0).all() and (call.grad_bias == 0).all()


def test_too_small_a_workspace_is_refused() -> None:
    call = Call(CASES["blocks of pixels"])
    call.args.workspace_bytes -= 1
    assert call.run() == -2
    assert torch.isnan(call.memory).all()


@pytest.mark.parametrize("change", [{"precision": FLOAT32}, {"kernel": 3}, {"stride": 2}, {"doubled": 1}])
def test_what_there_is_no_algorithm_for_is_refused(change: dict[str, int]) -> None:
    call = Call(CASES["no multiple of anything"])
    for name, value in change.items():
        setattr(call.args, name, value)
    assert call.run() == -1
    assert torch.isnan(call.memory).all()
