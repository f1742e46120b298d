"""dropout(silu(scale_shift(group_norm(concat(x, skip) + temb)))), forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import STREAM_DROPOUT
from ..philox.eager import per_image_words
from . import Arguments


def dropout_scale(shape: torch.Size, p: float, images: Tensor, seed: Tensor, step: Tensor, layer: int) -> Tensor:
    """Return the dropout factor of every element, 0 or 1/(1-p): float32 (N, C, H, W) in channels_last.

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


def _input(a: Arguments) -> Tensor:
    h = a.x if a.skip is None else torch.cat([a.x, a.skip], dim=1)
    h = h.to(a.statistics_dtype)
    return h if a.temb is None else h + a.temb.to(h.dtype)[:, :, None, None]


def _affine(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return gain and offset per image and channel, each (N or 1, C)."""
    dtype = a.statistics_dtype
    gain, offset = a.weight.to(dtype).unsqueeze(0), a.bias.to(dtype).unsqueeze(0)
    if a.scale is not None and a.shift is not None:
        gain, offset = gain * (1 + a.scale.to(dtype)), offset * (1 + a.scale.to(dtype)) + a.shift.to(dtype)
    return gain, offset


def _dropout(a: Arguments, values: Tensor) -> Tensor:
    if a.dropout <= 0:
        return values
    assert a.images is not None and a.seed is not None and a.step is not None
    return values * dropout_scale(values.shape, a.dropout, a.images, a.seed, a.step, a.layer).to(values.dtype)


def _per_channel(stat: Tensor, channels: int) -> Tensor:
    """Repeat (N, G) statistics over the channels of each group: (N, C, 1, 1)."""
    return stat.repeat_interleave(channels // stat.shape[1], dim=1)[:, :, None, None]


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output in x's dtype, and mean and 1/deviation of each group, float32 (N, G) (float64 for float64)."""
    h = _input(a)
    n, c = h.shape[:2]
    mean = h.mean((2, 3)).reshape(n, a.groups, c // a.groups).mean(2)
    # Two passes: E[x^2] - E[x]^2 loses all digits when the mean is large against the deviation.
    centred = h - _per_channel(mean, c)
    variance = centred.square().mean((2, 3)).reshape(n, a.groups, c // a.groups).mean(2)
    rstd = torch.rsqrt(variance + a.eps)
    gain, offset = _affine(a)
    y = torch.addcmul(offset[:, :, None, None], centred, gain[:, :, None, None] * _per_channel(rstd, c))
    if a.silu:
        y = F.silu(y)
    return _dropout(a, y).to(a.x.dtype, memory_format=a.memory_format), mean, rstd


def backward(
    a: Arguments, grad: Tensor, mean: Tensor, rstd: Tensor, added_x: Tensor | None, added_skip: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of x, skip, weight, bias, temb, scale, shift; an empty tensor for an input that was None.

    `grad`: (N, C, H, W). `mean`, `rstd`: (N, G), as `forward` returned them. `added_x`, `added_skip`: like x and skip,
    what is added to their gradients.
    """
    h = _input(a)
    dtype, c = h.dtype, h.shape[1]
    rstd_c = _per_channel(rstd, c)
    x_hat = (h - _per_channel(mean, c)) * rstd_c
    gain, offset = _affine(a)
    g = _dropout(a, grad.to(dtype))
    if a.silu:
        y = torch.addcmul(offset[:, :, None, None], x_hat, gain[:, :, None, None])
        g = torch.ops.aten.silu_backward(g, y)

    grad_offset = g.sum((2, 3))  # (N, C)
    grad_gain = (g * x_hat).sum((2, 3))  # (N, C)
    # With u = g * gain: dx = rstd (u - mean(u) - x_hat mean(u x_hat)), means over each group.
    pixels_per_group = h.shape[2] * h.shape[3] * (c // a.groups)

    def group_mean(sums: Tensor) -> Tensor:
        return _per_channel((sums * gain).reshape(len(h), a.groups, c // a.groups).sum(2) / pixels_per_group, c)

    u_mean, ux_mean = group_mean(grad_offset), group_mean(grad_gain)
    grad_h = torch.addcmul(g * gain[:, :, None, None] - u_mean, x_hat, ux_mean, value=-1).mul_(rstd_c)

    # A new empty tensor for each absent input: the outputs of an operator must not share memory.
    grad_skip, grad_temb, grad_scale, grad_shift = (a.x.new_empty(0) for _ in range(4))
    if a.temb is not None:
        grad_temb = grad_h.sum((2, 3)).to(a.temb.dtype)
    if a.scale is not None and a.shift is not None:
        w, b, factor = a.weight.to(dtype), a.bias.to(dtype), 1 + a.scale.to(dtype)
        grad_scale = (grad_gain * w + grad_offset * b).to(a.scale.dtype)
        grad_shift = grad_offset.to(a.shift.dtype)
        grad_gain, grad_offset = grad_gain * factor, grad_offset * factor
    grad_weight, grad_bias = grad_gain.sum(0).to(a.weight.dtype), grad_offset.sum(0).to(a.bias.dtype)

    for added, channels in ((added_x, slice(a.x.shape[1])), (added_skip, slice(a.x.shape[1], None))):
        if added is not None:
            grad_h[:, channels] += added.to(dtype)
    if a.skip is None:
        grad_x = grad_h.to(a.x.dtype, memory_format=a.memory_format)
    else:
        split = grad_h.to(a.x.dtype).split([a.x.shape[1], a.skip.shape[1]], dim=1)
        grad_x, grad_skip = (part.clone(memory_format=a.memory_format) for part in split)
    return grad_x, grad_skip, grad_weight, grad_bias, grad_temb, grad_scale, grad_shift
