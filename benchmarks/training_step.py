"""A training step on the CPU, in float32 and bfloat16, ours and peers in turn; or what bfloat16 does to a short run.

python benchmarks/training_step.py [--preset mnist cifar10] [--precision fp32 bf16] [--batch N ..] [--rounds 9]
    [--no-compile] [--out FILE.json]
python benchmarks/training_step.py --compare-precisions 200 [--preset mnist] [--data DATA] [--batch N] [--out FILE.json]

The sides are those of bench_train.py (training_sides.py), in one process. A step is data, noise, forward, backward,
clipping, Adam and the average of the weights. The ratio of a precision is the time of its fastest peer over the faster
of ours, compiled or not. Batches: 32 for mnist, 2 and 8 for cifar10, unless given. --no-compile leaves out what
torch.compile takes minutes for. The same follows for the steps during which the cores shared a cache, or did not
(core_pair.py), where it changes.

`--compare-precisions N` takes N steps of the preset's run in each precision, from the same weights, images and noise,
and sets loss and gradient norm beside each other, step by step. The runs part, as any two that differ by rounding do:
the means of the last quarter say whether one learns less.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import fastddpm
from fastddpm.data import open_dataset
from fastddpm.runtime.memory import keep_freed_memory
from fastddpm.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
import core_pair
import machine

BATCHES = {"mnist": [32], "cifar10": [2, 8]}
PRECISIONS = ("fp32", "bf16")
FIGURES = ("loss", "gradient norm")


def measure(preset: str, batch: int, precisions: Sequence[str], peers: Sequence[str], rounds: int) -> dict[str, Any]:
    """One line of the table."""
    from training_sides import training_step

    sides = {(peer, p): training_step(peer, preset, batch, p) for p in precisions for peer in peers}
    for step in sides.values():  # compiles, allocates
        step()
        step()

    def milliseconds(step: Callable[[], object]) -> float:
        [[seconds]] = machine.alternating([step], 1)
        return 1e3 * seconds

    times: dict[Any, list[tuple[float, str | None]]] = {side: [] for side in sides}
    calls = {side: functools.partial(milliseconds, step) for side, step in sides.items()}
    for side, ms, kind in core_pair.turns(calls, rounds):
        times[side].append((ms, kind))
    row = {"preset": preset, "batch": batch, **compared(times, precisions, peers)}
    for state in ("shared", "apart"):
        of_kind = {side: [found for found in all_found if found[1] == state] for side, all_found in times.items()}
        if all(of_kind.values()):
            row[state] = compared(of_kind, precisions, peers)
            row[state]["steps"] = min(map(len, of_kind.values()))
    return row


def compared(times: dict[Any, list[tuple[float, str | None]]], precisions: Sequence[str], peers: Sequence[str]) -> Any:
    """The median milliseconds of each side, and the ratio of each precision."""
    ms = {p: {peer: median(time for time, _ in times[peer, p]) for peer in peers} for p in precisions}
    return {"ms": ms, "ratio": {p: ratio(ms[p]) for p in precisions}}


def ratio(ms: dict[str, float]) -> float:
    """How many times as fast as the fastest peer ours is, compiled or not."""
    ours, theirs = (min(time for peer, time in ms.items() if is_ours(peer) == mine) for mine in (True, False))
    return theirs / ours


def is_ours(peer: str) -> bool:
    return peer.startswith("fastddpm")


def losses_and_norms(preset: str, data: str | None, batch: int | None, steps: int, precision: str) -> np.ndarray:
    """(steps, 2), of the first steps of the preset's run."""
    config = fastddpm.preset(preset)
    train = replace(config.train, precision=precision, batch=batch or config.train.batch)
    images = open_dataset(data, image_size=config.unet.image_size, channels=config.unet.image_channels)
    trainer = Trainer(replace(config, train=train), images, torch.device("cpu"))
    return np.array([[float(value) for value in trainer.train_step()[:2]] for _ in range(steps)])


def difference(fp32: np.ndarray, bf16: np.ndarray) -> dict[str, dict[str, float]]:
    """Of loss and gradient norm: relative differences of the steps, and means of the last quarter of the steps."""
    relative, last = np.abs(bf16 - fp32) / fp32, -max(1, len(fp32) // 4)
    return {
        name: {
            "mean_difference": float(relative[:, i].mean()), "largest_difference": float(relative[:, i].max()),
            "last_quarter_fp32": float(fp32[last:, i].mean()), "last_quarter_bf16": float(bf16[last:, i].mean()),
        }
        for i, name in enumerate(FIGURES)
    }  # fmt: skip


def compare_precisions(options: argparse.Namespace) -> None:
    batch = options.batch[0] if options.batch else None
    rows = []
    for preset in options.preset:
        fp32, bf16 = (losses_and_norms(preset, options.data, batch, options.compare_precisions, p) for p in PRECISIONS)
        found = difference(fp32, bf16)
        print(f"{preset}, {len(fp32)} steps in bf16 beside fp32")
        for name, row in found.items():
            print(
                f"  {name:14} relative difference {row['mean_difference']:.1e} in the mean, "
                f"{row['largest_difference']:.1e} at most; last quarter {row['last_quarter_fp32']:.5f} in fp32, "
                f"{row['last_quarter_bf16']:.5f} in bf16",
                flush=True,
            )
        steps = {p: values.round(7).tolist() for p, values in zip(PRECISIONS, (fp32, bf16), strict=True)}
        rows.append({"preset": preset, "steps": len(fp32), **found, "losses_and_norms": steps})
        machine.write(options, rows=rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(batch=None, rounds=9)
    parser.add_argument("--preset", choices=tuple(BATCHES), nargs="+", help="default: both; compared: mnist")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--compare-precisions", type=int, metavar="N", help="steps to compare in place of times")
    parser.add_argument("--data", help="images of the compared runs. Default: the embedded digits")
    options = machine.parse(parser, arguments)
    if options.compare_precisions is not None:
        options.preset = options.preset or ["mnist"]
        if options.compare_precisions < 1 or (options.data is None and options.preset != ["mnist"]):
            parser.exit(2, "--compare-precisions needs one step or more, and --data for other images than digits\n")
        compare_precisions(options)
        return 0
    if importlib.util.find_spec("diffusers") is None:
        print("this compares with diffusers, which is not installed: pip install -e '.[diffusers]'", file=sys.stderr)
        return 2
    from peers import version
    from training_sides import PEERS

    peers = [peer for peer in PEERS if not (options.no_compile and "compile" in peer)]
    rows = []
    for preset in options.preset or BATCHES:
        for batch in options.batch or BATCHES[preset]:
            rows.append(measure(preset, batch, options.precision, peers, options.rounds))
            for precision, ms in rows[-1]["ms"].items():
                how = f"{rows[-1]['ratio'][precision]:.2f} times as fast as the fastest peer"
                print(f"{preset} batch {batch}, {precision}: {how}")
                for peer, time in ms.items():
                    print(f"  {peer:20} {time:8.1f} ms", flush=True)
                for kind in ("shared", "apart"):
                    if kind in rows[-1]:
                        times = ", ".join(f"{time:.1f}" for time in rows[-1][kind]["ms"][precision].values())
                        print(f"  caches {kind}: {rows[-1][kind]['ratio'][precision]:.2f} times; {times} ms")
            machine.write(options, {"diffusers": version("diffusers")}, rows=rows)
    return 0


if __name__ == "__main__":
    keep_freed_memory()  # as the command does; the peers have it, too
    sys.exit(main())
