"""The key of a training step's random numbers, which are a pure function of (seed, step, image)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseKey:
    """The key of every random number of one training step: t, flips, eps, dropout masks.

    `seed`, `step`: 0-d int64 tensors on the device of the images. `images`: int64 (N,), the position of each image in
    the global batch, so that splitting a batch changes nothing.
    """

    seed: Tensor
    step: Tensor
    images: Tensor

    @staticmethod
    def of(seed: int, step: int, images: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> "NoiseKey":
        """Make a key from plain numbers."""
        return NoiseKey(
            torch.tensor(seed, dtype=torch.int64, device=device),
            torch.tensor(step, dtype=torch.int64, device=device),
            torch.as_tensor(images, dtype=torch.int64).to(device),
        )

    @staticmethod
    def draw(num_images: int, device: torch.device) -> "NoiseKey":
        """Draw a key from torch's default generator, for code that keeps no seed of its own."""
        seed = torch.randint(2**62, (), device=device)
        return NoiseKey(seed, torch.zeros_like(seed), torch.arange(num_images, device=device))

    def part(self, start: int, end: int) -> "NoiseKey":
        """Return the key of images start..end-1 of this batch."""
        return NoiseKey(self.seed, self.step, self.images[start:end])
