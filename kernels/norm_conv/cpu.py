"""norm_conv by the compiled CPU library: GroupNorm and SiLU as the input is read, the sums as the output is written."""

import ctypes
import functools

import torch
from torch import Tensor

from .. import interface, native
from ..conv3x3 import algorithm_for
from ..native import unavailable
from . import Arguments, packed, reference

__all__ = ["forward", "unavailable", "unsupported"]


def unsupported(**arguments: object) -> str | None:
    """Return why these arguments are left to PyTorch, or None."""
    for argument in arguments.values():
        # `is not None` for speed: Tensor's metaclass makes isinstance slow for other objects.
        if argument is not None and isinstance(argument, Tensor) and argument.dtype != torch.float32:
            return f"the compiled CPU library convolves float32, not {str(argument.dtype).removeprefix('torch.')}"
    return None


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference. The weights are packed at the first call, and again when they change."""
    if not a.x.numel():
        return reference.forward(a)
    x = a.x.contiguous(memory_format=torch.channels_last)
    shape = a.out_shape
    algorithm = algorithm_for(a.weight.shape[2], a.stride, x.shape[1], shape[2], shape[3])
    args = packed.of(a.weight, a.stride, a.pad, algorithm).structure(x, a.doubled)
    out = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8, device="cpu")
    args.x, args.out, args.workspace, args.silu = x.data_ptr(), out.data_ptr(), workspace.data_ptr(), a.silu
    alive = []  # what the structure points to
    if a.norm_weight is not None:
        gain, offset = _affine(a, x)
        alive += [gain, offset]
        args.gain, args.offset = gain.data_ptr(), offset.data_ptr()
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


def _affine(a: Arguments, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm, scale and shift as a gain and an offset for each image and channel, float32 (N, C)."""
    n, c, height, width = x.shape
    assert a.norm_weight is not None and a.norm_bias is not None
    gain, offset = (torch.empty(n, c, dtype=torch.float32, device="cpu") for _ in range(2))
    dense = [None if v is None else v.contiguous() for v in (a.norm_weight, a.norm_bias, a.scale, a.shift)]
    weight, bias, scale, shift = map(native.pointer, dense)
    args = interface.NormAffine(
        x=x.data_ptr(), weight=weight, bias=bias, scale=scale, shift=shift, scale_stride=c, gain=gain.data_ptr(),
        offset=offset.data_ptr(), n=n, pixels=height * width, c1=c, groups=a.groups, eps=a.eps,
    )  # fmt: skip
    args.workspace_bytes = _workspace_of_norm(n, height * width, c, a.groups)
    workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8, device="cpu")
    args.workspace = workspace.data_ptr()
    native.call("norm_affine", args)
    return gain, offset


@functools.lru_cache(maxsize=1024)
def _workspace_of_norm(n: int, pixels: int, channels: int, groups: int) -> int:
    args = interface.NormAffine(n=n, pixels=pixels, c1=channels, groups=groups)
    num_bytes: int = native.library().fastddpm_cpu_norm_affine_workspace(ctypes.byref(args))
    return num_bytes
