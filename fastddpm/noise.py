"""Randomness as a pure function of (seed, step, image): what a training step draws besides its noise."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.errors import UsageError
from fastddpm.kernels.philox import STREAM_EXAMPLE
from fastddpm.kernels.philox.eager import per_image_words

MAX_IMAGE = 2**32 - 1


@dataclass(frozen=True)
class NoiseKey:
    """Names every random number of one step: t, flips, eps, dropout masks.

    `seed`, `step`: 0-d int64 tensors on the images' device. `images`: int64 (N,), each image's place in
    the global batch, so that splitting a batch changes nothing.
    """

    seed: Tensor
    step: Tensor
    images: Tensor

    @staticmethod
    def of(seed: int, step: int, images: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> "NoiseKey":
        """A key from plain numbers."""
        return NoiseKey(
            torch.tensor(seed, dtype=torch.int64, device=device),
            torch.tensor(step, dtype=torch.int64, device=device),
            torch.as_tensor(images, dtype=torch.int64).to(device),
        )

    @staticmethod
    def draw(num_images: int, device: torch.device) -> "NoiseKey":
        """A key from torch's default generator, for code that keeps no seed of its own."""
        seed = torch.randint(2**62, (), device=device)
        return NoiseKey(seed, torch.zeros_like(seed), torch.arange(num_images, device=device))

    def part(self, start: int, end: int) -> "NoiseKey":
        """The key of images start..end-1 of this batch."""
        return NoiseKey(self.seed, self.step, self.images[start:end])


@dataclass(frozen=True)
class ExampleDraws:
    """What each training example draws: `t` int64 (N,) in 0..T-1, `flip` bool (N,), `drop_label` bool (N,)."""

    t: Tensor
    flip: Tensor
    drop_label: Tensor


def draw_examples(key: NoiseKey, timesteps: int, label_dropout: float = 0.0) -> ExampleDraws:
    """Independent draws: t uniform, flip with probability 1/2, drop_label with probability `label_dropout`."""
    for_t, for_flip, for_label, _ = per_image_words(1, key.images, key.seed, key.step, STREAM_EXAMPLE)
    return ExampleDraws(
        t=((for_t * timesteps) >> 32)[:, 0],
        flip=(for_flip < 2**31)[:, 0],
        drop_label=(for_label < int(label_dropout * 2**32))[:, 0],
    )


def image_seeds(seeds: Sequence[int]) -> list[int]:
    """`seeds` as a list; `UsageError` for one outside 0..2^32-1 (a counter word) or for none, TypeError for 1.5."""
    values = [operator.index(seed) for seed in seeds]
    if not values:
        raise UsageError("at least one seed is needed")
    wrong = [seed for seed in values if not 0 <= seed <= MAX_IMAGE]
    if wrong:
        raise UsageError(f"image seeds must be in 0..{MAX_IMAGE}; got {wrong[0]}")
    return values
