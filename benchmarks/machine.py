"""What a figure must say about where it was measured."""

import datetime
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fastddpm.kernels import native


def description() -> dict[str, Any]:
    """Processor, threads, versions and date."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "instruction_set": native.isa() if native.unavailable() is None else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def alternating(sides: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each side, which take turns: a machine that slows down slows all of them.

    Each call is timed right after another of the same side, so that what it reads is where that side leaves it.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, times in zip(sides, seconds, strict=True):
            side()
            start = perf_counter()
            side()
            times.append(perf_counter() - start)
    return [median(times) for times in seconds]
