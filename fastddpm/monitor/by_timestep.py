"""The loss by timestep: means over bins of t, kept on the device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 20


class LossByTimestep:
    """Mean loss of the images whose t falls into each of `bins` equal parts of 0..timesteps-1, since the last `read`.

    For each step: `begin`, `note` for each micro-batch, then `commit`. Between them `pending`, float32 (2, bins), holds
    the step's sums and counts; of several processes' their sum belongs there. With fewer timesteps than bins there is a
    bin for each.
    """

    def __init__(self, timesteps: int, device: torch.device, bins: int = BINS) -> None:
        self.timesteps, self.bins = timesteps, min(bins, timesteps)
        self._numbers = torch.arange(self.bins, device=device)
        self.pending = torch.zeros(2, self.bins, device=device)
        self._totals = torch.zeros(2, self.bins, dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Forget what is pending."""
        self.pending = torch.zeros_like(self.pending)

    @torch.no_grad()
    def note(self, per_image: Tensor, t: Tensor) -> None:
        """Add losses, (N,), of images at t, int64 (N,), to what is pending.

        By comparison and sum, not index_add, whose order of additions on a GPU changes from run to run.
        """
        inside = (t * self.bins // self.timesteps)[:, None] == self._numbers
        self.pending[0] += torch.where(inside, per_image.detach().float()[:, None], 0.0).sum(0)
        self.pending[1] += inside.sum(0)

    def commit(self, applied: Tensor) -> None:
        """Count the pending step if it was applied, a 0-d bool: one that is not finite would stay in every mean."""
        self._totals += torch.where(applied, self.pending, 0.0)

    def read(self) -> list[float | None]:
        """The mean of each bin since the last call, None for an empty one; waits for the device."""
        sums, counts = self._totals.tolist()
        self._totals.zero_()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    def state(self) -> list[list[float]]:
        """Sums and counts since the last `read`, for a checkpoint; waits for the device."""
        return self._totals.tolist()

    def load(self, state: Sequence[Sequence[float]] | None) -> None:
        """Take over what `state` gave; from nothing, or another number of bins, start anew."""
        self._totals.zero_()
        if state is not None and len(state) == 2 and all(len(row) == self.bins for row in state):
            self._totals.copy_(torch.tensor(state, dtype=torch.float64))
