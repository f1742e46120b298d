"""group_norm_silu: GroupNorm with what surrounds it in a residual block, as one operation."""

from typing import Any

import torch
from torch import Tensor

from .random_normal import check_counter
from .registry import register, register_gradient


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    skip: Tensor | None = None,
    temb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
    images: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """dropout(silu(scale_shift(group_norm(concat(x, skip) + temb)))) in one operation.

    `x`: floating (N, C1, H, W), any memory format. `skip`: (N, C2, H, W), read as further channels behind
    those of x; C = C1 + C2. `weight`, `bias`: (C,). `temb`: (N, C), added before the norm.
    `scale`, `shift`: (N, C), given together: y (1 + scale) + shift after the norm. `dropout`: probability
    in [0, 1), its mask a function of (seed, images, step, layer). Statistics are float32 (float64 for
    float64), the variance is the biased one of two passes. Under torch.autocast x and skip are brought to its dtype,
    and nothing else. Returns (N, C, H, W) in x's dtype.
    Raises ValueError for other shapes, or for dropout without images, seed and step.
    """
    _check(x, weight, bias, groups, skip, temb, scale, shift, dropout)
    if dropout > 0:
        if images is None or seed is None or step is None:
            raise ValueError("group_norm_silu: dropout needs images, seed and step, from which its mask is drawn")
        check_counter("group_norm_silu", images, seed, step)
        if images.shape != x.shape[:1]:
            raise ValueError(f"group_norm_silu: images must be ({x.shape[0]},); got {tuple(images.shape)}")
    return torch.ops.fastddpm.group_norm_silu(
        x, weight, bias, groups, eps, skip, temb, scale, shift, silu, dropout, images, seed, step, layer
    )[0]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    skip: Tensor | None,
    temb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dropout: float,
) -> None:
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"group_norm_silu: x must be floating (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    n, channels = x.shape[:2]
    if skip is not None:
        mixed = skip.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
        if skip.shape[:1] + skip.shape[2:] != x.shape[:1] + x.shape[2:] or mixed:
            raise ValueError(
                f"group_norm_silu: skip must match x in all but channels; x is {x.dtype} {tuple(x.shape)}, "
                f"skip is {skip.dtype} {tuple(skip.shape)}"
            )
        channels = channels + skip.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm_silu: {channels} channels do not split into {groups} groups")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (channels,):
            raise ValueError(f"group_norm_silu: {name} must be ({channels},); got {tuple(value.shape)}")
    for name, optional in (("temb", temb), ("scale", scale), ("shift", shift)):
        if optional is not None and optional.shape != (n, channels):
            raise ValueError(f"group_norm_silu: {name} must be ({n}, {channels}); got {tuple(optional.shape)}")
    if (scale is None) != (shift is None):
        raise ValueError("group_norm_silu: scale and shift go together; only one was given")
    if not 0 <= dropout < 1:
        raise ValueError(f"group_norm_silu: dropout must be in [0, 1); got {dropout}")


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, skip: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    channels = c if skip is None else c + skip.shape[1]
    y = torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    mean = x.new_empty((n, groups), dtype=_statistics_dtype(x))
    return y, mean, torch.empty_like(mean)


def _fake_backward(
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
    *_: Any,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)

    def image_like(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return x.new_empty(0)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device, memory_format=_memory_format(x))

    return image_like(x), image_like(skip), like(weight), like(bias), like(temb), like(scale), like(shift)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, _, skip, temb, scale, shift, ctx.silu, ctx.dropout, images, seed, step, ctx.layer = (
        inputs
    )
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd, skip, temb, scale, shift, images, seed, step)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd, skip, temb, scale, shift, images, seed, step = ctx.saved_tensors
    grads = torch.ops.fastddpm.group_norm_silu_backward(
        grad, x, weight, bias, mean, rstd, ctx.groups, skip, temb, scale, shift, ctx.silu, ctx.dropout,
        images, seed, step, ctx.layer,
    )  # fmt: skip
    grad_x, grad_skip, grad_weight, grad_bias, grad_temb, grad_scale, grad_shift = grads

    def unless_absent(gradient: Tensor, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else gradient

    return (
        grad_x, grad_weight, grad_bias, None, None,
        unless_absent(grad_skip, skip), unless_absent(grad_temb, temb),
        unless_absent(grad_scale, scale), unless_absent(grad_shift, shift),
        None, None, None, None, None, None,
    )  # fmt: skip


register(
    "group_norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? skip, Tensor? temb, Tensor? scale,"
    " Tensor? shift, bool silu, float dropout, Tensor? images, Tensor? seed, Tensor? step, int layer)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
    autocast=("x", "skip"),
)
register(
    "group_norm_silu_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, Tensor? skip,"
    " Tensor? temb, Tensor? scale, Tensor? shift, bool silu, float dropout, Tensor? images, Tensor? seed,"
    " Tensor? step, int layer) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    operation="group_norm_silu",
)
register_gradient("group_norm_silu", _backward, _setup_context)
