"""Time the backends of every operation at a preset's shapes on this GPU, and keep which is the fastest.

    python benchmarks/tune_backends.py --preset cifar10 --out benchmarks/results/backends-sm_90.json
    python benchmarks/tune_backends.py --preset cifar10 --out FILE --install    # and into kernels/backends.json

Each call is timed in a CUDA graph; sides take turns. A backend counts only if its results are those of the one that the
order takes, up to rounding, and it is installed only if it saves 3 % of the time.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from resources import preset_calls
from shapes import Call, named
from tune import WORTH, agree, gpu_seconds, materialise, parse

from fastddpm.kernels import triton_tiles
from fastddpm.ops import backend, registry, timed
from fastddpm.presets import PRESETS
from fastddpm.storage.files import write_json

# Those that may take either's saved tensors for the gradient.
BACKENDS = ("triton", "cuda")


def compare(
    call: Call,
    device: torch.device,
    timer: Callable[[Callable[[], object]], float],
    rounds: int,
    backends: Sequence[str] = BACKENDS,
) -> dict[str, float]:
    """Return the median seconds of the call by each backend that takes it; the first is that of the order."""
    operation, arguments = call.name.removesuffix("_backward"), materialise(call, device)
    words = dict(zip(named(call), arguments, strict=True))
    runs: dict[str, Callable[[], Any]] = {}
    for name in backends:
        if not backend._exists(operation, name) or backend._problem(operation, name) is not None:
            continue
        module = importlib.import_module(f"fastddpm.kernels.{operation}.{name}")
        if backend._refusal(module, words) is None:
            runs[name] = lambda module=module: registry.call(module, call.name, arguments)
    if call.name == "reverse_step" or len(runs) < 2:  # in place: a result would be the next call's input
        return {}
    expected = next(iter(runs.values()))()
    runs = {name: run for name, run in runs.items() if agree(run(), expected)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timer(run))
    return {name: median(found) for name, found in times.items()}


def install(chip: str, found: Mapping[tuple[str, str], Mapping[str, float]], path: Path = timed.FILE) -> int:
    """Write the backends that save enough; a shape timed again is replaced, or left to the order. Returns how many."""
    table = json.loads(path.read_text(encoding="utf-8"))
    count = 0
    for (operation, shape), seconds in found.items():
        shapes = table.setdefault(chip, {}).setdefault(operation, {})
        shapes.pop(shape, None)
        first, best = next(iter(seconds)), min(seconds, key=lambda name: seconds[name])
        if seconds[best] <= WORTH * seconds[first]:
            shapes[shape] = best
            count += 1
    kept = {name: {one: shapes for one, shapes in table[name].items() if shapes} for name in table}
    write_json(path, {name: operations for name, operations in kept.items() if operations})
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cifar10")
    parser.add_argument("--batch", type=int, help="default: the preset's")
    options, device = parse(parser, arguments, "backends", timed.FILE)
    chip, found = triton_tiles.chip(device), {}
    for call in preset_calls(options.preset, options.batch or PRESETS[options.preset].train.batch, torch.bfloat16):
        key = (call.name.removesuffix("_backward"), timed.shape_of(named(call)))
        seconds = compare(call, device, gpu_seconds, options.rounds)
        if seconds:
            found[key] = seconds
            print(
                f"{' '.join(key)}: " + ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in seconds.items()), flush=True
            )
            rows = [{"operation": k[0], "shape": k[1], "seconds": v} for k, v in found.items()]
            write_json(options.out, {"chip": chip, "machine": torch.cuda.get_device_name(device), "timed": rows})
    if options.install:
        print(f"{install(chip, found)} of {len(found)} backends installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
