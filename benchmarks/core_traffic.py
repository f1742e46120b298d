"""What convolutions of a network cost where cores share a cache and where they share none, with two builds in turn.

python benchmarks/core_traffic.py --before FOLDER [--preset cifar10] [--batch 8] [--precision fp32 bf16] [--rounds 30]
    [--out FILE.json]

A virtual machine's cores may be moved while it runs. Before and after each side's turn the time is taken that a cache
line needs from one core to another and back: turns between two figures of one kind are counted under it. A turn is
every 3x3 convolution of the network with stride 1, as training calls it. `--before FOLDER` names another build of the
compiled library, as for busy.py.
"""

import ctypes
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastddpm.kernels import interface, native
from fastddpm.kernels.conv3x3 import WINOGRAD_4X4, Role, bf16_algorithm_for, winograd_wins

sys.path.insert(0, str(Path(__file__).parent))
import core_pair
import machine
from busy import library_of
from convolution import Shape, shapes_of

ROLES: tuple[Role, ...] = ("training", "input gradient", "weight gradient")


class Turn:
    """All calls of one role with one library, and the tensors that they read and write."""

    def __init__(self, shapes: Sequence[Shape], batch: int, role: Role, bf16: bool, folder: Path | None) -> None:
        self.tensors: list[Tensor] = []
        self.threads = torch.get_num_threads()
        name = "conv_weight_gradient" if role == "weight gradient" else "conv"
        with library_of(folder):
            library = native.library()
            self.run = getattr(library, f"fastddpm_cpu_{name}")
            workspace_bytes = getattr(library, f"fastddpm_cpu_{name}_workspace")
        self.calls = [(self.arguments(shape, batch, role, bf16), shape.count) for shape in shapes]
        workspace = self.kept(
            max(workspace_bytes(ctypes.byref(args), self.threads) for args, _ in self.calls), dtype=torch.uint8
        )
        for args, _ in self.calls:
            args.workspace, args.workspace_bytes = workspace.data_ptr(), len(workspace)

    def kept(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.zeros(size, dtype=dtype) if dtype == torch.uint8 else torch.randn(size)
        self.tensors.append(tensor)
        return tensor

    def arguments(self, shape: Shape, batch: int, role: Role, bf16: bool) -> interface.Conv:
        factor = 2 if shape.doubled else 1
        side, channels, k = shape.size, shape.channels, shape.out_channels
        if role == "input gradient":  # a convolution of the output's gradient
            side, channels, k, factor = factor * side, k, channels, 1
        out = factor * side
        low = bf16_algorithm_for(role, 3, 1, channels, k, out, out, factor == 2) if bf16 else None
        x = self.kept(batch, side, side, channels)
        args = interface.Conv(
            x=x.data_ptr(), n=batch, height=side, width=side, c1=channels, k=k, kernel=3, stride=1, pad=1,
            doubled=factor == 2, x_stride=(ctypes.c_int64 * 4)(*x.stride()),
            weight_stride=(ctypes.c_int64 * 4)(9 * channels, 1, 3 * channels, channels),
            algorithm=WINOGRAD_4X4 if low is None else low,
            precision=interface.FLOAT32 if low is None else interface.BFLOAT16,
        )  # fmt: skip
        weight, image = self.kept(k, 3, 3, channels), self.kept(batch, out, out, k)
        if role == "weight gradient":
            args.grad, args.grad_weight = image.data_ptr(), weight.data_ptr()
        else:
            args.weight, args.out = weight.data_ptr(), image.data_ptr()
        return args

    def milliseconds(self) -> float:
        """Of all calls, the network's, after all of them once."""
        for args, _ in self.calls:
            native.check("conv", self.run(ctypes.byref(args), self.threads))
        start = perf_counter()
        for args, count in self.calls:
            for _ in range(count):
                self.run(ctypes.byref(args), self.threads)
        return 1e3 * (perf_counter() - start)


def measure(
    sides: dict[str, Turn], rounds: int, round_trip: Callable[[], float | None] = core_pair.round_trip_ns
) -> dict[str, Any]:
    """For each side and kind of turn, the median milliseconds and the number of turns."""
    found: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    calls = {name: side.milliseconds for name, side in sides.items()}
    for name, ms, kind in core_pair.turns(calls, rounds, round_trip):
        found[name, kind].append(ms)
    return {
        name: {of: {"ms": median(found[name, of]), "turns": len(found[name, of])} for of in ("shared", "apart")
               if found[name, of]}
        for name in sides
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(batch=[8], rounds=30)
    parser.add_argument("--before", type=Path, help="the folder of another _native.so")
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    options = machine.parse(parser, arguments)
    if core_pair.round_trip_ns() is None:
        parser.exit(2, "a C compiler with OpenMP is needed, which times a cache line's way between two cores\n")
    rows = []
    for batch in options.batch:
        shapes = [
            shape
            for shape in shapes_of(options.preset)
            if winograd_wins(batch, shape.channels, shape.out_channels, shape.size, shape.size)
        ]
        for precision in options.precision:
            for role in ROLES:
                builds = {"now": None} if options.before is None else {"before": options.before, "now": None}
                turns = {
                    name: Turn(shapes, batch, role, precision == "bf16", folder) for name, folder in builds.items()
                }
                rows.append({
                    "preset": options.preset, "batch": batch, "precision": precision, "role": role,
                    "sides": measure(turns, options.rounds),
                })  # fmt: skip
                for name, kinds in rows[-1]["sides"].items():
                    times = ", ".join(f"{of} {found['ms']:.1f} ms ({found['turns']})" for of, found in kinds.items())
                    print(f"{options.preset} batch {batch}, {precision}, {role}, {name}: {times}", flush=True)
                machine.write(options, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
