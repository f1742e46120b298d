"""group_norm_silu by Triton kernels, in float32, bfloat16 and float16, for contiguous and channels_last images."""

from typing import Any

import torch
from torch import Tensor

from .. import triton_launch
from ..philox import STREAM_DROPOUT
from ..triton_launch import ceil_div, launch, next_power_of_2, unavailable
from ..triton_tiles import chip
from . import Arguments, reference, tiles, too_large
from .triton_backward import (
    _group_norm_silu_backward_apply_kernel,
    _group_norm_silu_backward_sums_kernel,
    _group_norm_silu_backward_whole_kernel,
    _group_norm_silu_sum_kernel,
)
from .triton_even import _group_norm_silu_even_kernel
from .triton_forward import (
    _group_norm_silu_apply_kernel,
    _group_norm_silu_moments_kernel,
    _group_norm_silu_whole_kernel,
)

__all__ = ["backward", "forward", "unavailable", "unsupported"]

_SUM_ROWS, _SUM_CHANNELS = 128, 16
LARGEST = 448.0  # of e4m3


def unsupported(x: Tensor, groups: int, skip: Tensor | None, **rest: object) -> str | None:
    """Return why these arguments of forward or backward, by name, are left to another backend, or None."""
    return too_large(x, groups, skip, "Triton") or triton_launch.unsupported(x=x, skip=skip, **rest)


class _Call:
    """One call: its tensors, made dense, its tile, and the arguments that its kernels share."""

    def __init__(self, a: Arguments, *, backward: bool, residual: bool = False) -> None:
        x, groups = a.x, a.groups
        self.memory_format = a.memory_format
        self.x, self.skip = self.dense(x), None if a.skip is None else self.dense(a.skip)
        # Rows of temb may be one row, repeated: its channels alone must be adjacent.
        temb = a.temb if a.temb is None or a.temb.stride(1) == 1 else a.temb.contiguous()
        others = [
            None if parameter is None else parameter.contiguous() for parameter in (a.weight, a.bias, a.scale, a.shift)
        ]
        self.parameters = [temb, *others]
        self.n, self.c1 = x.shape[:2]
        self.groups, self.channels, self.pixels = groups, a.channels, x.shape[2] * x.shape[3]
        self.c2 = self.channels - self.c1
        cpg = self.channels // groups
        # An image of one channel or one pixel is dense in both formats: it counts as rows of channels.
        nhwc = self.memory_format == torch.channels_last
        self.tile = tiles.choose(self.n, self.pixels, groups, cpg, x.element_size(), nhwc, backward, chip(x.device))
        if residual:
            self.tile = tiles.with_residual(self.tile, self.pixels, groups, cpg, x.element_size())
        self.blocks = ceil_div(groups, self.tile.groups)
        self.chunk = ceil_div(ceil_div(self.pixels, max(self.tile.chunks, 1)), self.tile.block_p) * self.tile.block_p
        self.chunks = ceil_div(self.pixels, self.chunk)
        temb_stride = 0 if temb is None else temb.stride(0)
        self.sizes = (self.blocks, self.pixels, self.c1, self.c2, groups, temb_stride)
        self.key = (None if a.images is None else a.images.contiguous(), a.seed, a.step)
        self.dropout = (STREAM_DROPOUT + 256 * a.layer, round(a.dropout * 65536))
        self.shape: dict[str, Any] = {
            "CPG": cpg, "GB": self.tile.groups, "P": self.tile.block_p, "C": self.tile.block_c,
            "G": self.tile.padded_groups, "NHWC": nhwc,
            "HAS_SKIP": a.skip is not None, "HAS_TEMB": a.temb is not None, "num_warps": self.tile.warps,
        }  # fmt: skip
        self.flags: dict[str, Any] = {
            "HAS_AFFINE": a.scale is not None, "SILU": a.silu, "DROPOUT": a.dropout > 0,
            "EIGHTS": self.channels % 8 == 0 and self.tile.groups * cpg % 8 == 0 and self.tile.block_c % 8 == 0,
            "FAST": not triton_launch.interpreted() and torch.version.hip is None,
        }  # fmt: skip
        self.parts = self._parts(cpg)

    def _parts(self, cpg: int) -> dict[str, int] | None:
        """Return how a program's channels divide into rows, each of one tensor; None if the tile needs masks."""
        tile, used = self.tile, self.tile.groups * cpg
        row = used & -used  # the largest power of two that divides it
        whole = tile.block_p == self.pixels and self.blocks * tile.groups == self.groups
        power = next_power_of_2(tile.groups) == tile.groups
        wide = used == row or (used == 3 * row and tile.groups <= 8 and row * self.x.element_size() >= 16)
        if not (whole and power and wide and (self.skip is None or self.c1 % row == 0)):
            return None
        return {"C": row, "PARTS": used // row, "UNIT": cpg & -cpg, "C1": self.c1, "C2": self.c2}

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.memory_format)

    def image(self, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised image tensor in `dtype`, by default x's, in the output's layout."""
        shape = (self.n, channels, *self.x.shape[2:])
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device, memory_format=self.memory_format)

    def numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def launch(self, kernel: Any, chunks: int, *args: Any, **options: Any) -> None:
        launch(kernel, (self.n * self.blocks, chunks), self.x.device, *args, **self.shape, **options)


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the reference, statistics in float32."""
    return forward_of_sum(a, None, a.x.dtype)[:3] if a.x.numel() else reference.forward(a)


def forward_of_sum(a: Arguments, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y in `dtype`, mean, rstd and x + residual (empty without one), with that sum in the place of x.

    `residual`: like x. `dtype`: that of x, or float8_e4m3fn, to whose range y is clamped.
    """
    call = _Call(a, backward=False, residual=residual is not None)
    mean, rstd = call.numbers(call.n, a.groups), call.numbers(call.n, a.groups)
    if call.tile.chunks:  # larger images are read more than once, so the sum is made first
        total = a.x.new_empty(0)
        if residual is not None:
            total = a.x + residual
            a = a._replace(x=total)
        y = _forward_in_chunks(_Call(a, backward=False), a, mean, rstd)
        return (y if dtype == a.x.dtype else y.clamp(-LARGEST, LARGEST).to(dtype)), mean, rstd, total
    y = call.image(call.channels, dtype)
    added = None if residual is None else call.dense(residual)
    total = a.x.new_empty(0) if residual is None else call.image(call.c1)
    tensors = (
        call.x, call.skip, *call.parameters, added, None if residual is None else total, y, mean, rstd, *call.key,
    )  # fmt: skip
    flags = call.flags | {"HAS_RESIDUAL": residual is not None, "CLAMP": dtype != a.x.dtype}
    if call.parts is None:
        call.launch(_group_norm_silu_whole_kernel, 1, *tensors, *call.sizes, a.eps, *call.dropout, **flags)
    else:
        # With a residual, float32 in registers is as fast, if they have room for it.
        wanted = residual is None or call.parts["PARTS"] == 3
        packed = call.flags["FAST"] and a.x.dtype == torch.bfloat16 and wanted
        # Each half needs whole 16-byte rows of every thread.
        halves = a.dropout > 0 and call.tile.block_p * call.tile.block_c >= 64 * 32 * call.tile.warps
        shape = {name: value for name, value in call.shape.items() if name != "G"} | call.parts
        blocks, _, _, _, groups, temb_stride = call.sizes
        launch(
            _group_norm_silu_even_kernel, (call.n * blocks,), call.x.device,
            *tensors, blocks, groups, temb_stride, a.eps, *call.dropout, **shape, PACKED=packed, HALVES=halves, **flags,
        )  # fmt: skip
    return y, mean, rstd, total


def _forward_in_chunks(call: _Call, a: Arguments, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return y, and fill mean and rstd."""
    y = call.image(call.channels)
    inputs = (call.x, call.skip, *call.parameters)
    partial = None
    if call.chunks > 1:
        partial = call.numbers(2, call.n, call.chunks, a.groups)
        call.launch(_group_norm_silu_moments_kernel, call.chunks, *inputs[:3], partial, *call.sizes, call.chunk)
    call.launch(
        _group_norm_silu_apply_kernel, call.chunks,
        *inputs, partial, y, mean, rstd, *call.key, *call.sizes, call.chunk, a.eps, *call.dropout,
        CHUNKS=next_power_of_2(call.chunks), **call.flags,
    )  # fmt: skip
    return y


def backward(
    a: Arguments, grad: Tensor, mean: Tensor, rstd: Tensor, added_x: Tensor | None, added_skip: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the same as the reference; the same bits on every run."""
    if a.x.numel() == 0:
        return reference.backward(a, grad, mean, rstd, added_x, added_skip)
    call = _Call(a, backward=True)
    added = [None if image is None else call.dense(image) for image in (added_x, added_skip)]
    inputs = (
        call.dense(grad), call.x, call.skip, *call.parameters, mean.contiguous(), rstd.contiguous(), *call.key
    )  # fmt: skip
    grad_x, grad_skip = call.image(call.c1), None if a.skip is None else call.image(call.c2)
    grad_weight, grad_bias, grad_temb, grad_scale, grad_shift = (
        None if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for like in a.parameters.values()
    )
    parts = call.numbers(2, call.n, call.channels)
    if call.tile.chunks == 0:
        # With 128 registers a thread, two programs of 8 warps share a multiprocessor; left alone, Triton 3.6 takes more
        # for this chip, without need.
        limited = chip(a.x.device) == "sm_90" and call.tile.warps == 8 and a.x.element_size() == 2
        even = call.parts is not None and call.parts["PARTS"] == 1
        call.launch(
            _group_norm_silu_backward_whole_kernel, 1,
            *inputs, *added, grad_x, grad_skip, grad_temb, grad_scale, grad_shift, parts, *call.sizes, *call.dropout,
            EVEN=even, **call.flags, **({"maxnreg": 128} if limited else {}),
        )  # fmt: skip
    else:
        tail = (*call.sizes, call.chunk, *call.dropout)
        sums, temb_sums = None, grad_temb
        if call.chunks > 1:
            sums = call.numbers(2, call.n, call.chunks, call.channels)
            temb_sums = None if grad_temb is None else call.numbers(call.n, call.chunks, call.channels)
            call.launch(_group_norm_silu_backward_sums_kernel, call.chunks, *inputs, sums, *tail, **call.flags)
        call.launch(
            _group_norm_silu_backward_apply_kernel, call.chunks,
            *inputs, sums, *added, grad_x, grad_skip, temb_sums, grad_scale, grad_shift, parts, *tail, **call.flags,
        )  # fmt: skip
        if call.chunks > 1 and temb_sums is not None:
            _sum(temb_sums, grad_temb, None)
    _sum(parts, grad_weight, grad_bias)
    grads = (grad_x, grad_skip, grad_weight, grad_bias, grad_temb, grad_scale, grad_shift)
    return tuple(a.x.new_empty(0) if gradient is None else gradient for gradient in grads)


def _sum(values: Tensor, out0: Tensor | None, out1: Tensor | None) -> None:
    """Sum (M, rows, channels) over its second dimension into out0, or with M = 2 into out0 and out1."""
    num, rows, channels = values.shape
    grid = (ceil_div(channels, _SUM_CHANNELS), num)
    launch(
        _group_norm_silu_sum_kernel, grid, values.device, values, out0, out1, rows, channels,
        R=_SUM_ROWS, C=_SUM_CHANNELS, num_warps=4,
    )  # fmt: skip
