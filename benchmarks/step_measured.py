"""Time the kernels of a sampling or training step on a GPU, and set them beside those that step_cost.py lists.

    python benchmarks/step_measured.py --preset cifar10 --batch 256 --out FILE.json
    python benchmarks/step_measured.py --preset cifar10 --batch 128 --training --out FILE.json

PyTorch's profiler counts and times every kernel of `--steps` steps after the first ten. Kernels are told by their names
and summed by the kinds of the list: what is in none of the others is elementwise. A kind whose kernels are more than
predicted has work that the list does not know; one that takes more than its prediction shows a share in
`step_cost.Assumptions` that is not reached.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from step_cost import CHIPS, Assumptions, rows, sums
from step_trace import sampling_step, training_step
from torch.profiler import ProfilerActivity, profile

import fastddpm
from fastddpm.config import EngineConfig
from fastddpm.presets import PRESETS
from fastddpm.sampling.engine import PRECISIONS
from fastddpm.storage.files import write_json

# In order: a convolution of cuDNN may be called an implicit GEMM, and a copy may transpose.
KINDS = {
    "norm": r"group_norm_silu",
    "attention": r"^_attention|fastddpm.*attention|flash|fmha",
    "convolution": r"conv3x3_fp8|fprop|dgrad|wgrad|convolve|conv2d|implicit_gemm|winograd",
    "product": r"add_product|gemm|gemv|nvjet|cublas|splitk",
    "copy": r"memcpy|memset|copy|catarray|nchwtonhwc|nhwctonchw|transpose",
}
WARM_UP = 10
INSTRUCTIONS = 25  # an element of a norm, as step_cost.py has it by default


@dataclass(frozen=True)
class Kernel:
    """A kernel by the profiler's name: launches of it in a step, and their seconds together."""

    name: str
    count: float
    seconds: float

    @property
    def kind(self) -> str:
        """Which row of the list it belongs to."""
        return next(
            (kind for kind, names in KINDS.items() if re.search(names, self.name, re.IGNORECASE)), "elementwise"
        )


def profiled(step: Callable[[], object], steps: int) -> list[Kernel]:
    """The kernels of a step, those that take longest first."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return per_step(found.key_averages(), steps)


def per_step(events: Iterable[Any], steps: int) -> list[Kernel]:
    """What the profiler's averages over `steps` steps are for one; without the host's own calls, which take no time."""
    kernels = [Kernel(e.key, e.count / steps, 1e-6 * e.self_device_time_total / steps) for e in events]
    return sorted((one for one in kernels if one.seconds > 0), key=lambda one: -one.seconds)


def beside(
    predicted: Mapping[str, Mapping[str, float]], measured: Sequence[Kernel]
) -> dict[str, dict[str, float | None]]:
    """By kind and in all ("total"): kernels and ms, predicted and measured, and the share of the floor reached."""
    table: dict[str, dict[str, float | None]] = {}
    for kind in [*dict.fromkeys([*(k for k in predicted if k != "total"), *(one.kind for one in measured)]), "total"]:
        own = [one for one in measured if kind in (one.kind, "total")]
        listed = predicted.get(kind, {"kernels": 0.0, "floor_ms": 0.0, "predicted_ms": 0.0})
        ms = 1e3 * sum(one.seconds for one in own)
        table[kind] = {
            "kernels": listed["kernels"], "kernels_measured": sum(one.count for one in own),
            "floor_ms": listed["floor_ms"], "predicted_ms": listed["predicted_ms"], "ms": ms,
            "share_of_floor": listed["floor_ms"] / ms if ms else None,
        }  # fmt: skip
    return table


def sampling(preset: str, batch: int, engine: EngineConfig, device: torch.device) -> Callable[[], object]:
    """A step of a chain, again and again: the chain is as long as the process, and begins anew at its end."""
    config = PRESETS[preset]
    sampler = fastddpm.Sampler(
        fastddpm.UNet(config.unet).eval().to(device), fastddpm.Diffusion(config.diffusion), engine=engine
    )

    def steps() -> Iterable[None]:
        while True:
            with sampler.chain(range(batch)) as chain:
                for _ in range(sampler.steps):
                    chain.advance(False)
                    yield

    running = iter(steps())
    return lambda: next(running)


def training(preset: str, batch: int, precision: str, device: torch.device) -> Callable[[], object]:
    """A step of training on noise."""
    config = PRESETS[preset]
    config = replace(config, train=replace(config.train, batch=batch, precision=precision))
    shape = (2 * batch, *config.unet.image_shape)
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    classes = config.unet.num_classes
    labels = np.arange(len(pixels)) % classes if classes else None
    trainer = fastddpm.Trainer(config, fastddpm.data.Dataset.of(pixels, labels=labels, name="noise"), device)
    return trainer.train_step


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cifar10")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--chip", choices=CHIPS, help="rates of the list; default: by the GPU's name, or H200")
    parser.add_argument("--training", action="store_true", help="a training step instead of a sampling step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "kernels are timed on a GPU, and torch sees none\n")
    device, engine = torch.device("cuda", torch.cuda.current_device()), EngineConfig(precision=options.precision)
    if options.training:
        launches = training_step(options.preset, options.batch, PRECISIONS[options.precision])
        step = training(options.preset, options.batch, options.precision, device)
    else:
        launches = sampling_step(options.preset, options.batch, engine)
        step = sampling(options.preset, options.batch, engine, device)
    card = torch.cuda.get_device_name(device)
    chip = options.chip or next((name for name in CHIPS if name in card), "H200")
    predicted = sums(rows(launches, CHIPS[chip], Assumptions(), INSTRUCTIONS))
    kernels = profiled(step, options.steps)
    table = beside(predicted, kernels)
    for kind, one in table.items():
        print(
            f"{kind:12} kernels {one['kernels']:5.0f} listed {one['kernels_measured']:7.1f} measured   "
            f"floor {one['floor_ms']:6.2f}  predicted {one['predicted_ms']:6.2f}  measured {one['ms']:6.2f} ms"
        )
    if options.out is not None:
        found = machine.description() | {"device": card}
        document = {"machine": found, "chip": chip, "preset": options.preset, "batch": options.batch,
                    "training": options.training, "precision": options.precision, "kinds": table,
                    "kernels": [vars(one) | {"kind": one.kind} for one in kernels]}  # fmt: skip
        write_json(options.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
