"""group_norm_silu: GroupNorm and its neighbours in a residual block, as one operation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.kernels.group_norm_silu import Arguments
from fastddpm.kernels.group_norm_silu.reference import dropout_scale

from .derivatives import differentiable_backward, transformed
from .random_normal import check_counter
from .registry import computed_dtype, evaluate, register, register_gradient


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
    """Return dropout(silu(scale_shift(group_norm(concat(x, skip) + temb)))): (N, C, H, W) in x's dtype.

    `x`: floating (N, C1, H, W), any memory format. `skip`: (N, C2, H, W), further channels after those of x;
    C = C1 + C2. `weight`, `bias`: (C,). `temb`: (N, C), added before the norm. `scale`, `shift`: (N, C), given
    together: y (1 + scale) + shift after the norm. `dropout`: probability in [0, 1); the mask is a function of
    `seed` (0-d int64), `images` (int64 (N,)), `step` (0-d int64) and `layer`. Statistics are float32 (float64 for
    float64 x); the variance is biased and takes two passes. Under torch.autocast only x and skip are cast to its
    dtype. Raises ValueError for other shapes, and for dropout without images, seed and step.
    """
    a = Arguments(x, weight, bias, groups, eps, skip, temb, scale, shift, silu, dropout, images, seed, step, layer)
    check(a)
    if transformed(x, weight, bias, skip, temb, scale, shift):
        return plain(a)
    return evaluate("group_norm_silu", *a)[0]


def norm_and_inputs(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6, *, skip: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return silu(group_norm(concat(x, skip))), as `group_norm_silu` does, and x and skip, for further uses.

    The gradients of these uses are then added to those of the norm by its kernel, rather than in a pass of their own.
    """
    a = Arguments(x, weight, bias, groups, eps, skip, silu=silu)
    check(a)
    if transformed(x, weight, bias, skip) or x.dtype != computed_dtype(x):
        return group_norm_silu(x, weight, bias, groups, eps, skip=skip, silu=silu), x, skip
    y, _, _, x, skip = _NormAndInputs.apply(x, skip, weight, bias, groups, eps, silu)
    return y, x, skip


class _NormAndInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor | None, ...]:
        results = evaluate("group_norm_silu", *Arguments(x, weight, bias, groups, eps, skip, silu=silu))
        return *results, x.view_as(x), None if skip is None else skip.view_as(skip)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, skip, weight, bias, ctx.groups, ctx.eps, ctx.silu = inputs
        _, mean, rstd, _, _ = output
        ctx.save_for_backward(x, skip, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, skip, weight, bias, mean, rstd), (_, _, added_x, added_skip) = ctx.saved_tensors, others
        rest = (None, None, None)
        if grad is None:
            return added_x, added_skip, None, None, *rest
        if torch.is_grad_enabled():
            return *_differentiable_sums(ctx, grad, added_x, added_skip), *rest
        grad_x, grad_skip, grad_weight, grad_bias, *_ = evaluate(
            "group_norm_silu_backward", grad, x, weight, bias, mean, rstd, ctx.groups, skip, None, None, None, ctx.silu,
            0.0, None, None, None, 0, added_x, added_skip,
        )  # fmt: skip
        return grad_x, None if skip is None else grad_skip, grad_weight, grad_bias, *rest


def _differentiable_sums(
    ctx: Any, grad: Tensor, added_x: Tensor | None, added_skip: Tensor | None
) -> list[Tensor | None]:
    def differentiable(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        return plain(Arguments(x, weight, bias, ctx.groups, ctx.eps, skip, silu=ctx.silu))

    found = differentiable_backward(differentiable, ctx.saved_tensors[:4], grad, ctx.needs_input_grad[:4])
    return [
        gradient if added is None or gradient is None else gradient + added
        for gradient, added in zip(found, (added_x, added_skip, None, None), strict=True)
    ]


def check(a: Arguments) -> None:
    """Raise ValueError for shapes and dtypes that the operation does not take."""
    x, skip = a.x, a.skip
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
    if a.groups < 1 or channels % a.groups:
        raise ValueError(f"group_norm_silu: {channels} channels do not split into {a.groups} groups")
    for name, value in (("weight", a.weight), ("bias", a.bias)):
        if value.shape != (channels,):
            raise ValueError(f"group_norm_silu: {name} must be ({channels},); got {tuple(value.shape)}")
    for name, optional in (("temb", a.temb), ("scale", a.scale), ("shift", a.shift)):
        if optional is not None and optional.shape != (n, channels):
            raise ValueError(f"group_norm_silu: {name} must be ({n}, {channels}); got {tuple(optional.shape)}")
    if (a.scale is None) != (a.shift is None):
        raise ValueError("group_norm_silu: scale and shift go together; only one was given")
    if not 0 <= a.dropout < 1:
        raise ValueError(f"group_norm_silu: dropout must be in [0, 1); got {a.dropout}")
    if a.dropout > 0:
        if a.images is None or a.seed is None or a.step is None:
            raise ValueError("group_norm_silu: dropout needs images, seed and step, from which its mask is drawn")
        check_counter("group_norm_silu", a.images, a.seed, a.step)
        if a.images.shape != x.shape[:1]:
            raise ValueError(f"group_norm_silu: images must be ({n},); got {tuple(a.images.shape)}")


def plain(a: Arguments) -> Tensor:
    """Return the result in PyTorch's operators: for export, and for derivatives that the kernels do not have."""
    dtype = a.statistics_dtype

    def per_pixel(values: Tensor) -> Tensor:
        return values.to(dtype)[..., None, None]

    h = (a.x if a.skip is None else torch.cat([a.x, a.skip], dim=1)).to(dtype)
    h = h if a.temb is None else h + per_pixel(a.temb)
    h = h.contiguous()  # PyTorch's forward-mode formula takes a view that channels_last does not have
    y = F.group_norm(h, a.groups, a.weight.to(dtype), a.bias.to(dtype), a.eps)
    if a.scale is not None and a.shift is not None:
        y = y * (1 + per_pixel(a.scale)) + per_pixel(a.shift)
    y = F.silu(y) if a.silu else y
    if a.dropout > 0:
        assert a.images is not None and a.seed is not None and a.step is not None
        y = y * dropout_scale(y.shape, a.dropout, a.images, a.seed, a.step, a.layer).to(dtype)
    return y.to(a.x.dtype)


def _fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    n, _, height, width = a.x.shape
    shape = (n, a.channels, height, width)
    y = torch.empty(shape, dtype=a.x.dtype, device=a.x.device, memory_format=a.memory_format)
    mean = a.x.new_empty((n, a.groups), dtype=a.statistics_dtype)
    return y, mean, torch.empty_like(mean)


def _fake_backward(
    a: Arguments, grad: Tensor, mean: Tensor, rstd: Tensor, added_x: Tensor | None, added_skip: Tensor | None
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        if tensor is None:
            return a.x.new_empty(0)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=a.x.device, memory_format=memory_format)

    return like(a.x, a.memory_format), like(a.skip, a.memory_format), *map(like, a.parameters.values())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    a, (_, mean, rstd) = Arguments(*inputs), output
    ctx.groups, ctx.eps, ctx.silu, ctx.dropout, ctx.layer = a.groups, a.eps, a.silu, a.dropout, a.layer
    ctx.save_for_backward(
        a.x, a.weight, a.bias, mean, rstd, a.skip, a.temb, a.scale, a.shift, a.images, a.seed, a.step
    )  # fmt: skip
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for the two


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(Arguments._fields)
    x, weight, bias, mean, rstd, skip, temb, scale, shift, images, seed, step = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad)
    grads = evaluate(
        "group_norm_silu_backward", grad, x, weight, bias, mean, rstd, ctx.groups, skip, temb, scale, shift, ctx.silu,
        ctx.dropout, images, seed, step, ctx.layer, None, None,
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


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, _, _, skip, temb, scale, shift, images, seed, step = ctx.saved_tensors

    def differentiable(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        skip: Tensor | None,
        temb: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        a = Arguments(
            x, weight, bias, ctx.groups, ctx.eps, skip, temb, scale, shift, ctx.silu, ctx.dropout,
            images, seed, step, ctx.layer,
        )  # fmt: skip
        return plain(a)

    needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5, 6, 7, 8)]
    found = differentiable_backward(differentiable, (x, weight, bias, skip, temb, scale, shift), grad, needed)
    return *found[:3], None, None, *found[3:], None, None, None, None, None, None


register(
    "group_norm_silu",
    Arguments,
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? skip, Tensor? temb, Tensor? scale,"
    " Tensor? shift, bool silu, float dropout, Tensor? images, Tensor? seed, Tensor? step, int layer)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
    autocast=("x", "skip"),
)
register(
    "group_norm_silu_backward",
    Arguments,
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, Tensor? skip,"
    " Tensor? temb, Tensor? scale, Tensor? shift, bool silu, float dropout, Tensor? images, Tensor? seed,"
    " Tensor? step, int layer, Tensor? added_x, Tensor? added_skip)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    operation="group_norm_silu",
)
register_gradient("group_norm_silu", _backward, _setup_context)
