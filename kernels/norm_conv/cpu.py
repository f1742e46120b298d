"""norm_conv by the compiled CPU library: GroupNorm and SiLU as the input is read, the sums as the output is written."""

import ctypes

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
        if isinstance(argument, Tensor) and argument.dtype != torch.float32:
            return f"the compiled CPU library convolves float32, not {str(argument.dtype).removeprefix('torch.')}"
    return None


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference. The weights are packed at the first call, and again when they change."""
    if not a.x.numel():
        return reference.forward(a)
    x = a.x.contiguous(memory_format=torch.channels_last)
    n, c, height, width = x.shape
    shape = a.out_shape
    kernel = a.weight.shape[2]
    algorithm = algorithm_for(kernel, a.stride, c, *shape[2:])
    out = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    residual = None if a.residual is None else a.residual.contiguous(memory_format=torch.channels_last)
    temb, bias = (None if tensor is None else tensor.contiguous() for tensor in (a.temb, a.bias))
    gain, offset = (None, None) if a.norm_weight is None else _affine(a, x)
    args = interface.Conv(
        x=x.data_ptr(), packed=packed.of(a.weight, a.stride, a.pad, algorithm).data_ptr(), bias=native.pointer(bias),
        gain=native.pointer(gain), offset=native.pointer(offset), temb=native.pointer(temb), temb_stride=shape[1],
        residual=native.pointer(residual), out=out.data_ptr(), n=n, height=height, width=width, c1=c, k=shape[1],
        x_stride=(ctypes.c_int64 * 4)(height * width * c, width * c, c, 1), kernel=kernel, stride=a.stride, pad=a.pad,
        doubled=a.doubled, silu=a.silu, algorithm=algorithm,
    )  # fmt: skip
    args.workspace_bytes = native.library().fastddpm_cpu_conv_workspace(ctypes.byref(args), torch.get_num_threads())
    workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8, device="cpu")
    args.workspace = workspace.data_ptr()
    native.call("conv", args)
    return out


def _affine(a: Arguments, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm as a gain and an offset for each image and channel, float32 (N, C)."""
    n, c, height, width = x.shape
    assert a.norm_weight is not None and a.norm_bias is not None
    gain, offset = (torch.empty(n, c, dtype=torch.float32, device="cpu") for _ in range(2))
    weight, bias = a.norm_weight.contiguous(), a.norm_bias.contiguous()
    args = interface.NormAffine(
        x=x.data_ptr(), weight=weight.data_ptr(), bias=bias.data_ptr(), gain=gain.data_ptr(), offset=offset.data_ptr(),
        n=n, pixels=height * width, c1=c, groups=a.groups, eps=a.eps,
    )  # fmt: skip
    args.workspace_bytes = native.library().fastddpm_cpu_norm_affine_workspace(ctypes.byref(args))
    workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8, device="cpu")
    args.workspace = workspace.data_ptr()
    native.call("norm_affine", args)
    if a.scale is not None and a.shift is not None:
        gain, offset = gain * (1 + a.scale), offset * (1 + a.scale) + a.shift
    return gain, offset
