"""python -m fastddpm.ablation: the paper's table 2 at small scale, prediction target by loss and variance."""

import dataclasses
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
from fastddpm.runtime.progress import announced, log
from fastddpm.storage.files import check_out

PROGRAM = "fastddpm.ablation"


@dataclass(frozen=True)
class Command:
    """Train the configurations of the paper's table 2 and compare them. A finished one is not repeated."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "mnist"
    """Preset of network and optimisation. The diffusion is the paper's: linear schedule, no classes, all T steps."""
    data: str | None = None
    """Images: any source that training takes as --data. Every tenth is held out for the likelihood.
    Default: the embedded digits."""
    out: Path = Path("runs/ablation")
    """Directory for the runs, table.md and table.json. The same command resumes there."""
    steps: int | None = None
    """Training steps of each configuration. Default: those of the preset."""
    seeds: str = "0"
    """Each configuration is trained once for each seed. Numbers and ranges, as in 0-2."""
    cells: str = ",".join(cell.name for cell in CELLS)
    """Configurations to train, separated by commas."""
    samples: int = 500
    """Images drawn from each configuration for the scores, at least 2."""
    timesteps: int | None = None
    """T, the number of diffusion steps. Default: that of the preset.
    Fewer than 1000 are for trials only, because the schedule is made for 1000."""
    network: str = "digits"
    """Feature network of the scores, as --features of the evaluate command. none: only the likelihood."""
    bits: BitsOptions = dataclasses.field(default_factory=lambda: BitsOptions(images=200, every=20))
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError(f"--samples must be at least 2; got {self.samples}")


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    command = cli.parse(Command, arguments, program=PROGRAM)
    base, cells, seeds = preset(command.preset), chosen_cells(command.cells), parse_numbers(command.seeds, "seeds")
    runs = [
        (cell, seed, configuration(base, cell, seed, steps=command.steps, timesteps=command.timesteps))
        for seed in seeds
        for cell in cells
    ]
    check_out(command.out)

    with announced("loading PyTorch"):
        from fastddpm.data import open_dataset
        from fastddpm.evaluation.ablation import AblationRunner, Result, Scorer, split, write_tables
        from fastddpm.evaluation.bits_per_dim import Plan
        from fastddpm.metrics.networks import check_network
        from fastddpm.ops.backend import report_obstacles
        from fastddpm.runtime.device import choose_device
        from fastddpm.training.length import report_too_short

    device = choose_device(command.device)
    size, channels = base.unet.image_size, base.unet.image_channels
    if command.network != "none":
        check_network(command.network, image_size=size, channels=channels)
    dataset = open_dataset(command.data, image_size=size, channels=channels)
    trained_on, held_out = split(dataset)
    config = runs[0][2]  # all have these steps, timesteps and averages
    Plan.of(len(held_out.images), config.diffusion.timesteps, command.bits)
    report_obstacles(device.type, log)
    report_too_short(config.train, config.train.steps, log)
    scorer = None if command.network == "none" else Scorer.of(command.network, trained_on, device)
    runner = AblationRunner(command.out, trained_on, held_out, scorer, command.samples, command.bits, device)
    for cell, seed, own in runs:
        runner.recorded(f"{cell.name}-{seed}", own)
    results: dict[str, list[Result]] = {}
    described = (
        f"{base.name} network on {dataset.name}, {config.train.steps} steps, T = {config.diffusion.timesteps}, "
        f"seeds {command.seeds}, {command.samples} samples against {len(trained_on.images)} images, bits/dim of "
        f"{command.bits.images or len(held_out.images)} held-out images. The paper's numbers are from CIFAR-10 after "
        "800,000 steps and the Inception network: compare their order, not their size."
    )
    for number, (cell, seed, config) in enumerate(runs, 1):
        log(f"{number} of {len(runs)}: {cell.predicts}, {cell.objective}, seed {seed}")
        results.setdefault(cell.name, []).append(runner.result(f"{cell.name}-{seed}", config))
        table = write_tables({cell: results.get(cell.name, []) for cell in cells}, runner, described)
    print(table)
    print(f"table {command.out / 'table.md'}")


if __name__ == "__main__":
    cli.run(main)
