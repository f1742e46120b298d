"""python -m fastddpm.ablation: the paper's table 2, prediction target by loss and variance, at small scale."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastddpm.errors import UsageError
from fastddpm.evaluation.options import BitsOptions
from fastddpm.evaluation.table2 import CELLS, chosen_cells, configuration
from fastddpm.presets import PRESETS, preset
from fastddpm.runtime import cli
from fastddpm.runtime.options import Device, parse_numbers

PROGRAM = "fastddpm.ablation"


@dataclass(frozen=True)
class Command:
    """Train each configuration of the paper's table 2 and compare what comes out; a finished one is not repeated."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "mnist"
    """Network and optimisation. The process is the paper's: linear, without classes, sampled with all its steps."""
    data: str | None = None
    """Images, as for training; the embedded digits unless given. Every tenth is held out for the likelihood."""
    out: Path = Path("runs/ablation")
    """Directory of the runs and of table.md and table.json. Run again, the command goes on where it stopped."""
    steps: int | None = None
    """Training steps of each configuration; the preset's own unless given."""
    seeds: str = "0"
    """Each configuration is trained once for each: numbers and ranges, as in 0-2."""
    cells: str = ",".join(cell.name for cell in CELLS)
    """Which configurations."""
    samples: int = 500
    """Images drawn from each."""
    timesteps: int | None = None
    """T; fewer than 1000 are for a trial only, as the schedule is made for those."""
    network: str = "digits"
    """Feature network of the scores; none for the likelihood alone."""
    bits: BitsOptions = dataclasses.field(default_factory=lambda: BitsOptions(images=200, every=20))
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError(f"--samples must be at least 2; got {self.samples}")


def main(arguments: Sequence[str]) -> None:
    command = cli.parse(Command, arguments, program=PROGRAM)
    base, cells, seeds = preset(command.preset), chosen_cells(command.cells), parse_numbers(command.seeds, "seeds")
    runs = [
        (cell, seed, configuration(base, cell, seed, steps=command.steps, timesteps=command.timesteps))
        for seed in seeds
        for cell in cells
    ]
    cli.check_out(command.out)

    from fastddpm.data import open_dataset
    from fastddpm.evaluation.ablation import AblationRunner, Result, Scorer, split, write_tables
    from fastddpm.runtime.device import choose_device

    device = choose_device(command.device)
    dataset = open_dataset(command.data, image_size=base.unet.image_size, channels=base.unet.image_channels)
    trained_on, held_out = split(dataset)
    scorer = None if command.network == "none" else Scorer.of(command.network, trained_on, device)
    runner = AblationRunner(command.out, trained_on, held_out, scorer, command.samples, command.bits, device)
    results: dict[str, list[Result]] = {}
    described = (
        f"{base.name} network on {dataset.name}, {runs[0][2].train.steps} steps, T = {runs[0][2].diffusion.timesteps}, "
        f"seeds {command.seeds}, {command.samples} samples against {len(trained_on.images)} images, bits/dim of "
        f"{command.bits.images or len(held_out.images)} held-out images. The paper's numbers are of CIFAR-10 after "
        "800,000 steps and of the Inception network: their order can be compared, not their size."
    )
    for number, (cell, seed, config) in enumerate(runs, 1):
        print(f"{number} of {len(runs)}: {cell.predicts}, {cell.objective}, seed {seed}", file=sys.stderr)
        results.setdefault(cell.name, []).append(runner.result(f"{cell.name}-{seed}", config))
        table = write_tables({cell: results.get(cell.name, []) for cell in cells}, runner, described)
    print(table)
    print(f"table {command.out / 'table.md'}")


if __name__ == "__main__":
    cli.run(main)
