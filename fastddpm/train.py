"""python -m fastddpm.train: train a model, sample from it, pick up where it stopped.

The same command started by torchrun, once for each process, trains one model with all of them.
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.errors import UsageError
from fastddpm.presets import PRESETS, describe, preset, read_preset, write_preset
from fastddpm.runtime import cli, distributed
from fastddpm.storage.documents import difference, to_dict

if TYPE_CHECKING:
    import torch

    from fastddpm.data import Dataset
    from fastddpm.storage import checkpoint
    from fastddpm.training.trainer import Trainer

PROGRAM = "fastddpm.train"
DEFAULT_PRESET = "mnist"
# Of the optimisation, what a run may change as it goes on without becoming another one.
FREE_TO_CHANGE = {
    "steps", "accumulate", "compile", "checkpoint_blocks", "parallel", "log_every", "save_every", "keep", "patience",
    "preview_every", "preview_steps",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """Train a DDPM. Without options: digits, on this machine, in a few minutes."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = DEFAULT_PRESET
    """Configuration to start from; every option below overrides one of its values."""
    data: str | None = None
    """Images: a folder, .zip or .tar shards, parquet, LSUN's LMDB, CIFAR-10 as distributed, a .fdpack, or hf:NAME.
    Without it, the embedded digits."""
    resize: Literal["none", "area", "lanczos"] = "none"
    """For images of another size: crop to the centre square and resize."""
    skip_bad: bool = False
    """Leave out images that cannot be used, rather than stop with a list of them."""
    data_workers: int | None = None
    """Programs that decode, ahead of time, images of a set too large to be kept decoded; 0 for none of their own. One
    for each core, up to 8, unless given."""
    out: Path | None = None
    """Run directory. Without it, runs/PRESET, or runs/PRESET-2 and so on when that exists."""
    resume: bool = False
    """Continue the run in --out, or the newest one of this preset. Any number of processes may."""
    override: bool = False
    """With --resume: from here on train with another learning rate, batch or other option that changes the result."""
    timeout: float = 600.0
    """Several processes: seconds after which one that does not answer counts as lost, and the others stop."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA or ROCm device when there is one."""
    profile: int = 0
    """Trace this many steps, after a few others, into profile/trace.json.gz of the run."""
    wandb: str | None = None
    """Weights & Biases project to send the numbers and previews to, too."""
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
    group = distributed.group_from_environment()
    command, base, run = _parse(arguments, group)
    wanted = command.resolved()
    say = _to_stderr if group.is_main else _to_nobody
    say(describe(wanted, base))

    from fastddpm.ops.backend import OPERATIONS, obstacles
    from fastddpm.runtime.device import choose_device
    from fastddpm.training.signals import nothing_to_save

    device = choose_device(command.device, distributed.local_rank())
    for reason in sorted({reason for operation in OPERATIONS for reason in obstacles(operation, device.type)}):
        say(f"note: {reason}")
    with nothing_to_save(), distributed.process_group(group, device=device.type, timeout_s=command.timeout):
        distributed.assert_same(
            (to_dict(wanted), str(run.resolve()), device.type), "configuration, --out or device", group
        )
        dataset = _open_data(command, wanted, group, say)
        if command.dry_run:
            from fastddpm.training.dry_run import describe_run

            report = describe_run(wanted, dataset, device, group)
            if group.is_main:
                print(report)
            return
        _train(command, arguments, wanted, run, dataset, device, group, say)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _to_nobody(line: str) -> None:
    pass


def _parse(arguments: Sequence[str], group: distributed.ProcessGroup) -> tuple[Command, Preset, Path]:
    """The options, the configuration they start from (the saved one when resuming), and the run directory.

    A command that torchrun or SLURM has started again resumes the run that it had begun.
    """
    name = cli.peek(arguments, "--preset") or DEFAULT_PRESET
    base = preset(name)
    out = cli.peek(arguments, "--out")
    helps = "--help" in arguments or "-h" in arguments
    again = distributed.restarted() and out is not None and (Path(out) / "config.json").exists()
    resuming = ("--resume" in arguments or again) and not helps
    if resuming:
        run = Path(out) if out else _newest_run(name)
        if not (run / "config.json").is_file():
            raise UsageError(f"nothing to resume: {run} holds no run, that is no config.json")
        base = read_preset(run / "config.json")
        if cli.peek(arguments, "--preset") not in (None, base.name):
            raise UsageError(f"{run} is a run of preset {base.name}, not {name}; leave --preset out")
    default = Command(base.name, unet=base.unet, diffusion=base.diffusion, train=base.train, sample=base.sample)
    command = dataclasses.replace(cli.parse(Command, arguments, program=PROGRAM, default=default), resume=resuming)
    if not command.timeout > 0:
        raise UsageError(f"--timeout must be positive; got {command.timeout}")
    if command.data_workers is not None and command.data_workers < 0:
        raise UsageError(f"--data-workers must be 0 or more; got {command.data_workers}")
    if command.profile < 0:
        raise UsageError(f"--profile must be 0 or more steps; got {command.profile}")
    if not resuming:
        if command.out is None and (group.world_size > 1 or distributed.restarted()):
            raise UsageError("name the run's directory with --out, so that a restart finds it")
        run = command.out or _free_run(name)
        if not command.dry_run:
            _refuse_taken(run)
            cli.check_out(run)
        return command, base, run
    _refuse_changes(base, command, run)
    return command, base, run


def _refuse_taken(run: Path) -> None:
    if (run / "config.json").exists():
        raise UsageError(f"{run} holds a run already; --resume continues it, or choose another --out")


def _refuse_changes(base: Preset, command: Command, run: Path) -> None:
    """`UsageError` for another model, and without --override for another optimisation."""
    wanted = command.resolved()
    refused = [
        line for part in ("unet", "diffusion") for line in difference(getattr(base, part), getattr(wanted, part))
    ]
    if refused:
        raise UsageError(f"{run} cannot go on as another model: {'; '.join(refused)}. Start a new run instead")
    changed = [line for line in difference(base.train, wanted.train) if line.partition(":")[0] not in FREE_TO_CHANGE]
    if changed and not command.override:
        raise UsageError(f"{run} was trained otherwise: {'; '.join(changed)}. --override goes on so from here on")


def _open_data(
    command: Command, wanted: Preset, group: distributed.ProcessGroup, say: Callable[[str], None]
) -> "Dataset":
    """The data set; of several processes the first one opens it first, and so fills a cache for the others."""
    from fastddpm.data import open_dataset

    def opened() -> "Dataset":
        return open_dataset(
            command.data,
            image_size=wanted.unet.image_size,
            channels=wanted.unet.image_channels,
            resize=command.resize,
            skip_bad=command.skip_bad,
            report=say,
        )

    own: list[Dataset] = []
    distributed.on_main(lambda: own.append(opened()), group)
    dataset = own[0] if own else opened()
    distributed.assert_same((len(dataset.images), dataset.checksum), "the number of images or their sha256", group)
    say(f"data {dataset.name}: {len(dataset.images)} images, sha256 {dataset.checksum[:12]}")
    return dataset


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


def _train(
    command: Command,
    arguments: Sequence[str],
    wanted: Preset,
    run: Path,
    dataset: "Dataset",
    device: "torch.device",
    group: distributed.ProcessGroup,
    say: Callable[[str], None],
) -> None:
    from fastddpm.storage import checkpoint
    from fastddpm.training.loggers import JsonLines
    from fastddpm.training.samples import draw_final_samples
    from fastddpm.training.signals import interruptible
    from fastddpm.training.trainer import Trainer

    with contextlib.ExitStack() as held:

        def claim() -> None:
            if not command.resume:
                _refuse_taken(run)
            held.enter_context(checkpoint.lock(run))

        # First what can be refused: it leaves no directory behind.
        trainer = Trainer(wanted, dataset, device, group, data_workers=command.data_workers)
        held.callback(trainer.batches.close)
        distributed.on_main(claim, group)
        if command.resume:
            _go_on(trainer, run, group, say)
        log = None
        if group.is_main:
            write_preset(wanted, run / "config.json")
            log = JsonLines(run / "log.jsonl", trainer.step if command.resume else None)
            held.callback(log.close)
        _watch(command, arguments, trainer, run, held, say)
        last = trainer.run(run, log, dataset_source=command.data)
        with interruptible(f"{last} is saved; --resume draws the samples"), trainer.averaged_weights() as unet:
            pictures = draw_final_samples(unet, trainer.diffusion, wanted, run, group)
    if group.is_main:
        _tell(run, last, pictures)


def _tell(run: Path, last: Path, pictures: Sequence[Path]) -> None:
    print(f"checkpoint {last}")
    for path in pictures:
        print(f"{path.suffix[1:]:<10} {path}")
    print(f"next: python -m fastddpm.sample {shlex.quote(str(run))} --seeds 64-127")


def _go_on(trainer: "Trainer", run: Path, group: distributed.ProcessGroup, say: Callable[[str], None]) -> None:
    """Bring `trainer` to the newest checkpoint, if there is one; `UsageError` where that is behind its last step."""
    saved = _newest_checkpoint(run, group, say)
    if saved is not None:
        trainer.resume(saved)
    last = trainer.preset.train.steps
    if trainer.step > last:
        raise UsageError(f"{run} has taken {trainer.step} steps already; --steps {last} would end before that")
    say(f"resuming {run} at step {trainer.step}")


def _watch(
    command: Command,
    arguments: Sequence[str],
    trainer: "Trainer",
    run: Path,
    held: contextlib.ExitStack,
    say: Callable[[str], None],
) -> None:
    """Have the run watched as the options say, and note down what this process is."""
    from fastddpm.training.environment import record_session
    from fastddpm.training.loggers import Loggers, open_loggers
    from fastddpm.training.profiling import Profile
    from fastddpm.training.samples import Previews

    preset, dataset, group = trainer.preset, trainer.dataset, trainer.group
    own: list[Loggers] = []

    def begin() -> None:
        data = {"name": dataset.name, "checksum": dataset.checksum, "source": command.data}
        line = ["python", "-m", PROGRAM, *arguments]
        record_session(run, line, trainer.device, data, step=trainer.step, group=group)
        resume_step = trainer.step if command.resume else None
        own.append(open_loggers(run, preset, resume_step=resume_step, wandb=command.wandb, say=say))
        held.callback(own[0].close)

    distributed.on_main(begin, group)
    config = preset.train
    trainer.monitor.attach(
        loggers=own[0] if own else None,
        previews=Previews(run, preset, config.preview_every, config.preview_steps, group=group),
        profile=Profile(run, command.profile, trainer.device) if command.profile and group.is_main else None,
    )


def _newest_checkpoint(
    run: Path, group: distributed.ProcessGroup, say: Callable[[str], None]
) -> "checkpoint.Checkpoint | None":
    """The checkpoint to go on from: found and verified by the first process, and read by each."""
    from fastddpm.storage import checkpoint

    own: list[checkpoint.Checkpoint] = []

    def find() -> tuple[Path, list[str]] | None:
        saved = checkpoint.load_newest(run, say)
        if saved is None:
            return None
        own.append(saved)
        return saved.path, [*saved.tensors]

    found = distributed.on_main(find, group)
    if found is None or own:
        return own[0] if own else None
    return checkpoint.load(*found)


if __name__ == "__main__":
    cli.run(main)
