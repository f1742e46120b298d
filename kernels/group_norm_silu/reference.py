"""dropout(silu(scale_shift(group_norm(concat(x, skip) + temb)))), forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import STREAM_DROPOUT
from ..philox.eager import per_image_words


def dropout_scale(shape: torch.Size, p: float, images: Tensor, seed: Tensor, step: Tensor, layer: int) -> Tensor:
    """The dropout factor of every element, 0 or 1/(1-p), float32 (N, C, H, W) in channels_last.

    Each Philox block serves eight elements of an image, counted in (H, W, C) order: word w gives its low
    half to element 2w and its high half to 2w+1. p is rounded to a multiple of 2^-16.
    """
    n, c, h, w = shape
    threshold = round(p * 65536)
    num = c * h * w
    words = per_image_words((num + 7) // 8, images, seed, step, STREAM_DROPOUT + 256 * layer)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    kept = halves.flatten(1)[:, :num].reshape(n, h, w, c) >= threshold
    return (kept.to(torch.float32) * (65536.0 / (65536 - threshold))).permute(0, 3, 1, 2)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _input(x: Tensor, skip: Tensor | None, temb: Tensor | None, dtype: torch.dtype) -> Tensor:
    h = x.to(dtype) if skip is None else torch.cat([x, skip], dim=1).to(dtype)
    return h if temb is None else h + temb.to(dtype)[:, :, None, None]


def _affine(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gain and offset per image and channel, each (N or 1, C)."""
    gain, offset = weight.to(dtype).unsqueeze(0), bias.to(dtype).unsqueeze(0)
    if scale is not None and shift is not None:
        gain, offset = gain * (1 + scale.to(dtype)), offset * (1 + scale.to(dtype)) + shift.to(dtype)
    return gain, offset


def _per_channel(stat: Tensor, channels: int) -> Tensor:
    """(N, G) statistics repeated over the channels of each group: (N, C, 1, 1)."""
    return stat.repeat_interleave(channels // stat.shape[1], dim=1)[:, :, None, None]


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
    """The output in x's dtype, and mean and 1/deviation of each group, float32 (N, G) (float64 for float64)."""
    dtype = _compute_dtype(x.dtype)
    h = _input(x, skip, temb, dtype)
    n, c = h.shape[:2]
    mean = h.mean((2, 3)).reshape(n, groups, c // groups).mean(2)
    # Two passes: E[x^2] - E[x]^2 loses all digits when the mean is large against the deviation.
    centred = h - _per_channel(mean, c)
    variance = centred.square().mean((2, 3)).reshape(n, groups, c // groups).mean(2)
    rstd = torch.rsqrt(variance + eps)
    gain, offset = _affine(weight, bias, scale, shift, dtype)
    y = torch.addcmul(offset[:, :, None, None], centred, gain[:, :, None, None] * _per_channel(rstd, c))
    if silu:
        y = F.silu(y)
    if dropout > 0:
        assert images is not None and seed is not None and step is not None
        y = y * dropout_scale(y.shape, dropout, images, seed, step, layer).to(dtype)
    return y.to(x.dtype, memory_format=_memory_format(x)), mean, rstd


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
    """Gradients of x, skip, weight, bias, temb, scale, shift; an empty tensor for an input that was None."""
    dtype = _compute_dtype(x.dtype)
    h = _input(x, skip, temb, dtype)
    c = h.shape[1]
    rstd_c = _per_channel(rstd, c)
    x_hat = (h - _per_channel(mean, c)) * rstd_c
    gain, offset = _affine(weight, bias, scale, shift, dtype)
    g = grad.to(dtype)
    if dropout > 0:
        assert images is not None and seed is not None and step is not None
        g = g * dropout_scale(h.shape, dropout, images, seed, step, layer).to(dtype)
    if silu:
        y = torch.addcmul(offset[:, :, None, None], x_hat, gain[:, :, None, None])
        g = torch.ops.aten.silu_backward(g, y)

    grad_offset = g.sum((2, 3))  # (N, C)
    grad_gain = (g * x_hat).sum((2, 3))  # (N, C)
    # With u = g * gain: dx = rstd (u - mean(u) - x_hat mean(u x_hat)), means over each group.
    pixels_per_group = h.shape[2] * h.shape[3] * (c // groups)

    def group_mean(sums: Tensor) -> Tensor:
        return _per_channel((sums * gain).reshape(len(h), groups, c // groups).sum(2) / pixels_per_group, c)

    u_mean, ux_mean = group_mean(grad_offset), group_mean(grad_gain)
    grad_h = torch.addcmul(g * gain[:, :, None, None] - u_mean, x_hat, ux_mean, value=-1).mul_(rstd_c)

    # One empty tensor each: the outputs of an operator must not share memory.
    grad_skip, grad_temb, grad_scale, grad_shift = (x.new_empty(0) for _ in range(4))
    if temb is not None:
        grad_temb = grad_h.sum((2, 3)).to(temb.dtype)
    if scale is not None and shift is not None:
        w, b, factor = weight.to(dtype), bias.to(dtype), 1 + scale.to(dtype)
        grad_scale = (grad_gain * w + grad_offset * b).to(scale.dtype)
        grad_shift = grad_offset.to(shift.dtype)
        grad_gain, grad_offset = grad_gain * factor, grad_offset * factor
    grad_weight, grad_bias = grad_gain.sum(0).to(weight.dtype), grad_offset.sum(0).to(bias.dtype)

    memory_format = _memory_format(x)
    if skip is None:
        grad_x = grad_h.to(x.dtype, memory_format=memory_format)
    else:
        split = grad_h.to(x.dtype).split([x.shape[1], skip.shape[1]], dim=1)
        grad_x, grad_skip = (part.clone(memory_format=memory_format) for part in split)
    return grad_x, grad_skip, grad_weight, grad_bias, grad_temb, grad_scale, grad_shift
