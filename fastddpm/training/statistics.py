"""Statistics of the training loop: losses, skipped steps, speed, memory, loss by timestep. Sums stay on the device."""

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

from fastddpm.runtime.progress import log
from fastddpm.storage.files import open_to_append

_KEPT = 64  # latest skipped steps that are remembered


class LossAccumulator:
    """Losses since the last log line, and skipped steps in a row, as float64 on the device. Saved in checkpoints."""

    def __init__(self, device: torch.device, loss_sum: float = 0.0, steps: int = 0, bad_in_a_row: int = 0) -> None:
        self._values = torch.tensor([loss_sum, steps, bad_in_a_row], dtype=torch.float64, device=device)

    def add(self, loss: Tensor, applied: Tensor) -> None:
        """Count one step, from its 0-d `loss` and 0-d bool `applied`, without a synchronization."""
        good = applied.to(torch.float64)
        self._values[0] += torch.where(applied, loss, 0.0)
        self._values[1] += good
        self._values[2] = (self._values[2] + 1) * (1 - good)

    def read(self) -> tuple[float, int, int]:
        """Return (sum of losses of applied steps, their number, skipped steps in a row). Waits for the device."""
        loss_sum, steps, bad = self._values.tolist()
        return loss_sum, int(steps), int(bad)


class SkippedSteps:
    """The latest 64 steps that were skipped because their loss or gradient was not finite, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._steps = torch.full((_KEPT,), -1, dtype=torch.int64, device=device)
        self._last_returned = -1

    def add(self, step: int, applied: Tensor) -> None:
        """Note `step` if it was skipped. `applied`: 0-d bool; it is not synchronized."""
        self._steps = torch.where(
            applied, self._steps, torch.cat([self._steps[1:], torch.full_like(self._steps[:1], step)])
        )

    def new(self) -> list[int]:
        """Return the skipped steps that were not returned before. Waits for the device."""
        found = [step for step in self._steps.tolist() if step > self._last_returned]
        self._last_returned = max([self._last_returned, *found])
        return found


def log_skipped_steps(run: Path, steps: dict[int, list[int]]) -> None:
    """Report skipped steps on stderr, and append each with its batch's examples to `run`/not_finite.jsonl."""
    path = run / "not_finite.jsonl"
    run.mkdir(parents=True, exist_ok=True)  # no checkpoint may have been saved yet
    with open_to_append(path, log) as file:
        for step, examples in steps.items():
            file.write(json.dumps({"step": step, "examples": examples}) + "\n")
            log(f"step {step}: loss or gradient not finite; the step was skipped, its examples are listed in {path}")


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinity, or None. Waits for the device once."""
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
    """Steps per second since the last lap, and the fraction of that time spent waiting for data, 0..1."""

    steps_per_s: float
    data_wait: float


class Clock:
    """Times laps of a run, beginning at `step`. Time inside `exclude` is not counted."""

    def __init__(self, step: int = 0, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin a new lap at `step`."""
        self._begin(step, self._now())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data. An upper bound on a GPU, which may be computing meanwhile."""
        started = self._now()
        yield
        self._waited += self._now() - started

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """Leave the block, such as saving or a preview, out of the lap."""
        started = self._now()
        yield
        self._excluded += self._now() - started

    def lap(self, step: int) -> Lap:
        """Return the lap that ends with `step`, and begin the next one."""
        now = self._now()
        seconds = max(1e-9, now - self._started - self._excluded)
        lap = Lap((step - self._step) / seconds, min(1.0, self._waited / seconds))
        self._begin(step, now)
        return lap

    def _begin(self, step: int, now: float) -> None:
        self._step, self._started = step, now
        self._waited = self._excluded = 0.0


def memory_mib(device: torch.device) -> float | None:
    """Return the memory in use, in MiB.

    On a GPU the peak of all tensors so far; on a CPU the process's resident size now (Linux) or its peak (elsewhere).
    None on Windows, which does not report it.
    """
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
    """Mean loss of the images in each of `bins` equal ranges of t in 0..timesteps-1, since the last `read`.

    For each step: `begin`, `note` for each micro-batch, then `commit`. `pending`, float32 (2, bins), holds the step's
    sums and counts; before `commit` it must be summed over processes. At most one bin per timestep.
    """

    def __init__(self, timesteps: int, device: torch.device, bins: int = BINS) -> None:
        self.timesteps, self.bins = timesteps, min(bins, timesteps)
        self._numbers = torch.arange(self.bins, device=device)
        self.pending = torch.zeros(2, self.bins, device=device)
        self._totals = torch.zeros(2, self.bins, dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Discard the pending step."""
        self.pending = torch.zeros_like(self.pending)

    @torch.no_grad()
    def note(self, per_image: Tensor, t: Tensor) -> None:
        """Add the losses `per_image`, (N,), of images at `t`, int64 (N,), to the pending step.

        Not by index_add, whose order of additions on a GPU is not deterministic.
        """
        inside = (t * self.bins // self.timesteps)[:, None] == self._numbers
        self.pending[0] += torch.where(inside, per_image.detach().float()[:, None], 0.0).sum(0)
        self.pending[1] += inside.sum(0)

    def commit(self, applied: Tensor) -> None:
        """Count the pending step if it was `applied` (0-d bool); a loss that is not finite would spoil the means."""
        self._totals += torch.where(applied, self.pending, 0.0)

    def read(self) -> list[float | None]:
        """Return the mean of each bin since the last call, None for an empty bin. Waits for the device."""
        sums, counts = self._totals.tolist()
        self._totals.zero_()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    def state_dict(self) -> list[list[float]]:
        """Return the sums and the counts since the last `read`, as lists. Waits for the device."""
        return self._totals.tolist()

    def load_state_dict(self, state: Sequence[Sequence[float]] | None) -> None:
        """Restore what `state_dict` returned; start from zero if `state` is None or has another number of bins."""
        self._totals.zero_()
        if state is not None and len(state) == 2 and all(len(row) == self.bins for row in state):
            self._totals.copy_(torch.tensor(state, dtype=torch.float64))
