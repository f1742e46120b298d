"""The compiled library's gradient of a convolution's weights, call by call."""

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from helpers.gradient_calls import GuardedGradient
from torch import Tensor

from fastddpm.kernels import interface, native
from fastddpm.kernels.interface import BFLOAT16, FLOAT32, PATCHES, WINOGRAD_2X2, WINOGRAD_2X4, WINOGRAD_4X4

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("instruction_set"),
]
BF16 = {"algorithm": WINOGRAD_2X4, "precision": BFLOAT16}
CORES: tuple[Literal["near", "far"], ...] = ("near", "far")


@pytest.fixture(autouse=True)
def cores_as_measured() -> Iterator[None]:
    """After each test."""
    yield
    native.cores_are_far("measured")


@dataclass(frozen=True)
class Case:
    """One call; sizes are of x, before any doubling."""

    n: int
    c1: int
    k: int
    size: tuple[int, int]
    c2: int = 0
    doubled: bool = False
    affine: bool = False
    bias: bool = True
    layout: str = "channels_last"
    algorithm: int = WINOGRAD_4X4
    precision: int = FLOAT32

    def weight_stride(self) -> tuple[int, int, int, int]:
        channels = self.c1 + self.c2
        return {
            "channels_last": (9 * channels, 1, 3 * channels, channels),
            "contiguous": (9 * channels, 9, 3, 1),
            "apart": (30 * channels + 7, 2, 10 * channels, 3 * channels),
        }[self.layout]


CASES = {
    "a residual block's": Case(2, 64, 64, (16, 16)),
    "weights in NCHW": Case(2, 40, 36, (8, 8), layout="contiguous"),
    "weights that lie apart": Case(2, 24, 20, (8, 8), layout="apart"),
    "no multiple of anything": Case(3, 37, 51, (7, 13)),
    "doubled": Case(2, 33, 48, (3, 5), doubled=True),
    "one tile": Case(1, 32, 32, (4, 4)),
    "one pixel": Case(3, 16, 16, (1, 1)),
    "one channel to one": Case(2, 1, 1, (6, 6)),
    "more output channels than a task": Case(1, 16, 150, (8, 8), bias=False),
    "several blocks of tiles": Case(3, 17, 20, (40, 36)),
    "strips of an image": Case(1, 16, 70, (52, 44), layout="contiguous"),
    "two inputs and what stands before": Case(2, 21, 40, (6, 10), c2=13, affine=True),
    # By the channels and tiles a thread works on its own, or not.
    "groups of many blocks": Case(9, 24, 20, (32, 32)),
    "sections of the output channels": Case(2, 150, 330, (6, 8)),
    "sections of the input channels": Case(2, 384, 70, (6, 8)),
    "blocks, sections of the output channels": Case(3, 100, 250, (25, 18)),
}
DIVISIONS = [
    "no multiple of anything", "several blocks of tiles", "strips of an image", "groups of many blocks",
    "sections of the output channels", "sections of the input channels", "blocks, sections of the output channels",
]  # fmt: skip


class Call(GuardedGradient):
    """The structure of a case with random tensors, and the gradients to expect in float64."""

    def __init__(self, case: Case, *, threads: int = 2, mean: float = 0.0) -> None:
        channels, (height, width), factor = case.c1 + case.c2, case.size, 2 if case.doubled else 1
        super().__init__((case.k, channels, 3, 3), case.weight_stride(), case.bias, threads)
        self.case = case
        self.x = torch.randn(case.n, height, width, case.c1) + mean
        self.skip = torch.randn(case.n, height, width, case.c2) if case.c2 else None
        self.gain, self.offset = (torch.randn(case.n, channels) if case.affine else None for _ in range(2))
        self.grad = torch.randn(case.n, factor * height, factor * width, case.k) + mean
        self.prepare(self.arguments())

    def arguments(self) -> interface.Conv:
        case, pointer = self.case, native.pointer
        return interface.Conv(
            x=pointer(self.x), skip=pointer(self.skip), gain=pointer(self.gain), offset=pointer(self.offset),
            n=case.n, height=case.size[0], width=case.size[1], c1=case.c1, c2=case.c2, k=case.k,
            x_stride=(ctypes.c_int64 * 4)(*self.x.stride()),
            weight_stride=(ctypes.c_int64 * 4)(*self.grad_weight.stride()), kernel=3, stride=1, pad=1,
            doubled=case.doubled, silu=case.affine, algorithm=case.algorithm, precision=case.precision,
            grad=pointer(self.grad),
        )  # fmt: skip

    def in_float64(self) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias, by PyTorch."""
        h = self.x.double() if self.skip is None else torch.cat([self.x, self.skip], dim=3).double()
        h = h.permute(0, 3, 1, 2)
        if self.gain is not None and self.offset is not None:
            h = F.silu(h * self.gain.double()[:, :, None, None] + self.offset.double()[:, :, None, None])
        h = F.interpolate(h, scale_factor=2.0, mode="nearest") if self.case.doubled else h
        grad = self.grad.double().permute(0, 3, 1, 2)
        return torch.nn.grad.conv2d_weight(h, self.grad_weight.shape, grad, padding=1), grad.sum((0, 2, 3))


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str, cores: Literal["near", "far"]) -> None:
    native.cores_are_far(cores)
    call = Call(CASES[name])
    assert call.run() == 0
    weight, bias = call.in_float64()
    error = (call.grad_weight.double() - weight).norm() / weight.norm()
    assert error <= 2e-6, error
    if call.grad_bias is not None:
        torch.testing.assert_close(call.grad_bias.double(), bias, rtol=2e-6, atol=2e-6 * float(call.grad.abs().sum()))


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("algorithm", [WINOGRAD_2X2, WINOGRAD_2X4])
@pytest.mark.parametrize("name", CASES)
def test_numbers_in_bf16(name: str, algorithm: int, cores: Literal["near", "far"]) -> None:
    """The error is that of rounding two factors to 8 bits, 2.5e-3 of the definition, times the transforms'."""
    native.cores_are_far(cores)
    call = Call(replace(CASES[name], algorithm=algorithm, precision=BFLOAT16))
    assert call.run() == 0
    weight, bias = call.in_float64()
    error = (call.grad_weight.double() - weight).norm() / weight.norm()
    assert error <= 8e-3, error
    if call.grad_bias is not None:  # no product
        torch.testing.assert_close(call.grad_bias.double(), bias, rtol=2e-6, atol=2e-6 * float(call.grad.abs().sum()))


@pytest.mark.parametrize("name", ["no multiple of anything", "strips of an image", "one pixel"])
def test_small_integers_are_exact_in_bf16(name: str) -> None:
    """The transforms of F(2x2) add and halve: with integers up to 8, every factor is exact in bfloat16."""
    call = Call(replace(CASES[name], algorithm=WINOGRAD_2X2, precision=BFLOAT16))
    for tensor in (call.x, call.grad):
        tensor.copy_(torch.randint(-8, 9, tensor.shape))
    assert call.run() == 0
    weight, bias = call.in_float64()
    assert torch.equal(call.grad_weight.double(), weight)
    assert call.grad_bias is None or torch.equal(call.grad_bias.double(), bias)


def test_precision_is_kept_over_many_tiles_far_from_zero() -> None:
    """6400 tiles of one sign: added up one by one, rounding would be eight times as large."""
    call = Call(Case(4, 16, 16, (160, 160)), mean=1.0)
    assert call.run() == 0
    weight, bias = call.in_float64()
    assert (call.grad_weight.double() - weight).norm() <= 4e-7 * weight.norm()
    assert call.grad_bias is not None
    assert (call.grad_bias.double() - bias).norm() <= 4e-7 * bias.norm()


@pytest.mark.parametrize("name", DIVISIONS)
@pytest.mark.parametrize("factors", [{}, BF16], ids=["fp32", "bf16"])
def test_the_same_bits_with_any_number_of_threads_near_or_far(name: str, factors: dict[str, int]) -> None:
    results = []
    for threads, cores in itertools.product((1, 2, 3, 4, 8), CORES):
        native.cores_are_far(cores)
        torch.manual_seed(0)
        call = Call(replace(CASES[name], **factors), threads=threads)
        assert call.run() == 0
        results.append(call)
    for call in results[1:]:
        assert torch.equal(call.grad_weight, results[0].grad_weight)
        assert call.grad_bias is None or torch.equal(call.grad_bias, results[0].grad_bias)


@pytest.mark.parametrize("factors", [{}, BF16], ids=["fp32", "bf16"])
def test_a_call_without_a_workspace_uses_the_librarys(factors: dict[str, int]) -> None:
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        call = Call(replace(CASES["groups of many blocks"], **factors))
        if own:
            call.args.workspace, call.args.workspace_bytes = None, 0
        assert native.library().fastddpm_cpu_conv_weight_gradient(ctypes.byref(call.args), 2) == 0
        results.append(call.grad_weight)
    assert torch.equal(*results)


def test_no_images_give_zeros() -> None:
    call = Call(Case(0, 20, 18, (8, 8)))
    assert call.run() == 0 and call.grad_bias is not None
    assert (call.grad_weight == 0).all() and (call.grad_bias == 0).all()


def test_too_small_a_workspace_is_refused() -> None:
    call = Call(CASES["several blocks of tiles"])
    call.args.workspace_bytes -= 1
    assert call.run() == -2
    assert torch.isnan(call.memory).all()


@pytest.mark.parametrize(
    "change", [{"algorithm": PATCHES}, {"kernel": 1}, {"stride": 2}, {"pad": 0}, {"c1": 0}, {"offset": 1}]
)
def test_what_there_is_no_algorithm_for_is_refused(change: dict[str, int]) -> None:
    call = Call(CASES["a residual block's"])
    for name, value in change.items():
        setattr(call.args, name, value)
    assert call.run() == -1
    assert torch.isnan(call.memory).all()
