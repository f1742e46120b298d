"""attention_block: an image plus attention over its normalised pixels, for sampling."""

import torch
from torch import Tensor

from fastddpm.kernels.attention_block import Arguments

from .registry import register, register_without_gradient


def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: int,
    query: Tensor,
    query_bias: Tensor,
    value: Tensor,
    value_bias: Tensor,
    *,
    residual: Tensor | None = None,
    added: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """Return s + value P n + value_bias, s = x + residual, with P = softmax(scale (query n + query_bias)^T n).

    n = group_norm(s + added), with the pixels of an image as its columns. One head: of four linear layers, that of the
    keys is multiplied into `query` and that of the output into `value` beforehand. `x`, `residual`: floating
    (N, C, H, W) of one dtype, which `query` and `value`, (C, C), have too. `norm_weight`, `norm_bias`, `added`, the
    biases: floating (C,). `scale`: default C**-0.5. Sums are float32 (float64 for float64). Returns (N, C, H, W) in
    channels_last. Without gradients. Raises ValueError for other shapes or dtypes.
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"attention_block: x must be floating (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"attention_block: {channels} channels cannot be divided into {groups} groups")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"attention_block: residual must be {x.dtype} {tuple(x.shape)}; "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    for name, matrix in (("query", query), ("value", value)):
        if matrix.shape != (channels, channels) or matrix.dtype != x.dtype:
            raise ValueError(
                f"attention_block: {name} must be {x.dtype} ({channels}, {channels}); "
                f"got {matrix.dtype} {tuple(matrix.shape)}"
            )
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "added": added, "query_bias": query_bias,
               "value_bias": value_bias}  # fmt: skip
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != (channels,) or not vector.dtype.is_floating_point):
            raise ValueError(
                f"attention_block: {name} must be floating ({channels},); got {vector.dtype} {tuple(vector.shape)}"
            )
    out: Tensor = torch.ops.fastddpm.attention_block(
        x, residual, norm_weight, norm_bias, groups, eps, added, query, query_bias, value, value_bias,
        channels**-0.5 if scale is None else scale,
    )  # fmt: skip
    return out


def _fake(a: Arguments) -> Tensor:
    return torch.empty_like(a.x, memory_format=torch.channels_last)


register(
    "attention_block",
    Arguments,
    "(Tensor x, Tensor? residual, Tensor norm_weight, Tensor norm_bias, int groups, float eps, Tensor? added, "
    "Tensor query, Tensor query_bias, Tensor value, Tensor value_bias, float scale) -> Tensor",
    _fake,
)
register_without_gradient("attention_block")
