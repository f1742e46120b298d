"""s + value (softmax(scale (query n + query_bias)^T n) n) + value_bias, n = group_norm(s + added), s = x + residual."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return the image in x's dtype and channels_last, made in float32 (float64 for float64) and rounded once."""
    wide = a.statistics_dtype
    total = a.x.to(wide) if a.residual is None else a.x.to(wide) + a.residual.to(wide)
    normed = total if a.added is None else total + a.added.to(wide)[:, None, None]
    normed = F.group_norm(normed, a.groups, a.norm_weight.to(wide), a.norm_bias.to(wide), a.eps)
    tokens = normed.flatten(2).transpose(1, 2)
    q = F.linear(tokens, a.query.to(wide), a.query_bias.to(wide))
    mixed = torch.softmax(a.scale * (q @ tokens.transpose(1, 2)), dim=2) @ tokens
    out = F.linear(mixed, a.value.to(wide), a.value_bias.to(wide)).transpose(1, 2).reshape(a.x.shape)
    return (total + out).to(a.x.dtype).contiguous(memory_format=torch.channels_last)
