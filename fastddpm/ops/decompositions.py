"""The operations of the network in PyTorch's own operators, for programs that run where fastddpm is not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm.kernels.group_norm_silu import Arguments

from .attention import plain as plain_attention
from .conv3x3 import plain as plain_conv3x3
from .group_norm_silu import plain as plain_group_norm_silu
from .linear_bf16 import plain as plain_linear_bf16


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return a function in PyTorch's operators for each of ours in a network that is evaluated.

    For `torch.export.ExportedProgram.run_decompositions`. Operators of a backward pass are not among them.
    """
    ours = torch.ops.fastddpm
    return {
        ours.group_norm_silu.default: _group_norm_silu,
        ours.attention.default: _attention_with_lse,
        ours.conv3x3.default: plain_conv3x3,
        ours.linear_bf16.default: plain_linear_bf16,
    }


def _group_norm_silu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = Arguments(*arguments)
    h = (a.x if a.skip is None else torch.cat([a.x, a.skip], dim=1)).to(a.statistics_dtype)
    h = h if a.temb is None else h + a.temb.to(h.dtype)[..., None, None]
    groups = h.reshape(h.shape[0], a.groups, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    return plain_group_norm_silu(a), mean, torch.rsqrt(variance + a.eps)  # nobody reads the last two: they are pruned


def _attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, bf16: bool) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q, k.transpose(1, 2)) * scale
    return plain_attention(q, k, v, scale, bf16), torch.logsumexp(scores, dim=-1)
