"""What each call of `fastddpm.ops` must move and compute, and the time below which no implementation can be.

    python benchmarks/limits.py --preset cifar10 --batch 128

Arithmetic, not a measurement: every input read once and every output written once, at the copying speed of the memory;
products at the speed of a large matrix product; float64 operations at the datasheet's speed. The slowest of the three
is the floor.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from shapes import Call, describe, distinct, named, network_calls, step_calls
from torch import Tensor

from fastddpm.presets import PRESETS


@dataclass(frozen=True)
class Chip:
    """Rates of a GPU: bytes/s of a copy, read and written; FLOP/s of a bf16 matrix product; FLOP/s of float64."""

    bytes_per_s: float
    matrix_flops: float
    float64_flops: float


# One H200: a device-to-device copy of 8.6 GB and a bf16 product of 8192^3 on random data, both through PyTorch 2.11;
# float64 as NVIDIA's datasheet has it, not measured.
H200 = Chip(4.3e12, 790e12, 34e12)

# Of float64 in a normal: half of a Box-Muller pair, counted in kernels/philox/triton.py.
_FLOAT64_A_NORMAL = 29
# Read by index, a few bytes of each.
_TABLES = ("table", "timesteps")


@dataclass(frozen=True)
class Limit:
    """Bytes that must be moved, FLOPs of matrix products and of float64, and their floor on a chip in microseconds."""

    num_bytes: int
    matrix_flop: int
    float64_flop: int

    def floor_us(self, chip: Chip = H200) -> float:
        seconds = (
            self.num_bytes / chip.bytes_per_s,
            self.matrix_flop / chip.matrix_flops,
            self.float64_flop / chip.float64_flops,
        )
        return 1e6 * max(seconds)


def limit(call: Call) -> Limit:
    """Of one call; what it is given in place is read and written."""
    arguments = named(call)
    results = getattr(torch.ops.fastddpm, call.name)(*call.args)
    outputs = [results] if isinstance(results, Tensor) else list(results or [])
    if call.name == "reverse_step":
        outputs += [arguments["x"]]
        variance, out = arguments["variance"], arguments["out"]
        if variance == 0 and out.shape[1] > arguments["x"].shape[1]:
            arguments["out"] = out[:, : arguments["x"].shape[1]]
    inputs = [value for name, value in arguments.items() if isinstance(value, Tensor) and name not in _TABLES]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *outputs])
    return Limit(num_bytes, _matrix_flop(call), _FLOAT64_A_NORMAL * _normals(call))


def _matrix_flop(call: Call) -> int:
    """Two products forward (scores, output), five backward (scores, and dV, dP, dQ, dK)."""
    if not call.name.startswith("attention"):
        return 0
    n, tokens, channels = call.args[0].shape
    return 2 * n * tokens**2 * channels * (5 if call.name.endswith("backward") else 2)


def _normals(call: Call) -> int:
    arguments = named(call)
    if call.name == "random_normal":
        return int(torch.Size(arguments["shape"]).numel() * len(arguments["images"]))
    if call.name in ("q_sample", "reverse_step") and arguments["noise"] is None:
        return int(arguments["x0" if call.name == "q_sample" else "x"].numel())
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cifar10")
    parser.add_argument("--batch", type=int, help="default: the preset's")
    options = parser.parse_args()
    batch = options.batch or PRESETS[options.preset].train.batch
    calls = [*network_calls(options.preset, batch, torch.bfloat16, training=True)]
    calls += step_calls(options.preset, batch, torch.bfloat16)
    print(f"{options.preset}, batch {batch}, bf16; floors on one H200 (arithmetic)\n")
    print(f"{'operation':25} {'first tensor':18} {'calls':>5} {'MB':>8} {'GFLOP':>8} {'floor, us':>10}")
    for call, count in distinct(calls):
        bound = limit(call)
        print(
            f"{call.name:25} {describe(call):18} {count:5} {bound.num_bytes / 1e6:8.2f} "
            f"{bound.matrix_flop / 1e9:8.2f} {bound.floor_us():10.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
