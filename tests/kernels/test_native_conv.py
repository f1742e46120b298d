"""The compiled library's convolution and GroupNorm statistics, as the prepared network calls them."""

import ctypes
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.kernels import interface, native
from fastddpm.kernels.interface import PATCHES, WINOGRAD

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("instruction_set"),
]
GUARD = 16  # floats on either side of an output


@dataclass(frozen=True)
class Case:
    """One call; sizes are of x, before any doubling."""

    n: int
    c1: int
    k: int
    size: tuple[int, int]
    algorithm: int
    c2: int = 0
    kernel: int = 3
    stride: int = 1
    doubled: bool = False
    affine: bool = True
    silu: bool = True
    bias: bool = True
    temb: str = "each"  # "each" image its own, "all" the same, "" none
    residual: bool = True
    in_place: bool = False
    nchw: bool = False
    turned: bool = False

    @property
    def out_size(self) -> tuple[int, int]:
        factor = 2 if self.doubled else 1
        height, width = (-(-factor * side // self.stride) for side in self.size)
        return height, width


CASES = {
    "a residual block's first": Case(2, 64, 64, (16, 16), WINOGRAD, temb="each", residual=False),
    "its second": Case(2, 64, 64, (16, 16), WINOGRAD, temb="", in_place=True),
    "of two inputs": Case(2, 40, 64, (8, 8), WINOGRAD, c2=24),
    "two inputs, seam within 16 channels": Case(2, 21, 40, (6, 10), WINOGRAD, c2=13),
    "doubled": Case(1, 32, 48, (6, 6), WINOGRAD, doubled=True, affine=False, residual=False),
    "two inputs doubled": Case(1, 20, 48, (3, 5), WINOGRAD, c2=12, doubled=True),
    "no SiLU": Case(2, 33, 35, (5, 7), WINOGRAD, silu=False),
    "plain": Case(1, 16, 16, (4, 4), WINOGRAD, affine=False, bias=False, temb="", residual=False),
    "the same embedding for all": Case(3, 16, 32, (8, 8), WINOGRAD, temb="all"),
    "many tiles": Case(2, 16, 16, (52, 44), WINOGRAD),
    "deep": Case(1, 300, 33, (8, 8), WINOGRAD),
    "weights turned by 180 degrees": Case(1, 48, 40, (9, 9), WINOGRAD, turned=True),
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


class Call:
    """The structure of a case with random tensors, and the result to expect in float64."""

    def __init__(self, case: Case, *, packed: bool = False, threads: int = 2) -> None:
        self.case, self.threads = case, threads
        channels, (height, width), (out_height, out_width) = case.c1 + case.c2, case.size, case.out_size
        self.x = torch.randn(case.n, height, width, case.c1)
        if case.nchw:
            self.x = self.x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        self.skip = torch.randn(case.n, height, width, case.c2) if case.c2 else None
        self.gain, self.offset = (torch.randn(case.n, channels) if case.affine else None for _ in range(2))
        self.weight = torch.randn(case.k, channels, case.kernel, case.kernel)
        self.bias = torch.randn(case.k) if case.bias else None
        self.temb = torch.randn(case.n, case.k) if case.temb else None
        self.residual = torch.randn(case.n, out_height, out_width, case.k) if case.residual else None
        outputs = case.n * out_height * out_width * case.k
        self.memory = torch.full((outputs + 2 * GUARD,), torch.nan)
        self.out = self.memory[GUARD : GUARD + outputs].view(case.n, out_height, out_width, case.k)
        self.expected = self.in_float64()
        self.args = self.arguments()
        if packed:
            self.packed = torch.empty(native.library().fastddpm_cpu_conv_packed_bytes(ctypes.byref(self.args)) // 4)
            code = native.library().fastddpm_cpu_conv_pack(
                ctypes.byref(self.args), ctypes.c_void_p(self.packed.data_ptr())
            )
            assert code == 0
            self.args.packed, self.args.weight = self.packed.data_ptr(), None
        size = native.library().fastddpm_cpu_conv_workspace(ctypes.byref(self.args), threads)
        self.workspace = torch.full((size + 128,), 0xFF, dtype=torch.uint8)
        self.args.workspace = -(-self.workspace.data_ptr() // 64) * 64
        self.args.workspace_bytes = size

    def arguments(self) -> interface.Conv:
        case = self.case
        residual = self.residual
        if case.in_place and residual is not None:
            self.out.copy_(residual)
            residual = self.out
        weight, strides = self.weight, self.weight.stride()
        if case.turned:
            weight, strides = self.weight[:, :, 2:, 2:], (*strides[:2], -strides[2], -strides[3])
        pointer = native.pointer
        return interface.Conv(
            x=pointer(self.x), skip=pointer(self.skip), gain=pointer(self.gain), offset=pointer(self.offset),
            weight=pointer(weight), bias=pointer(self.bias), temb=pointer(self.temb), residual=pointer(residual),
            out=self.out.data_ptr(), n=case.n, height=case.size[0], width=case.size[1], c1=case.c1, c2=case.c2,
            k=case.k, x_stride=(ctypes.c_int64 * 4)(*self.x.stride()),
            weight_stride=(ctypes.c_int64 * 4)(*strides), temb_stride=case.k if case.temb == "each" else 0,
            kernel=case.kernel, stride=case.stride, pad=1 if case.kernel == 3 and case.stride == 1 else 0,
            doubled=case.doubled, silu=case.silu, algorithm=case.algorithm,
        )  # fmt: skip

    def in_float64(self) -> Tensor:
        """(N, Hout, Wout, K), by PyTorch."""
        case = self.case
        x = self.x if self.skip is None else torch.cat([self.x, self.skip], dim=3)
        h = x.double().permute(0, 3, 1, 2)
        if self.gain is not None and self.offset is not None:
            h = h * self.gain.double()[:, :, None, None] + self.offset.double()[:, :, None, None]
            h = F.silu(h) if case.silu else h
        h = F.interpolate(h, scale_factor=2.0, mode="nearest") if case.doubled else h
        # With stride 2 the network pads below and to the right alone.
        h = F.pad(h, (0, 2, 0, 2)) if case.stride == 2 else h
        weight = self.weight.double().flip(2, 3) if case.turned else self.weight.double()
        padding = 1 if case.kernel == 3 and case.stride == 1 else 0
        y = F.conv2d(h, weight, None if self.bias is None else self.bias.double(), case.stride, padding)
        y = y[:, :, : case.out_size[0], : case.out_size[1]]
        if self.temb is not None:
            temb = self.temb if case.temb == "each" else self.temb[:1].expand(case.n, -1)
            y = y + temb.double()[:, :, None, None]
        y = y.permute(0, 2, 3, 1)
        return y if self.residual is None else y + self.residual.double()

    def run(self) -> int:
        code = native.library().fastddpm_cpu_conv(ctypes.byref(self.args), self.threads)
        guards = torch.cat([self.memory[:GUARD], self.memory[-GUARD:]])
        assert torch.isnan(guards).all(), "written outside the output"
        used = self.args.workspace - self.workspace.data_ptr() + self.args.workspace_bytes
        assert (self.workspace[used:] == 0xFF).all(), "written outside the workspace"
        return int(code)


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
    "name", ["a residual block's first", "two inputs, seam within 16 channels", "stride 2", "linear"]
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
