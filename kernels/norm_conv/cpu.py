"""norm_conv by the compiled CPU library: GroupNorm and SiLU as the input is read, the sums as the output is written.

The weights are read where they are, at every call: nothing of them is kept that a change could make stale.
"""

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import interface, native
from ..conv3x3 import WINOGRAD_4X4, algorithm_for, winograd_wins
from ..native import unavailable
from . import Arguments, reference

__all__ = ["forward", "unavailable", "unsupported"]

_LINE = 64  # bytes of a cache line, to which workspaces are aligned


def unsupported(**arguments: object) -> str | None:
    """Return why these arguments are left to PyTorch, or None."""
    for argument in arguments.values():
        # `is not None` for speed: Tensor's metaclass makes isinstance slow for other objects.
        if argument is not None and isinstance(argument, Tensor) and argument.dtype != torch.float32:
            return f"the compiled CPU library convolves float32, not {str(argument.dtype).removeprefix('torch.')}"
    return None


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference."""
    if not a.x.numel():
        return reference.forward(a)
    x, weight = a.x.contiguous(memory_format=torch.channels_last), a.weight
    call = _call(
        x.shape, weight.shape, weight.stride(), a.stride, a.pad, a.doubled,
        0 if a.norm_weight is None else a.groups, torch.get_num_threads(),
    )  # fmt: skip
    args = interface.Conv.from_buffer_copy(call.conv)  # another thread may make the same call
    out = torch.empty(call.out_shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    scratch = torch.empty(call.scratch_bytes, dtype=torch.uint8, device="cpu")
    start = scratch.data_ptr()
    args.x, args.weight, args.out, args.silu = x.data_ptr(), weight.data_ptr(), out.data_ptr(), a.silu
    if call.norm is not None:
        args.gain, args.offset = start, start + call.affine_bytes
        _affine(a, x, call.norm, start, call.affine_bytes)
    args.workspace = start + 2 * call.affine_bytes
    alive = []  # what the structure points to
    for name, tensor, memory_format in (
        ("bias", a.bias, torch.contiguous_format),
        ("temb", a.temb, torch.contiguous_format),
        ("residual", a.residual, torch.channels_last),
    ):
        if tensor is not None:
            dense = tensor.contiguous(memory_format=memory_format)
            alive.append(dense)
            setattr(args, name, dense.data_ptr())
    native.call("conv", args)
    return out


def _affine(a: Arguments, x: Tensor, known: interface.NormAffine, start: int, num_bytes: int) -> None:
    """Write the norm, scale and shift as a gain and an offset for each image and channel, float32 (N, C), to memory.

    `start`: the address of the gain, with the offset `num_bytes` behind it and the workspace behind that.
    """
    args = interface.NormAffine.from_buffer_copy(known)
    dense = [None if v is None else v.contiguous() for v in (a.norm_weight, a.norm_bias, a.scale, a.shift)]
    args.weight, args.bias, args.scale, args.shift = (None if v is None else v.data_ptr() for v in dense)
    args.x, args.eps = x.data_ptr(), a.eps
    args.gain, args.offset, args.workspace = start, start + num_bytes, start + 2 * num_bytes
    native.call("norm_affine", args)


class _Call(NamedTuple):
    """What calls of the same shapes have in common."""

    conv: interface.Conv  # without pointers and `silu`
    norm: interface.NormAffine | None  # without pointers and `eps`
    out_shape: tuple[int, int, int, int]
    affine_bytes: int  # of a gain, rounded up to whole cache lines; as many of an offset
    scratch_bytes: int  # gain, offset, and the workspace of the norm, and then of the convolution


@functools.lru_cache(maxsize=4096)
def _call(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    weight_stride: tuple[int, ...],
    stride: int,
    pad: int,
    doubled: bool,
    groups: int,
    threads: int,
) -> _Call:
    """`groups`: of the norm, or 0 without one."""
    n, c, height, width = shape
    k, _, kernel, _ = weight_shape
    factor = 2 if doubled else 1
    out_height, out_width = factor * height // stride, factor * width // stride
    conv = interface.Conv(
        n=n, height=height, width=width, c1=c, k=k, temb_stride=k, kernel=kernel, stride=stride, pad=pad,
        doubled=doubled, x_stride=(ctypes.c_int64 * 4)(height * width * c, width * c, c, 1),
        weight_stride=(ctypes.c_int64 * 4)(*weight_stride),
        algorithm=_algorithm(kernel, stride, pad, n, c, out_height, out_width),
    )  # fmt: skip
    conv.workspace_bytes = native.library().fastddpm_cpu_conv_workspace(ctypes.byref(conv), threads)
    most, affine_bytes, norm = conv.workspace_bytes, 0, None
    if groups:
        norm = interface.NormAffine(n=n, pixels=height * width, c1=c, groups=groups, scale_stride=c)
        norm.workspace_bytes = native.library().fastddpm_cpu_norm_affine_workspace(ctypes.byref(norm))
        most, affine_bytes = max(most, norm.workspace_bytes), -(-4 * n * c // _LINE) * _LINE
    return _Call(conv, norm, (n, k, out_height, out_width), affine_bytes, 2 * affine_bytes + most)


def _algorithm(kernel: int, stride: int, pad: int, batch: int, in_channels: int, height: int, width: int) -> int:
    """Return PATCHES or WINOGRAD_4X4. Unlike in the sampler, the batch size counts, so bits may depend on it."""
    possible = kernel == 3 and stride == 1 and pad == 1
    several = possible and winograd_wins(batch, in_channels, in_channels, height, width)
    return WINOGRAD_4X4 if several else algorithm_for(kernel, stride, in_channels, height, width)
