"""group_norm_silu by Triton kernels: any memory format that is dense, float32, bfloat16 and float16."""

from typing import Any

import torch
from torch import Tensor

from .. import triton_launch
from ..philox import STREAM_DROPOUT
from ..triton_launch import ceil_div, launch, next_power_of_2, unavailable
from ..triton_tiles import chip
from . import reference, tiles
from .triton_backward import (
    _group_norm_silu_backward_apply_kernel,
    _group_norm_silu_backward_sums_kernel,
    _group_norm_silu_backward_whole_kernel,
    _group_norm_silu_sum_kernel,
)
from .triton_forward import (
    _group_norm_silu_apply_kernel,
    _group_norm_silu_moments_kernel,
    _group_norm_silu_whole_kernel,
)

__all__ = ["backward", "forward", "unavailable", "unsupported"]

_CHANNELS_OF_A_GROUP = 1024
_SUM_ROWS, _SUM_CHANNELS = 32, 32


def unsupported(x: Tensor, groups: int, skip: Tensor | None, **rest: object) -> str | None:
    """Why arguments of forward or backward, by name, are left to another backend, or None."""
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if channels * x.shape[2] * x.shape[3] >= 2**31 - 1:
        return f"the Triton kernels take images below 2^31 - 1 elements, not {channels}x{x.shape[2]}x{x.shape[3]}"
    if channels > groups * _CHANNELS_OF_A_GROUP:
        return f"the Triton kernels take up to {_CHANNELS_OF_A_GROUP} channels to a group, not {channels // groups}"
    return triton_launch.unsupported(x=x, skip=skip, **rest)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


class _Call:
    """One call's tensors, dense, and the arguments that its kernels share."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        skip: Tensor | None,
        temb: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        dropout: float,
        images: Tensor | None,
        seed: Tensor | None,
        step: Tensor | None,
        layer: int,
        *,
        backward: bool,
    ) -> None:
        self.memory_format = _memory_format(x)
        self.x, self.skip = self.dense(x), None if skip is None else self.dense(skip)
        self.parameters = [None if v is None else v.contiguous() for v in (temb, weight, bias, scale, shift)]
        self.n, self.c1 = x.shape[:2]
        self.c2 = 0 if skip is None else skip.shape[1]
        self.channels, self.groups, self.pixels = self.c1 + self.c2, groups, x.shape[2] * x.shape[3]
        cpg = self.channels // groups
        # Dense in both ways (one channel, or one pixel): contiguous rows of channels.
        nhwc = self.memory_format == torch.channels_last
        self.tile = tiles.choose(self.n, self.pixels, groups, cpg, x.element_size(), nhwc, backward, chip(x.device))
        self.blocks = ceil_div(groups, self.tile.groups)
        self.chunk = ceil_div(ceil_div(self.pixels, max(self.tile.chunks, 1)), self.tile.block_p) * self.tile.block_p
        self.chunks = ceil_div(self.pixels, self.chunk)
        self.sizes = (self.blocks, self.pixels, self.c1, self.c2, groups)
        self.key = (None if images is None else images.contiguous(), seed, step)
        threshold = round(dropout * 65536)
        self.dropout = (STREAM_DROPOUT + 256 * layer, threshold)
        self.shape: dict[str, Any] = {
            "CPG": cpg, "GB": self.tile.groups, "P": self.tile.block_p, "C": self.tile.block_c,
            "G": self.tile.padded_groups, "NHWC": nhwc,
            "HAS_SKIP": skip is not None, "HAS_TEMB": temb is not None, "num_warps": self.tile.warps,
        }  # fmt: skip
        self.flags: dict[str, Any] = {
            "HAS_AFFINE": scale is not None, "SILU": silu, "DROPOUT": dropout > 0,
            "EIGHTS": self.channels % 8 == 0 and self.tile.groups * cpg % 8 == 0 and self.tile.block_c % 8 == 0,
        }  # fmt: skip

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.memory_format)

    def image(self, channels: int) -> Tensor:
        """An uninitialised tensor in x's dtype and layout."""
        shape = (self.n, channels, *self.x.shape[2:])
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=self.memory_format)

    def numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def launch(self, kernel: Any, chunks: int, *args: Any, **options: Any) -> None:
        launch(kernel, (self.n * self.blocks, chunks), self.x.device, *args, **self.shape, **options)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    skip: Tensor | None,
    temb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    dropout: float,
    images: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, statistics in float32."""
    rest = (skip, temb, scale, shift, silu, dropout, images, seed, step, layer)
    if x.numel() == 0:
        return reference.forward(x, weight, bias, groups, eps, *rest)
    call = _Call(x, weight, bias, groups, *rest, backward=False)
    y, mean, rstd = call.image(call.channels), call.numbers(call.n, groups), call.numbers(call.n, groups)
    inputs = (call.x, call.skip, *call.parameters)
    if call.tile.chunks == 0:
        call.launch(
            _group_norm_silu_whole_kernel, 1,
            *inputs, y, mean, rstd, *call.key, *call.sizes, eps, *call.dropout, **call.flags,
        )  # fmt: skip
        return y, mean, rstd
    partial = None
    if call.chunks > 1:
        partial = call.numbers(2, call.n, call.chunks, groups)
        call.launch(_group_norm_silu_moments_kernel, call.chunks, *inputs[:3], partial, *call.sizes, call.chunk)
    call.launch(
        _group_norm_silu_apply_kernel, call.chunks,
        *inputs, partial, y, mean, rstd, *call.key, *call.sizes, call.chunk, eps, *call.dropout,
        CHUNKS=next_power_of_2(call.chunks), **call.flags,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    skip: Tensor | None,
    temb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    dropout: float,
    images: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    layer: int,
) -> tuple[Tensor, ...]:
    """As the reference; the same bits on every run."""
    rest = (skip, temb, scale, shift, silu, dropout, images, seed, step, layer)
    if x.numel() == 0:
        return reference.backward(grad, x, weight, bias, mean, rstd, groups, *rest)
    call = _Call(x, weight, bias, groups, *rest, backward=True)
    inputs = (
        call.dense(grad), call.x, call.skip, *call.parameters, mean.contiguous(), rstd.contiguous(), *call.key
    )  # fmt: skip
    grad_x, grad_skip = call.image(call.c1), None if skip is None else call.image(call.c2)

    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)

    grad_weight, grad_bias, grad_temb, grad_scale, grad_shift = map(like, (weight, bias, temb, scale, shift))
    parts = call.numbers(2, call.n, call.channels)
    if call.tile.chunks == 0:
        call.launch(
            _group_norm_silu_backward_whole_kernel, 1,
            *inputs, grad_x, grad_skip, grad_temb, grad_scale, grad_shift, parts, *call.sizes, *call.dropout,
            **call.flags,
        )  # fmt: skip
    else:
        tail = (*call.sizes, call.chunk, *call.dropout)
        sums, temb_sums = None, grad_temb
        if call.chunks > 1:
            sums = call.numbers(2, call.n, call.chunks, call.channels)
            temb_sums = None if temb is None else call.numbers(call.n, call.chunks, call.channels)
            call.launch(_group_norm_silu_backward_sums_kernel, call.chunks, *inputs, sums, *tail, **call.flags)
        call.launch(
            _group_norm_silu_backward_apply_kernel, call.chunks,
            *inputs, sums, grad_x, grad_skip, temb_sums, grad_scale, grad_shift, parts, *tail, **call.flags,
        )  # fmt: skip
        if call.chunks > 1 and temb_sums is not None:
            _sum(temb_sums, grad_temb, None)
    _sum(parts, grad_weight, grad_bias)
    grads = (grad_x, grad_skip, grad_weight, grad_bias, grad_temb, grad_scale, grad_shift)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in grads)


def _sum(values: Tensor, out0: Tensor | None, out1: Tensor | None) -> None:
    """Sums over the second dimension of (M, rows, channels) to out0, or with M = 2 to both."""
    num, rows, channels = values.shape
    grid = (ceil_div(channels, _SUM_CHANNELS), num)
    launch(
        _group_norm_silu_sum_kernel, grid, values.device, values, out0, out1, rows, channels,
        R=_SUM_ROWS, C=_SUM_CHANNELS, num_warps=4,
    )  # fmt: skip
