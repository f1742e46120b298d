"""A convolution of the image in the weights' dtype, turned by 180 degrees if `mirrored`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return the output in channels_last."""
    x = a.x.to(a.weight.dtype)
    out = F.conv2d(x.flip(2, 3) if a.mirrored else x, a.weight, padding=1)
    return out.contiguous(memory_format=torch.channels_last)
