"""attention by Triton kernels that hold all scores of a block of rows at once: the softmax needs no rescaling.

A program has BM rows of one image and their scores with all BN >= L tokens, (BM, BN) in registers. The C channels may
not fit on the chip and are streamed in chunks of DC. There are no atomics: the same bits on every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import ceil_div, launch, unavailable
from ..triton_tiles import chip
from . import Arguments, tiles

__all__ = ["LIMITS", "backward", "forward", "unavailable", "unsupported"]

_TOKENS, _CHANNELS = 256, 1024
LIMITS = f"up to {_TOKENS} tokens and {_CHANNELS} channels; beyond that by scaled_dot_product_attention"


def unsupported(q: Tensor, k: Tensor, v: Tensor, bf16: bool = False, **rest: object) -> str | None:
    """Return why these arguments of forward or backward, by name, are left to another backend, or None."""
    if bf16 and q.dtype != torch.bfloat16:
        return "the Triton kernels do not round float32 to bfloat16"
    tokens, channels = q.shape[1:]
    if tokens > _TOKENS or channels > _CHANNELS:
        return f"the Triton kernels take up to {_TOKENS} tokens of {_CHANNELS} channels, not {tokens} of {channels}"
    return triton_launch.unsupported(q=q, k=k, v=v, **rest)


@triton.jit
def _rows(tensor, n, row, d, stride_n, stride_l, rows, channels):
    """Load rows `row` and channels `d` of image n, zeros outside: (len(row), len(d))."""
    inside = (row < rows)[:, None] & (d < channels)[None, :]
    return tl.load(tensor + n.to(tl.int64) * stride_n + row[:, None] * stride_l + d[None, :], inside, 0.0)


@triton.jit
def _columns(tensor, n, row, d, stride_n, stride_l, rows, channels):
    """Load the transpose of `_rows`: (len(d), len(row))."""
    inside = (row < rows)[None, :] & (d < channels)[:, None]
    return tl.load(tensor + n.to(tl.int64) * stride_n + row[None, :] * stride_l + d[:, None], inside, 0.0)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """Return a b + total by the matrix unit, summed in float32."""
    if PRECISION == "interpreted":
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _products(
    a, b, n, i, j, a_n, a_l, b_n, b_l, rows, channels,
    M: tl.constexpr, J: tl.constexpr, DC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the products a_i . b_j of rows i of a and j of b over the channels: float32 (M, J)."""
    total = tl.zeros([M, J], tl.float32)
    for start in range(0, channels, DC):
        d = start + tl.arange(0, DC)
        left = _rows(a, n, i, d, a_n, a_l, rows, channels)
        right = _columns(b, n, j, d, b_n, b_l, rows, channels)
        total = _dot(left, right, total, PRECISION)
    return total


@triton.jit
def _store_products(
    out, residual, weights, by_row, b, n, i, j, b_n, b_l, rows, channels,
    M: tl.constexpr, DC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store weights (M, J) times rows j of b, each row scaled by `by_row`, to rows i of a dense (N, rows, channels).

    `residual`: dense like `out`, is added; or None.
    """
    for start in range(0, channels, DC):
        d = start + tl.arange(0, DC)
        right = _rows(b, n, j, d, b_n, b_l, rows, channels)
        value = _dot(weights, right, tl.zeros([M, DC], tl.float32), PRECISION)
        if by_row is not None:
            value *= by_row[:, None]
        at = n.to(tl.int64) * rows * channels + i[:, None] * channels + d[None, :]
        inside = (i < rows)[:, None] & (d < channels)[None, :]
        if residual is not None:
            value += tl.load(residual + at, inside, 0.0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _attention_fwd_kernel(
    q, k, v, residual, out, lse, q_n, q_l, k_n, k_l, v_n, v_l, rows, channels, blocks, scale,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute output and log-sum-exp of BM rows of one image; grid (N x blocks,)."""
    n = tl.program_id(0) // blocks
    i, j = tl.program_id(0) % blocks * BM + tl.arange(0, BM), tl.arange(0, BN)
    scores = _products(q, k, n, i, j, q_n, q_l, k_n, k_l, rows, channels, BM, BN, DC, PRECISION) * scale
    scores = tl.where((j < rows)[None, :], scores, float("-inf"))
    highest = tl.max(scores, axis=1)
    weights = tl.exp(scores - highest[:, None])
    tl.store(lse + n * rows + i, highest + tl.log(tl.sum(weights, axis=1)), i < rows)
    # Divided by the sum of the rounded weights: the output stays a mean of the values.
    weights = weights.to(v.dtype.element_ty)
    total = tl.sum(weights.to(tl.float32), axis=1)
    _store_products(out, residual, weights, 1.0 / total, v, n, i, j, v_n, v_l, rows, channels, BM, DC, PRECISION)


@triton.jit
def _attention_bwd_q_kernel(
    grad, q, k, v, lse, row_sums, grad_q, g_n, g_l, q_n, q_l, k_n, k_l, v_n, v_l, rows, channels, blocks, scale,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of BM rows of q, and their rowsum(P dP), which `_attention_bwd_kv_kernel` reads."""
    n = tl.program_id(0) // blocks
    i, j = tl.program_id(0) % blocks * BM + tl.arange(0, BM), tl.arange(0, BN)
    scores = _products(q, k, n, i, j, q_n, q_l, k_n, k_l, rows, channels, BM, BN, DC, PRECISION) * scale
    of_row = tl.load(lse + n * rows + i, i < rows, 0.0)
    weights = tl.where((j < rows)[None, :], tl.exp(scores - of_row[:, None]), 0.0)
    grad_weights = _products(grad, v, n, i, j, g_n, g_l, v_n, v_l, rows, channels, BM, BN, DC, PRECISION)
    total = tl.sum(weights * grad_weights, axis=1)
    tl.store(row_sums + n * rows + i, total, i < rows)
    grad_scores = (weights * (grad_weights - total[:, None]) * scale).to(k.dtype.element_ty)
    _store_products(grad_q, None, grad_scores, None, k, n, i, j, k_n, k_l, rows, channels, BM, DC, PRECISION)


@triton.jit
def _attention_bwd_kv_kernel(
    grad, q, k, v, lse, row_sums, grad_k, grad_v, g_n, g_l, q_n, q_l, k_n, k_l, v_n, v_l,
    rows, channels, blocks, scale,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BM rows of k and v from the transposed scores (BM of k, BN of q); grid (N x blocks,)."""
    n = tl.program_id(0) // blocks
    j, i = tl.program_id(0) % blocks * BM + tl.arange(0, BM), tl.arange(0, BN)
    scores = _products(k, q, n, j, i, k_n, k_l, q_n, q_l, rows, channels, BM, BN, DC, PRECISION) * scale
    of_row = tl.load(lse + n * rows + i, i < rows, 0.0)
    weights = tl.where((i < rows)[None, :], tl.exp(scores - of_row[None, :]), 0.0)
    _store_products(
        grad_v, None, weights.to(grad.dtype.element_ty), None, grad, n, j, i, g_n, g_l, rows, channels, BM, DC,
        PRECISION,
    )  # fmt: skip
    grad_weights = _products(v, grad, n, j, i, v_n, v_l, g_n, g_l, rows, channels, BM, BN, DC, PRECISION)
    total = tl.load(row_sums + n * rows + i, i < rows, 0.0)
    grad_scores = (weights * (grad_weights - total[None, :]) * scale).to(q.dtype.element_ty)
    _store_products(grad_k, None, grad_scores, None, q, n, j, i, q_n, q_l, rows, channels, BM, DC, PRECISION)


def _rows_of_channels(tensor: Tensor) -> Tensor:
    """Return a tensor with adjacent channels, whose images span less than 2^31 elements, as the kernels count."""
    side_by_side = tensor.stride(2) == 1 or tensor.shape[2] == 1
    near = tensor.shape[1] * tensor.stride(1) + tensor.shape[2] < 2**31
    return tensor if side_by_side and near else tensor.contiguous()


def _tiles(kernel: str, q: Tensor) -> dict[str, Any]:
    """Return the kernel's constants for `q`.

    A kernel that lacks the registers for three passes of the matrix unit multiplies float32 without it.
    """
    tokens, channels = q.shape[1:]
    tile, columns = tiles.choose(kernel, tokens, channels, q.element_size(), chip(q.device)), tiles.columns(tokens)
    precision = triton_launch.precision(q.dtype)
    if precision == "tf32x3" and kernel == "keys" and columns > 64:
        precision = "ieee"
    return {
        "BM": tile.rows, "BN": columns, "DC": tile.chunk, "PRECISION": precision,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference: the output in q's dtype, and each score row's log-sum-exp, float32 (N, L)."""
    return forward_added(a, None)


def forward_added(a: Arguments, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add `residual`, like q, to the output before that is rounded; None: nothing."""
    n, tokens, channels = a.q.shape
    out = torch.empty(a.q.shape, dtype=a.q.dtype, device=a.q.device)
    lse = torch.empty((n, tokens), dtype=torch.float32, device=a.q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = map(_rows_of_channels, a[:3])
    constants = _tiles("forward", q)
    blocks = ceil_div(tokens, constants["BM"])
    launch(
        _attention_fwd_kernel, (n * blocks,), q.device,
        q, k, v, None if residual is None else residual.contiguous(), out, lse, *_strides(q, k, v), tokens, channels,
        blocks, a.scale, **constants,
    )  # fmt: skip
    return out, lse


def backward(a: Arguments, grad: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the reference; the same bits on every run."""
    n, tokens, channels = a.q.shape
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in a[:3])
    if grad_q.numel() == 0:
        return grad_q, grad_k, grad_v
    grad, q, k, v = map(_rows_of_channels, (grad, *a[:3]))
    row_sums, lse = torch.empty((n, tokens), dtype=torch.float32, device=q.device), lse.contiguous()
    inputs, strides = (grad, q, k, v, lse, row_sums), _strides(grad, q, k, v)
    for kernel, outputs, constants in (
        (_attention_bwd_q_kernel, (grad_q,), _tiles("queries", q)),
        (_attention_bwd_kv_kernel, (grad_k, grad_v), _tiles("keys", q)),
    ):
        blocks, sizes = ceil_div(tokens, constants["BM"]), (tokens, channels)
        launch(kernel, (n * blocks,), q.device, *inputs, *outputs, *strides, *sizes, blocks, a.scale, **constants)
    return grad_q, grad_k, grad_v
