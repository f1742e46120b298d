"""Steps that were not finite: counted on the device without waiting for it, and reported with their examples."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_KEPT = 64  # bad steps told at most between two looks


class LossAccumulator:
    """Losses since the last line of the log, and bad steps in a row: kept on the device, part of a checkpoint."""

    def __init__(self, device: torch.device, loss_sum: float = 0.0, steps: int = 0, bad_in_a_row: int = 0) -> None:
        self._values = torch.tensor([loss_sum, steps, bad_in_a_row], dtype=torch.float64, device=device)

    def add(self, loss: Tensor, applied: Tensor) -> None:
        """Count one step; 0-d tensors, not waited for."""
        good = applied.to(torch.float64)
        self._values[0] += torch.where(applied, loss, 0.0)
        self._values[1] += good
        self._values[2] = (self._values[2] + 1) * (1 - good)

    def read(self) -> tuple[float, int, int]:
        """(sum of the losses of good steps, their number, bad steps in a row); waits for the device."""
        loss_sum, steps, bad = self._values.tolist()
        return loss_sum, int(steps), int(bad)


class SkippedSteps:
    """The latest steps that were left out because their loss or gradient was not finite; kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._steps = torch.full((_KEPT,), -1, dtype=torch.int64, device=device)
        self._told = -1

    def add(self, step: int, applied: Tensor) -> None:
        """Note whether `step` was applied, a 0-d bool, not waited for."""
        self._steps = torch.where(
            applied, self._steps, torch.cat([self._steps[1:], torch.full_like(self._steps[:1], step)])
        )

    def new(self) -> list[int]:
        """Those not returned before; waits for the device."""
        found = [step for step in self._steps.tolist() if step > self._told]
        self._told = max([self._told, *found])
        return found


def log_skipped_steps(run: Path, steps: dict[int, list[int]]) -> None:
    """Tell of bad steps, each with the examples of its batch: a line on stderr, and one in `run`/not_finite.jsonl."""
    path = run / "not_finite.jsonl"
    with path.open("a", encoding="utf-8") as file:
        for step, examples in steps.items():
            file.write(json.dumps({"step": step, "examples": examples}) + "\n")
            print(f"step {step}: loss or gradient not finite; nothing was changed by it, see {path}", file=sys.stderr)


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None; waits for the device once."""
    floating = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floating:
        return None
    finite = torch.stack([torch.isfinite(t).all() for t in floating.values()]).tolist()
    return next((name for name, good in zip(floating, finite, strict=True) if not good), None)


# Speed and memory

_MIB = 2**20
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Lap:
    """Steps since the lap before: how many in a second, and the share of that time waited for data, 0..1."""

    steps_per_s: float
    data_wait: float


class Clock:
    """Times laps of a run that stands at `step`. What happens inside `exclude` belongs to none."""

    def __init__(self, step: int = 0, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin a lap at `step`."""
        self._begin(step, self._now())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around fetching a batch. On a GPU, which may be busy meanwhile, an upper bound of what it costs."""
        started = self._now()
        yield
        self._waited += self._now() - started

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """Around what is no step: saving, previews."""
        started = self._now()
        yield
        self._excluded += self._now() - started

    def lap(self, step: int) -> Lap:
        """The lap that ends with `step`; the next one begins."""
        now = self._now()
        seconds = max(1e-9, now - self._started - self._excluded)
        lap = Lap((step - self._step) / seconds, min(1.0, self._waited / seconds))
        self._begin(step, now)
        return lap

    def _begin(self, step: int, now: float) -> None:
        self._step, self._started = step, now
        self._waited = self._excluded = 0.0


def memory_mib(device: torch.device) -> float | None:
    """Of a GPU the most that tensors have taken so far; of a CPU what this process holds now (on Linux) or has held at
    most, in MiB; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (_MIB if sys.platform == "darwin" else 1024)


# The loss by timestep

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
