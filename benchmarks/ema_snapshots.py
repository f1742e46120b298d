"""What snapshots of power-function averages cost: training steps with and without the two averages, in turn.

python benchmarks/ema_snapshots.py --rounds 15 --out FILE.json
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import machine
import numpy as np
import torch

import fastddpm
from fastddpm.data import Dataset
from fastddpm.training.snapshots import average
from fastddpm.training.trainer import Trainer


def trainer_of(name: str, batch: int, snapshots: int) -> Trainer:
    """A trainer of a preset on noise. `snapshots`: 1 with the averages, 0 without."""
    preset = fastddpm.preset(name)
    preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, batch=batch, ema_snapshots=snapshots))
    unet = preset.unet
    shape = (256, unet.image_channels, unet.image_size, unet.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(images), dtype=np.int64) % max(1, unet.num_classes)
    return Trainer(preset, Dataset(images, labels, "noise", "0" * 64), torch.device("cpu"))


def seconds(trainer: Trainer) -> float:
    start = perf_counter()
    trainer.train_step()
    return perf_counter() - start


def seconds_of_update(trainer: Trainer) -> float:
    """Of the two averages alone, as a step updates them."""
    optimizer = trainer.optimizer
    start = perf_counter()
    with torch.no_grad():
        for averages in optimizer.power_averages.values():
            torch._foreach_lerp_(averages, optimizer.parameters, 1e-4)
    return perf_counter() - start


def measure(name: str, batch: int, rounds: int) -> dict[str, object]:
    """Medians of a step's seconds, of the ratios of neighbours and of the update alone, in turn; writing and reading.

    `update_share`: of the update in a step, by the medians of neighbours; the ratio has the noise of two whole steps.
    """
    plain, both = (trainer_of(name, batch, snapshots) for snapshots in (0, 1))
    for trainer in (plain, both):
        seconds(trainer)
    rows = [(seconds(plain), seconds(both), seconds_of_update(both)) for _ in range(rounds)]
    with tempfile.TemporaryDirectory() as directory:
        writing = []
        for _ in range(10):
            start = perf_counter()
            both.save_snapshot(Path(directory))
            writing.append(perf_counter() - start)
            both.step += 1
        files = [path.stat().st_size for path in Path(directory).glob("snapshots/*/*")]
        start = perf_counter()
        average(Path(directory), 0.15)
        averaging = perf_counter() - start
    return {
        "parameters": sum(p.numel() for p in plain.network.parameters()),
        "step_s": median(a for a, _, _ in rows),
        "step_with_averages_s": median(b for _, b, _ in rows),
        "ratio": median(b / a for a, b, _ in rows),
        "update_s": median(c for _, _, c in rows),
        "update_share": median(c / a for a, _, c in rows),
        "snapshot_s": median(writing),
        "snapshot_bytes": sum(files) // 10,
        "average_of_20_s": averaging,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = machine.parse(machine.parser(__doc__), arguments)
    results = {
        f"{name}, batch {batch}": measure(name, batch, options.rounds)
        for name, batches in (("mnist", (128,)), ("cifar10", options.batch))
        for batch in batches
    }
    for name, found in results.items():
        print(name, *(f"{key} {value:.4g}" for key, value in found.items()), sep="  ")
    machine.write(options, results=results)


if __name__ == "__main__":
    sys.exit(main())
