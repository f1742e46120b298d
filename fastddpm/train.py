"""python -m fastddpm.train: train a model, sample from it, pick up where it stopped."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastddpm import cli
from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig, difference
from fastddpm.errors import UsageError
from fastddpm.presets import PRESETS, preset

if TYPE_CHECKING:
    from fastddpm.data import Dataset

PROGRAM = "fastddpm.train"
DEFAULT_PRESET = "mnist"


@dataclass(frozen=True)
class Command:
    """Train a DDPM. Without options: digits, on this machine, in a few minutes."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = DEFAULT_PRESET
    """Configuration to start from; every option below overrides one of its values."""
    data: str | None = None
    """Images: CIFAR-10 directory or tar.gz, parquet, folder or zip. Without it, the embedded digits."""
    resize: Literal["none", "area", "lanczos"] = "none"
    """For images of another size: crop to the centre square and resize."""
    skip_bad: bool = False
    """Leave out images that cannot be used, rather than stop with a list of them."""
    out: Path | None = None
    """Run directory. Without it, runs/PRESET, or runs/PRESET-2 and so on when that exists."""
    resume: bool = False
    """Continue the run in --out, or the newest one of this preset."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA or ROCm device when there is one."""
    dry_run: bool = False
    """Show shapes, parameters, memory and the time of one step; write nothing."""
    unet: tyro.conf.OmitArgPrefixes[UNetConfig] = dataclasses.field(default_factory=UNetConfig)
    diffusion: tyro.conf.OmitArgPrefixes[DiffusionConfig] = dataclasses.field(default_factory=DiffusionConfig)
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def resolved(self) -> Preset:
        """The configuration that these options give."""
        unet = dataclasses.replace(self.unet, learned_variance=self.diffusion.learned_variance)
        return Preset(self.preset, unet, self.diffusion, self.train, self.sample)


def main(arguments: Sequence[str]) -> None:
    command, base, run = _parse(arguments)
    wanted = command.resolved()
    print(cli.describe(wanted, base), file=sys.stderr)

    from fastddpm.data import open_dataset
    from fastddpm.device import choose_device
    from fastddpm.ops.backend import OPERATIONS, obstacles

    device = choose_device(command.device)
    for reason in sorted({reason for operation in OPERATIONS for reason in obstacles(operation, device.type)}):
        print(f"note: {reason}", file=sys.stderr)
    dataset = open_dataset(
        command.data,
        image_size=wanted.unet.image_size,
        channels=wanted.unet.image_channels,
        resize=command.resize,
        skip_bad=command.skip_bad,
        report=lambda line: print(line, file=sys.stderr),
    )
    print(f"data {dataset.name}: {len(dataset.images)} images, sha256 {dataset.checksum[:12]}", file=sys.stderr)
    if command.dry_run:
        from fastddpm.dry_run import describe_run

        print(describe_run(wanted, dataset, device))
        return
    _train(command, wanted, run, dataset, str(device))


def _parse(arguments: Sequence[str]) -> tuple[Command, Preset, Path]:
    """The options, the configuration they start from (the saved one when resuming), and the run directory."""
    name = cli.peek(arguments, "--preset") or DEFAULT_PRESET
    base = preset(name)
    out = cli.peek(arguments, "--out")
    resuming = "--resume" in arguments and "--help" not in arguments and "-h" not in arguments
    if resuming:
        run = Path(out) if out else _newest_run(name)
        base = cli.read_preset(run / "config.json")
    default = Command(base.name, unet=base.unet, diffusion=base.diffusion, train=base.train, sample=base.sample)
    command = cli.parse(Command, arguments, program=PROGRAM, default=default)
    if not resuming:
        return command, base, command.out or _free_run(name)
    refused = [
        line
        for part in ("unet", "diffusion")
        for line in difference(getattr(base, part), getattr(command.resolved(), part))
    ]
    if refused:
        raise UsageError(f"{run} cannot go on as another model: {'; '.join(refused)}. Start a new run instead")
    return command, base, run


def _runs(name: str) -> list[Path]:
    found = [path for path in Path("runs").glob(f"{name}*") if (path / "config.json").exists()]
    return [path for path in found if path.name == name or path.name.removeprefix(f"{name}-").isdigit()]


def _newest_run(name: str) -> Path:
    runs = _runs(name)
    if not runs:
        raise UsageError(f"nothing to resume: no run of preset {name} in {Path('runs').resolve()}; name one with --out")
    return max(runs, key=lambda path: (path / "config.json").stat().st_mtime)


def _free_run(name: str) -> Path:
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def _train(command: Command, wanted: Preset, run: Path, dataset: "Dataset", device: str) -> None:
    import torch

    from fastddpm import checkpoint
    from fastddpm.generate import save_run_samples
    from fastddpm.runlog import JsonLines
    from fastddpm.trainer import Trainer

    if not command.resume and (run / "config.json").exists():
        raise UsageError(f"{run} holds a run already; --resume continues it, or choose another --out")
    with checkpoint.lock(run):
        trainer = Trainer(wanted, dataset, torch.device(device))
        saved = None
        if command.resume:
            saved = checkpoint.load_newest(run, lambda line: print(line, file=sys.stderr))
            if saved is not None:
                trainer.resume(saved)
            print(f"resuming {run} at step {trainer.step}", file=sys.stderr)
        cli.write_preset(wanted, run / "config.json")
        log = JsonLines(run / "log.jsonl", trainer.step if command.resume else None)
        try:
            last = trainer.run(run, log, dataset_source=command.data)
        finally:
            log.close()
        with trainer.averaged_weights() as unet:
            pictures = save_run_samples(unet, trainer.diffusion, wanted, run)
    print(f"checkpoint {last}")
    for path in pictures:
        print(f"{path.suffix[1:]:<10} {path}")
    print(f"next: python -m fastddpm.sample {run} --seeds 64-127")


if __name__ == "__main__":
    cli.run(main)
