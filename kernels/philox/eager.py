"""Philox4x32-10 in PyTorch operators: for any device, for torch.compile, without a compiled library."""

import math

import torch
from torch import Tensor

from .reference import KEY_INCREMENTS, MULTIPLIERS, ROUNDS

_MASK = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four int64 tensors of uint32 values for each broadcast counter (c0, c1, c2, c3).

    The counter words are int64 tensors, of which the low 32 bits are read; `seed` is an int64 tensor that broadcasts
    against them. Equal bit for bit to `reference.philox`.
    """
    x0, x1, x2, x3 = (c & _MASK for c in (c0, c1, c2, c3))
    # The keys of all rounds at once: on a GPU, each operator is a launch.
    rounds = torch.arange(ROUNDS, device=seed.device)
    keys0, keys1 = (
        (((word & _MASK).unsqueeze(-1) + rounds * increment) & _MASK).unbind(-1)
        for word, increment in zip((seed, seed >> 32), KEY_INCREMENTS, strict=True)
    )
    for k0, k1 in zip(keys0, keys1, strict=True):
        # int64 products wrap modulo 2^64, so their bits are those of the unsigned product.
        p0, p1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _MASK) ^ x1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ x3 ^ k1,
            p0 & _MASK,
        )
    return torch.broadcast_tensors(x0, x1, x2, x3)


def per_image_words(num_blocks: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> tuple[Tensor, ...]:
    """Return the four output words of blocks 0..num_blocks-1 of each image: int64, each (N, num_blocks).

    `images` is int64 (N,); `seed` and `step` are int64 scalars (0-d), or (N,) for one value per image.
    """
    block = torch.arange(num_blocks, device=images.device).unsqueeze(0)
    stream_word = torch.full((1, 1), stream, dtype=torch.int64, device=images.device)
    return philox(block, images.unsqueeze(1), step.reshape(-1, 1), stream_word, seed.reshape(-1, 1))


def normals(num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Return `num` standard normals per image, float32 (N, num): Box-Muller in float64, rounded once."""
    words = per_image_words((num + 3) // 4, images, seed, step, stream)
    w0, w1, w2, w3 = (w.to(torch.float64) for w in words)
    values = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        radius = torch.sqrt(-2.0 * torch.log(radius_word * 2.0**-32 + 2.0**-33))
        angle = angle_word * (2.0 * math.pi * 2.0**-32)
        values += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(values, dim=-1).flatten(1)[:, :num].to(torch.float32)
