"""The compiled library's convolution and GroupNorm statistics, as the prepared network calls them."""

import ctypes
from dataclasses import replace
from typing import Literal

import pytest
import torch
from helpers.conv_calls import Call, Case
from torch import Tensor

from fastddpm.kernels import interface, native
from fastddpm.kernels.interface import PATCHES, WINOGRAD_4X4

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("instruction_set"),
]

NEAR_AND_FAR: tuple[Literal["near", "far"], ...] = ("near", "far")
CASES = {
    "a residual block's first": Case(2, 64, 64, (16, 16), WINOGRAD_4X4, temb="each", residual=False),
    "its second": Case(2, 64, 64, (16, 16), WINOGRAD_4X4, temb="", in_place=True),
    "of two inputs": Case(2, 40, 64, (8, 8), WINOGRAD_4X4, c2=24),
    "two inputs, seam within 16 channels": Case(2, 21, 40, (6, 10), WINOGRAD_4X4, c2=13),
    "doubled": Case(1, 32, 48, (6, 6), WINOGRAD_4X4, doubled=True, affine=False, residual=False),
    "two inputs doubled": Case(1, 20, 48, (3, 5), WINOGRAD_4X4, c2=12, doubled=True),
    "no SiLU": Case(2, 33, 35, (5, 7), WINOGRAD_4X4, silu=False),
    "plain": Case(1, 16, 16, (4, 4), WINOGRAD_4X4, affine=False, bias=False, temb="", residual=False),
    "the same embedding for all": Case(3, 16, 32, (8, 8), WINOGRAD_4X4, temb="all"),
    "many tiles": Case(2, 16, 16, (52, 44), WINOGRAD_4X4),
    "a thread's own tiles": Case(3, 40, 70, (36, 31), WINOGRAD_4X4, c2=11),
    "deep": Case(1, 300, 33, (8, 8), WINOGRAD_4X4),
    "weights turned by 180 degrees": Case(1, 48, 40, (9, 9), WINOGRAD_4X4, turned=True),
    "patches": Case(2, 40, 36, (4, 4), PATCHES),
    "patches of an image in NCHW": Case(2, 3, 36, (8, 8), PATCHES, affine=False, nchw=True),
    "patches of two inputs": Case(2, 40, 36, (5, 3), PATCHES, c2=30),
    "patches, doubled": Case(1, 20, 24, (3, 4), PATCHES, doubled=True),
    "stride 2": Case(2, 24, 40, (8, 8), PATCHES, stride=2),
    "stride 2, odd": Case(2, 24, 40, (7, 9), PATCHES, stride=2),
    "linear": Case(2, 64, 96, (8, 8), PATCHES, kernel=1),
    "linear of two inputs, many pixels": Case(3, 33, 50, (16, 16), PATCHES, c2=31, kernel=1),
    "one channel to one": Case(1, 1, 1, (1, 1), PATCHES, kernel=1),
    "deep patches": Case(1, 200, 20, (3, 3), PATCHES),
}


@pytest.mark.parametrize("packed", [False, True], ids=["weights", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str, packed: bool) -> None:
    if packed and CASES[name].turned:
        pytest.skip("the network's weights lie as they are")
    call = Call(CASES[name], packed=packed)
    assert call.run() == 0
    error = (call.out.double() - call.expected).norm() / call.expected.norm()
    assert error <= 4e-6, error


@pytest.mark.parametrize(
    "name",
    ["a residual block's first", "two inputs, seam within 16 channels", "a thread's own tiles", "stride 2", "linear"],
)
def test_the_same_bits_packed_or_not_and_with_any_number_of_threads(name: str) -> None:
    results = []
    for packed, threads in ((False, 1), (True, 1), (False, 3), (True, 8)):
        torch.manual_seed(0)
        call = Call(CASES[name], packed=packed, threads=threads)
        assert call.run() == 0
        results.append(call.out)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    if name == "stride 2":  # weights that are not packed are taken channel by channel, packed ones tap by tap
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("name", ["of two inputs", "deep", "patches", "linear"])
def test_too_small_a_workspace_is_refused(name: str) -> None:
    call = Call(CASES[name])
    call.args.workspace_bytes -= 1
    assert call.run() == -2
    assert torch.isnan(call.out).all()
    with pytest.raises(RuntimeError, match="conv: no memory for the operation's working space"):
        native.check("conv", -2)


@pytest.mark.parametrize(
    "change",
    [{"kernel": 5}, {"stride": 3}, {"algorithm": 2}, {"skip": None, "c2": 8}, {"offset": None}, {"c1": 0}, {"pad": 0},
     {"stride": 2}],
)  # fmt: skip
def test_what_there_is_no_algorithm_for_is_refused(change: dict[str, object]) -> None:
    call = Call(replace(CASES["a residual block's first"]))
    for name, value in change.items():
        setattr(call.args, name, value)
    assert call.run() == -1
    assert torch.isnan(call.out).all()


@pytest.mark.parametrize("name", ["a residual block's first", "stride 2", "linear"])
@pytest.mark.parametrize("side", ["n", "k", "height", "width"])
def test_without_an_output_there_is_nothing_to_do(name: str, side: str) -> None:
    """A plan divides by numbers of pixels and tiles, which would end the process."""
    call = Call(CASES[name])
    setattr(call.args, side, 0)
    assert native.library().fastddpm_cpu_conv_workspace(ctypes.byref(call.args), 2) == 0
    assert call.run() == 0
    assert torch.isnan(call.memory).all()


NORMS = {
    "a group within each input": (2, 64, 64, (8, 8), 32, 0.0),
    "groups across the seam": (2, 16, 8, (7, 9), 2, 0.0),
    "one input": (3, 24, 0, (16, 16), 4, 0.0),
    "one pixel": (2, 32, 0, (1, 1), 8, 0.0),
    "a mean of 30 deviations": (2, 32, 16, (20, 20), 8, 30.0),
    "a mean of 1000 deviations": (2, 32, 16, (20, 20), 8, 1000.0),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("outlier", [False, True])
def test_norm_affine(name: str, outlier: bool) -> None:
    """gain and offset, against the mean and variance in float64; the first pixel may be far from all others."""
    n, c1, c2, (height, width), groups, mean = NORMS[name]
    x = torch.randn(n, height * width, c1) + mean
    skip = torch.randn(n, height * width, c2) * 2 + mean if c2 else None
    if outlier:
        x[:, 0] += 1000
    weight, bias = torch.randn(c1 + c2), torch.randn(c1 + c2)
    gain, offset = torch.full((n, c1 + c2), torch.nan), torch.full((n, c1 + c2), torch.nan)
    args = interface.NormAffine(
        x=x.data_ptr(), skip=native.pointer(skip), weight=weight.data_ptr(), bias=bias.data_ptr(),
        gain=gain.data_ptr(), offset=offset.data_ptr(), n=n, pixels=height * width, c1=c1, c2=c2, groups=groups,
        eps=1e-6,
    )  # fmt: skip
    size = native.library().fastddpm_cpu_norm_affine_workspace(ctypes.byref(args))
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8)
    args.workspace, args.workspace_bytes = workspace.data_ptr(), size
    native.call("norm_affine", args)
    h = x.double() if skip is None else torch.cat([x, skip], dim=2).double()
    grouped = h.reshape(n, height * width, groups, -1)
    rstd = (grouped.var((1, 3), unbiased=False) + 1e-6).rsqrt()
    means = grouped.mean((1, 3))

    def per_channel(values: Tensor) -> Tensor:
        return values.repeat_interleave((c1 + c2) // groups, dim=1)

    expected = weight * per_channel(rstd)
    torch.testing.assert_close(gain.double(), expected, rtol=1e-6, atol=0)
    limit = 1e-6 * (1 + (per_channel(means) * expected).abs())
    assert ((offset.double() - (bias - per_channel(means) * expected)).abs() <= limit).all()
    args.workspace_bytes -= 1
    with pytest.raises(RuntimeError, match="norm_affine: no memory"):
        native.call("norm_affine", args)


def test_near_and_far_cores_have_the_same_bits() -> None:
    """Where they share no cache, each thread has a V of its own with more channels, too."""
    results = []
    for cores in NEAR_AND_FAR:
        native.cores_are_far(cores)
        torch.manual_seed(0)
        call = Call(Case(3, 130, 40, (32, 28), WINOGRAD_4X4))
        assert call.run() == 0
        assert (call.out.double() - call.expected).norm() <= 4e-6 * call.expected.norm()
        results.append(call.out)
    native.cores_are_far("measured")
    assert torch.equal(*results)


def test_cores_are_measured_or_as_they_are_said_to_be() -> None:
    assert native.cores_are_far("far") and native.cores_are_far()
    assert not native.cores_are_far("near") and not native.cores_are_far()
    native.cores_are_far("measured")
