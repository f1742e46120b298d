"""List every GPU kernel of one sampling or training step with bytes, FLOPs and floor, and predict the step's time.

    python benchmarks/step_cost.py --preset cifar10 --batch 256
    python benchmarks/step_cost.py --preset cifar10 --batch 256 --off one_product --off carried_biases
    python benchmarks/step_cost.py --preset cifar10 --batch 128 --training
    python benchmarks/step_cost.py --preset cifar10 --batch 256 --out FILE.json

Arithmetic, not a measurement: the step runs on tensors without memory, and nothing is computed. The floor of a kernel
is the larger of its bytes over the memory's rate and its FLOPs over the matrix units' rate. The prediction divides both
by the shares in `Assumptions`, which nobody has measured yet.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
from limits import H200, Chip
from step_memory import fitting, peak_of
from step_trace import Launch, sampling_step, state_bytes, training_step

from fastddpm.config import EngineConfig
from fastddpm.presets import PRESETS
from fastddpm.sampling.engine import PRECISIONS
from fastddpm.storage.files import write_json

# Rates of a chip by name; bytes/s of a copy and FLOP/s of a product, both measured, on an H100 by others.
CHIPS = {"H200": H200, "H100": Chip(3.0e12, 790e12, 34e12)}
MULTIPROCESSORS, CLOCK = 132, 1.755e9  # of both; Hz
TILE = 128  # rows and columns of a product that one multiprocessor computes at a time


@dataclass(frozen=True)
class Assumptions:
    """Shares of a chip's rates that kernels reach, and seconds that each launch costs in a graph.

    Those of sampling were measured on an H200 in bf16 (benchmarks/results/h200-steps-2026-11-26.json and h200-trials).
    """

    launch: float = 1.1e-6
    elementwise: float = 0.93  # of the memory's rate
    norm: float = 0.65  # the same, for norms
    copy: float = 0.50  # of the memory's rate, for copies of 2-byte elements that change the order
    convolution: float = 0.92  # of the matrix units' rate, if tiles fill all multiprocessors
    narrow: float = 0.19  # of the memory's rate, for a convolution with at most 8 output channels
    narrow_input: float = 0.22  # the same, with at most 8 input channels; conv3x3_in is as a norm
    product: float = 0.62  # of the matrix units' rate
    product_bytes: float = 0.84  # of the memory's rate
    attention: float = 0.28  # of the matrix units' rate
    issue: float = 0.79  # of the instructions that the multiprocessors can issue
    host: float = 8e-6  # seconds that the host takes for a kernel that it launches by itself, from PyTorch's eager mode

    def seconds(self, one: Launch, chip: Chip, instructions: float) -> float:
        """Predicted seconds of a launch. `instructions`: for each element of a norm's output."""
        memory, matrix = one.num_bytes / chip.bytes_per_s, one.flop / chip.matrix_flops
        if one.kind == "norm":
            slots = MULTIPROCESSORS * 4 * 32 * CLOCK
            return self.launch + max(memory / self.norm, one.elements * instructions / slots / self.issue)
        if one.kind == "convolution":
            narrow = self.narrow_input if one.channels[0] <= 8 else self.narrow
            ends = memory / (narrow if min(one.channels) <= 8 and "conv3x3" not in one.name else self.norm)
            return self.launch + max(ends, matrix / (self.convolution * _filled(one)))
        if one.kind == "product":
            return self.launch + max(memory / self.product_bytes, matrix / self.product)
        if one.kind == "attention":
            return self.launch + max(memory / self.elementwise, matrix / self.attention)
        if one.kind == "copy":
            return self.launch + memory / self.copy
        float64 = one.float64_flop / chip.float64_flops
        return self.launch + max(memory / self.elementwise, float64 / self.copy)


def _filled(one: Launch) -> float:
    """Return the share of the multiprocessors that a convolution's tiles keep busy, over all waves."""
    if not one.rows:
        return 1.0
    tiles = -(-one.rows // TILE) * -(-max(one.channels[1], TILE) // TILE)
    waves = -(-tiles // MULTIPROCESSORS)
    return tiles / (waves * MULTIPROCESSORS)


@dataclass(frozen=True)
class Row:
    """Launches that do the same work."""

    kind: str
    name: str
    count: int
    num_bytes: int
    flop: int
    floor: float  # seconds, of all
    predicted: float


def rows(launches: Sequence[Launch], chip: Chip, assumed: Assumptions, instructions: float) -> list[Row]:
    """Return the table of a step, in order of first use."""
    groups: dict[Launch, int] = {}
    for one in launches:
        groups[one] = groups.get(one, 0) + 1
    return [
        Row(
            one.kind, one.name, count, count * one.num_bytes, count * one.flop, count * floor(one, chip),
            count * assumed.seconds(one, chip, instructions),
        )
        for one, count in groups.items()
    ]  # fmt: skip


def floor(one: Launch, chip: Chip) -> float:
    """Return the seconds below which no implementation of this kernel can be."""
    return max(one.num_bytes / chip.bytes_per_s, one.flop / chip.matrix_flops, one.float64_flop / chip.float64_flops)


def sums(table: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return kernels, GB, GFLOP, floor and predicted time (ms) by kind of kernel, and in all ("total")."""
    found: dict[str, dict[str, float]] = {}
    for row in table:
        for kind in (row.kind, "total"):
            one = found.setdefault(kind, dict.fromkeys(("kernels", "gb", "gflop", "floor_ms", "predicted_ms"), 0))
            one["kernels"] += row.count
            one["gb"] += row.num_bytes / 1e9
            one["gflop"] += row.flop / 1e9
            one["floor_ms"] += 1e3 * row.floor
            one["predicted_ms"] += 1e3 * row.predicted
    total = found.pop("total")
    return {kind: {name: round(value, 4) for name, value in one.items()} for kind, one in found.items()} | {
        "total": {name: round(value, 4) for name, value in total.items()}
    }


def main(arguments: Sequence[str] | None = None) -> int:
    switches = [field.name for field in dataclasses.fields(EngineConfig) if field.type is bool]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cifar10")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--chip", choices=CHIPS, default="H200")
    parser.add_argument("--training", action="store_true", help="a training step instead of a sampling step")
    parser.add_argument("--off", choices=switches, action="append", default=[], help="engine switch to turn off")
    parser.add_argument("--on", choices=switches, action="append", default=[], help="engine switch to turn on")
    parser.add_argument("--instructions", type=float, default=25, help="issued for each element of a norm, default 25")
    parser.add_argument("--each", action="store_true", help="also the sums of the step without each engine switch")
    parser.add_argument("--out", type=Path, help="JSON file to write the table to")
    options = parser.parse_args(arguments)
    changed = dict.fromkeys(options.off, False) | dict.fromkeys(options.on, True)
    engine = EngineConfig(**{"precision": options.precision, **changed})
    assumed = Assumptions()

    def table_of(engine: EngineConfig) -> list[Row]:
        if options.training:
            launches = training_step(options.preset, options.batch, PRECISIONS[options.precision])
        else:
            launches = sampling_step(options.preset, options.batch, engine)
        return rows(launches, CHIPS[options.chip], assumed, options.instructions)

    def peak(batch: int) -> int:
        dtype = PRECISIONS[options.precision]
        if not options.training:
            return peak_of(lambda: sampling_step(options.preset, batch, engine))
        return peak_of(lambda: training_step(options.preset, batch, dtype)) + state_bytes(options.preset, dtype)

    table, without = table_of(engine), {}
    memory, fits = fitting(peak, options.batch)
    host = assumed.host * sum(row.count for row in table)
    if options.each:
        for name in switches:
            if getattr(engine, name):
                without[name] = sums(table_of(dataclasses.replace(engine, **{name: False})))["total"]
    print(f"{'kind':12} {'kernel':52} {'x':>4} {'MB':>9} {'GFLOP':>8} {'floor':>9} {'predicted, us':>13}")
    for row in table:
        print(
            f"{row.kind:12} {row.name:52} {row.count:4} {row.num_bytes / 1e6:9.1f} {row.flop / 1e9:8.1f} "
            f"{1e6 * row.floor:9.1f} {1e6 * row.predicted:13.1f}"
        )
    print()
    for kind, one in sums(table).items():
        print(
            f"{kind:12} {one['kernels']:4.0f} kernels {one['gb']:8.3f} GB {one['gflop']:8.1f} GFLOP "
            f"floor {one['floor_ms']:6.2f} ms, predicted {one['predicted_ms']:6.2f} ms"
        )
    print(
        f"memory {memory / 1e9:.2f} GB at its peak; largest batch: {', '.join(f'{n} in {c}' for c, n in fits.items())}"
    )
    print(f"host {1e3 * host:.2f} ms at {1e6 * assumed.host:.0f} us a launch (assumed), one launch if captured")
    for name, total in without.items():
        print(
            f"without {name:24} {total['kernels']:4.0f} kernels {total['gb']:7.3f} GB, "
            f"floor {total['floor_ms']:6.2f} ms, predicted {total['predicted_ms']:6.2f} ms"
        )
    if options.out:
        given = {name: value for name, value in vars(options).items() if name != "out"}
        write_json(options.out, {
            "arithmetic": "tensors without memory, nothing measured", "machine": machine.description(),
            "options": given,
            "assumptions": dataclasses.asdict(assumed), "rates": dataclasses.asdict(CHIPS[options.chip]),
            "sums": sums(table), "memory_gb": round(memory / 1e9, 3), "largest_batch": fits,
            "host_ms": round(1e3 * host, 3), "without": without, "kernels": [dataclasses.asdict(row) for row in table],
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
