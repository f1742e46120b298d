"""How fast a run goes: steps in the time spent on steps, the share of it spent waiting for data, and memory."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_MIB = 2**20
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Lap:
    """Steps since the lap before: how many in a second, and the share of that time waited for data, 0..1."""

    steps_per_s: float
    data_wait: float


class Clock:
    """Times laps of a run that stands at `step`. What happens inside `aside` belongs to none."""

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
    def aside(self) -> Iterator[None]:
        """Around what is no step: saving, previews."""
        started = self._now()
        yield
        self._aside += self._now() - started

    def lap(self, step: int) -> Lap:
        """The lap that ends with `step`; the next one begins."""
        now = self._now()
        seconds = max(1e-9, now - self._started - self._aside)
        lap = Lap((step - self._step) / seconds, min(1.0, self._waited / seconds))
        self._begin(step, now)
        return lap

    def _begin(self, step: int, now: float) -> None:
        self._step, self._started = step, now
        self._waited = self._aside = 0.0


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
