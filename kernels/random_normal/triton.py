"""random_normal by a Triton kernel, with the bits of the compiled libraries."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox.triton import normals, words
from ..triton_launch import ceil_div, launch, unavailable
from ..triton_launch import elsewhere as unsupported
from . import Arguments

__all__ = ["forward", "philox_words", "unavailable", "unsupported"]

_BLOCKS = 256  # Philox blocks per program


@triton.jit
def _random_normal_kernel(out, images, seed, step, num, pieces, stream, B: tl.constexpr):
    """Draw the normals of B Philox blocks of one image; grid (N x pieces,)."""
    n, first = tl.program_id(0) // pieces, tl.program_id(0) % pieces * B
    z = normals(first + tl.arange(0, B), tl.load(images + n), tl.load(step), stream, tl.load(seed))
    i = 4 * first + tl.arange(0, 4 * B)
    tl.store(out + n.to(tl.int64) * num + i, z, i < num)


@triton.jit
def _philox_words_kernel(out, images, seed, step, num, pieces, stream, B: tl.constexpr):
    """Compute the four words of B Philox blocks of one image, int32 (N, num, 4); grid (N x pieces,)."""
    n, first = tl.program_id(0) // pieces, tl.program_id(0) % pieces * B
    block = first + tl.arange(0, B)
    w0, w1, w2, w3 = words(block, tl.load(images + n), tl.load(step), stream, tl.load(seed))
    at = out + (n.to(tl.int64) * num + block) * 4
    tl.store(at, w0.to(tl.int32, bitcast=True), block < num)
    tl.store(at + 1, w1.to(tl.int32, bitcast=True), block < num)
    tl.store(at + 2, w2.to(tl.int32, bitcast=True), block < num)
    tl.store(at + 3, w3.to(tl.int32, bitcast=True), block < num)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference, within 1e-6 of it."""
    out = torch.empty((len(a.images), *a.shape), dtype=torch.float32, device=a.images.device)
    if out.numel():
        num = math.prod(a.shape)
        pieces = ceil_div(num, 4 * _BLOCKS)
        launch(
            _random_normal_kernel, (len(a.images) * pieces,), out.device,
            out, a.images.contiguous(), a.seed, a.step, num, pieces, a.stream, B=_BLOCKS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def philox_words(num_blocks: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Return the raw Philox words, their bits as int32 (N, num_blocks, 4). For tests."""
    out = torch.empty((len(images), num_blocks, 4), dtype=torch.int32, device=images.device)
    pieces = ceil_div(num_blocks, _BLOCKS)
    launch(
        _philox_words_kernel, (len(images) * pieces,), out.device,
        out, images.contiguous(), seed, step, num_blocks, pieces, stream, B=_BLOCKS,
    )  # fmt: skip
    return out
