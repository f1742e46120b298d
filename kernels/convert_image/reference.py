"""x + residual + bias, with more or fewer channels, turned by 180 degrees if `mirrored`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return the sum, made in float32 (float64 for float64) and rounded once; new channels are zeros."""
    wide = torch.float64 if a.x.dtype == torch.float64 else torch.float32
    total = a.x.to(wide) if a.residual is None else a.x.to(wide) + a.residual.to(wide)
    if a.bias is not None:
        total = total + a.bias.to(wide)[: total.shape[1], None, None]
    total = F.pad(total, (0, 0, 0, 0, 0, a.channels - total.shape[1]))
    total = total.flip(2, 3) if a.mirrored else total
    shape, out = total.shape, total.to(a.dtype)
    # An image of one channel or one pixel is dense in both layouts: empty gives it the strides of the one asked for.
    return torch.empty(shape, dtype=a.dtype, device=a.x.device, memory_format=a.layout).copy_(out)
