"""image + weight concat(x, skip) + bias at every pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return the sum, like `image`, made in float32 (float64 for float64) and rounded once."""
    wide = torch.float64 if a.image.dtype == torch.float64 else torch.float32
    out, weight = a.image.to(wide), a.weight.to(wide)[:, :, None, None]
    bias = None if a.bias is None else a.bias.to(wide)
    out = out + F.conv2d(a.x.to(wide), weight[:, : a.x.shape[1]], bias)
    if a.skip is not None:
        out = out + F.conv2d(a.skip.to(wide), weight[:, a.x.shape[1] :])
    return out.to(a.image.dtype).contiguous(memory_format=torch.channels_last)
