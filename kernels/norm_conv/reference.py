"""conv(silu(scale_shift(group_norm(x)))) + bias + temb + residual: a residual block is two of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return (N, K, H', W') in channels_last and x's dtype."""
    h = a.x
    if a.norm_weight is not None:
        h = F.group_norm(h, a.groups, a.norm_weight, a.norm_bias, a.eps)
    if a.scale is not None and a.shift is not None:
        h = h * (1 + a.scale[:, :, None, None]) + a.shift[:, :, None, None]
    h = F.silu(h) if a.silu else h
    h = F.interpolate(h, scale_factor=2.0, mode="nearest") if a.doubled else h
    after = a.weight.shape[2] - a.pad - a.stride  # zeros at the end of the last patch
    out = F.conv2d(F.pad(h, (a.pad, after, a.pad, after)), a.weight, a.bias, a.stride)
    out = out if a.temb is None else out + a.temb[:, :, None, None]
    out = out if a.residual is None else out + a.residual
    return out.contiguous(memory_format=torch.channels_last)
