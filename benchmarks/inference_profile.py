"""Where the time of a forward pass of the prepared CIFAR-10 network goes, and how far it is from the processor's peak.

python benchmarks/inference_profile.py [--batch 1 8] [--rounds 15] [--out FILE.json]

Every call of the library is timed in its place, the medians of one kind's calls added up. "floor" is what their
multiplications would take at the rate of PyTorch's product of two 1024 x 1024 matrices in the same process: for
Winograd those of its 36 products, so that what it takes beyond is its transforms, and memory.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fastddpm.kernels import native
from fastddpm.kernels.conv3x3 import WINOGRAD_4X4
from fastddpm.sampling.engine import PreparedUNet

sys.path.insert(0, str(Path(__file__).parent))
import machine
from inference_sides import random_weights

SIDE = 1024


def kind_and_flops(name: str, args: Any) -> tuple[str, float]:
    """What a call is counted under, and twice its multiplications."""
    if name == "attention":
        return name, 4 * args.n * args.l**2 * args.c
    if name != "conv":
        return name, 0
    factor = 2 if args.doubled else 1
    height, width = args.height * factor // args.stride, args.width * factor // args.stride
    channels = (args.c1 + args.c2) * args.k
    if args.algorithm == WINOGRAD_4X4:
        return "convolution by Winograd", 2 * 36 * args.n * -(-height // 4) * -(-width // 4) * channels
    kind = f"{args.kernel}x{args.kernel} convolution by patches"
    return kind, 2 * args.n * height * width * channels * args.kernel**2


def measure(batch: int, rounds: int) -> dict[str, Any]:
    """One table."""
    network = PreparedUNet(random_weights(), [500])
    network(torch.randn(batch, 3, 32, 32), torch.full((batch,), 500))
    plan = network._plan
    assert plan is not None
    x, out = torch.randn(batch, 32, 32, 3), torch.empty(batch, 32, 32, 3)  # what the last call left is gone
    plan._input.x, plan._output.out = x.data_ptr(), out.data_ptr()
    threads, library = torch.get_num_threads(), native.library()
    matrix = torch.randn(SIDE, SIDE)
    calls: list[Callable[[], object]] = [lambda: torch.mm(matrix, matrix)]
    labels = []
    for name, args in plan._calls:
        function = getattr(library, f"fastddpm_cpu_{name}")
        calls.append(lambda function=function, args=args: function(ctypes.byref(args), threads))
        labels.append(kind_and_flops(name, args))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds_of_call in zip(calls, times, strict=True):
            start = perf_counter()
            call()
            seconds_of_call.append(perf_counter() - start)
    product, *seconds = map(median, times)
    rate = 2 * SIDE**3 / product
    kinds: dict[str, dict[str, float]] = {}
    for (kind, flops), time in zip(labels, seconds, strict=True):
        total = kinds.setdefault(kind, {"calls": 0, "ms": 0.0, "gflop": 0.0, "floor_ms": 0.0})
        total["calls"] += 1
        total["ms"] += 1e3 * time
        total["gflop"] += flops / 1e9
        total["floor_ms"] += 1e3 * flops / rate
    return {"batch": batch, "product_gflop_per_s": rate / 1e9, "kinds": kinds}


def main(arguments: Sequence[str] | None = None) -> int:
    options = machine.parse(machine.parser(__doc__), arguments)
    tables = []
    for batch in options.batch:
        tables.append(measure(batch, options.rounds))
        print(f"batch {batch}; torch.mm: {tables[-1]['product_gflop_per_s']:.0f} GFLOP/s")
        for kind, total in tables[-1]["kinds"].items():
            print(
                f"  {kind:30} {total['calls']:3.0f} calls {total['ms']:7.1f} ms   floor {total['floor_ms']:7.1f} ms"
                f"   {total['gflop']:6.2f} GFLOP"
            )
    machine.write(options, tables=tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
