"""What the CPU benchmarks share: their options, clock and memory, and what a figure must say about its machine."""

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fastddpm.kernels import native

STATUS = Path("/proc/self/status")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the options of every benchmark: `batch` (a list), `rounds`, `out` (a path or None)."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    result.add_argument("--rounds", type=int, default=15)
    result.add_argument("--out", type=Path, help="write what is measured as JSON, too")
    return result


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with 2, saying why on stderr, for a mistake in them and without the compiled library."""
    options = parser.parse_args(arguments)
    reason = native.unavailable()
    if reason is not None:
        parser.exit(2, f"{reason}\n")
    return options


def write(options: argparse.Namespace, versions: Mapping[str, str] | None = None, **measured: Any) -> None:
    """The file that `--out` asks for, if it does: the machine with its `versions`, the rounds, what was measured."""
    if options.out is None:
        return
    document = {"machine": description() | dict(versions or {}), "rounds": options.rounds, **measured}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


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


def alternating(
    sides: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float] = perf_counter
) -> list[list[float]]:
    """Seconds of each side in each round, by `clock`. They take turns: a machine that slows down slows all of them.

    Each call is timed right after another of the same side, so that what it reads is where that side leaves it.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, times in zip(sides, seconds, strict=True):
            side()
            start = clock()
            side()
            times.append(clock() - start)
    return seconds


def medians(sides: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each side, `alternating`."""
    return [median(times) for times in alternating(sides, rounds)]


def peak_resident_set() -> float | None:
    """MiB, the most that this process has held; None where the system does not tell as Linux does.

    Of this program alone: getrusage counts what the process was before it.
    """
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
