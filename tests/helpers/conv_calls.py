"""One call of the compiled library's convolution, with guard bytes around what it writes."""

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.kernels import interface, native
from fastddpm.kernels.interface import FLOAT32

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
    precision: int = FLOAT32

    @property
    def out_size(self) -> tuple[int, int]:
        factor = 2 if self.doubled else 1
        height, width = (-(-factor * side // self.stride) for side in self.size)
        return height, width


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
            precision=case.precision,
        )  # fmt: skip

    def in_float64(self) -> Tensor:
        """(N, Hout, Wout, K), by PyTorch; of the definition, with factors rounded to the case's precision."""
        case, h = self.case, self.activated()
        # With stride 2 the network pads below and to the right alone.
        h = F.pad(h, (0, 2, 0, 2)) if case.stride == 2 else h
        weight = self.weight.double()
        if case.precision == interface.BFLOAT16:
            h, weight = h.bfloat16().double(), weight.bfloat16().double()
        weight = weight.flip(2, 3) if case.turned else weight
        padding = 1 if case.kernel == 3 and case.stride == 1 else 0
        y = F.conv2d(h, weight, None if self.bias is None else self.bias.double(), case.stride, padding)
        return self.finished(y[:, :, : case.out_size[0], : case.out_size[1]])

    def activated(self) -> Tensor:
        """What is convolved, float64 (N, C, H, W)."""
        case = self.case
        x = self.x if self.skip is None else torch.cat([self.x, self.skip], dim=3)
        h = x.double().permute(0, 3, 1, 2)
        if self.gain is not None and self.offset is not None:
            h = h * self.gain.double()[:, :, None, None] + self.offset.double()[:, :, None, None]
            h = F.silu(h) if case.silu else h
        return F.interpolate(h, scale_factor=2.0, mode="nearest") if case.doubled else h

    def finished(self, y: Tensor) -> Tensor:
        """(N, Hout, Wout, K) from the convolution with its bias, (N, K, Hout, Wout)."""
        case = self.case
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
