"""python -m fastddpm.train: train a model, draw samples from it, resume a run.

Under torchrun, which starts this command once per process, all processes train one model.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.errors import UsageError, all_problems, refuse
from fastddpm.presets import PRESETS, describe, read_preset, write_preset
from fastddpm.runtime import cli, distributed
from fastddpm.runtime.memory import keep_freed_memory
from fastddpm.runtime.options import Background, Device, Resize, SkipBad, quoted
from fastddpm.runtime.progress import announced, discard, log
from fastddpm.storage.documents import to_dict
from fastddpm.storage.files import check_out
from fastddpm.training import from_data, given, initial
from fastddpm.training.network_sizes import NETWORK_SIZES, NetworkSize
from fastddpm.training.runs import free_run, newest_checkpoint, newest_run
from fastddpm.training.saved import RunOptions, changed, refuse_changes

if TYPE_CHECKING:
    import torch

    from fastddpm.data import Dataset
    from fastddpm.storage import checkpoint
    from fastddpm.training.trainer import Trainer

PROGRAM = "fastddpm.train"
COMMON = (  # what --help shows; --help-all shows the rest
    "preset", "data", "init", "network", "minutes", "resize", "background", "skip_bad", "out", "resume", "device",
    "dry_run", "image_size", "image_channels", "num_classes", "steps", "batch", "accumulate", "lr", "precision",
    "guidance",
)  # fmt: skip
DEFAULT_PRESET = "mnist"


@dataclass(frozen=True)
class Command:
    """Train a DDPM. Default: the embedded digits, on this machine, in a few minutes. With --data alone: your images."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = DEFAULT_PRESET
    """Configuration to start from; every option below overrides one of its values. With --data and without --preset,
    what is not given is chosen from the images and the device, and said."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH|hf:NAME")] = None
    """Images: a folder, .zip or .tar shards, parquet, LSUN's LMDB, CIFAR-10 as distributed, a .fdpack, or hf:NAME.
    Default: the embedded digits."""
    init: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Model whose weights and architecture the run begins with, as for sample: a run, a checkpoint, a diffusers
    directory, a file, or digits. Optimizer and average begin anew. Default of --preset: the model's own settings."""
    network: Annotated[NetworkSize | None, tyro.conf.arg(metavar="|".join(NETWORK_SIZES))] = None
    """With --data and without --preset: size of the network. Default: tiny on a CPU, small or base on a GPU."""
    minutes: float | None = None
    """Train for about so many minutes, samples included, in place of --steps: the first steps are timed. Default: 30
    with --data and without --preset."""
    resize: Resize = "none"
    background: Background = None
    skip_bad: SkipBad = False
    allow_bad: float = 0.0
    """Leave out images that cannot be used if they are at most this share of all, 0 to 1. --skip-bad is 1."""
    data_workers: int | None = None
    """Worker processes that decode images ahead of training. Default: one per core, at most 8. 0: decode in the
    training process. Unused if the decoded data set fits in memory."""
    out: Path | None = None
    """Run directory. Default: runs/PRESET, or the first free one of runs/PRESET-2, runs/PRESET-3, .. if that exists."""
    resume: bool = False
    """Continue the run in --out, on the data and with the options that it was started with. Default of --out: the run
    in runs/ with the newest checkpoint, of --preset if that is given. The number of processes may change."""
    override: bool = False
    """With --resume: continue with another learning rate, batch or other option that changes the result."""
    timeout: float = 600.0
    """With several processes: seconds without an answer after which a process counts as lost and the others stop."""
    device: Device = "auto"
    profile: int = 0
    """Steps to trace, after a few others, into profile/trace.json.gz of the run. 0: no trace."""
    wandb: str | None = None
    """Weights & Biases project that gets the run's numbers and previews. Default: none."""
    dry_run: bool = False
    """Print block shapes, parameters, memory and the time of one step; write nothing."""
    unet: tyro.conf.OmitArgPrefixes[UNetConfig] = dataclasses.field(default_factory=UNetConfig)
    diffusion: tyro.conf.OmitArgPrefixes[DiffusionConfig] = dataclasses.field(default_factory=DiffusionConfig)
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def run_options(self) -> RunOptions:
        """Return the options that --resume takes again."""
        return RunOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RunOptions)})

    def resolved(self) -> Preset:
        """Return the configuration that these options describe."""
        unet = dataclasses.replace(self.unet, learned_variance=self.diffusion.learned_variance)
        return Preset(self.preset, unet, self.diffusion, self.train, self.sample)


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    group = distributed.group_from_environment()
    command, base, run = _parse(arguments, group)
    wanted = command.resolved()
    report = log if group.is_main else discard
    with announced("loading PyTorch", report):
        from fastddpm.runtime.device import choose_device
        from fastddpm.training.loggers import check_wandb
        from fastddpm.training.signals import nothing_to_save
        from fastddpm.training.trainer import Trainer, check_options

    check_options(wanted, group)
    check_wandb(command.wandb)
    device = choose_device(command.device, distributed.local_rank())
    with (
        nothing_to_save(),
        distributed.process_group(group, device=device.type, timeout_s=command.timeout),
        contextlib.ExitStack() as held,
    ):
        distributed.assert_same(
            (to_dict(wanted), str(run.resolve()), device.type), "configuration, --out or device", group
        )
        command, base, dataset = _prepared(command, arguments, base, device, group, report)
        wanted = command.resolved()

        def build(begins: bool = True) -> Trainer:
            network, origin = initial.begin(command.init if begins else None, wanted, report)
            with announced("building the network", report):
                trainer = Trainer(wanted, dataset, device, group, data_workers=command.data_workers, network=network)
            trainer.origin = origin
            held.callback(trainer.batches.close)
            return trainer

        if not command.dry_run:
            _train(command, arguments, wanted, base, run, build, group, report)
            return
        from fastddpm.training.dry_run import describe_run

        trainer = build()
        _describe(trainer, base, report)
        description = describe_run(trainer, report)
        if group.is_main:
            print(description)


def _describe(trainer: "Trainer", base: Preset, report: Callable[[str], None]) -> None:
    """Report the configuration, and what makes the run slow or too short. Comes last before the work, after errors."""
    from fastddpm.ops.backend import report_obstacles
    from fastddpm.training.length import report_too_short

    report(describe(trainer.preset, base))
    report_obstacles(trainer.device.type, report)
    config = trainer.preset.train
    report_too_short(config, config.steps, report, trainer.origin)
    if config.compile:
        report("note: the first step compiles the network, which takes minutes")


def _parse(arguments: Sequence[str], group: distributed.ProcessGroup) -> tuple[Command, Preset, Path]:
    """Return the options, the configuration they start from (on resume, the saved one), and the run directory.

    If torchrun or SLURM restarted this command, it resumes the run that it had begun.
    """
    name = cli.peek(arguments, "--preset") or (given.NAME if given.names_images(arguments) else DEFAULT_PRESET)
    out = cli.peek(arguments, "--out")
    helps = not {"-h", "--help", "--help-all"}.isdisjoint(arguments)
    again = distributed.restarted() and out is not None and (Path(out) / "config.json").exists()
    resuming = ("--resume" in arguments or again) and not helps
    options = RunOptions()
    model = None if resuming or helps else initial.preset_of_model(cli.peek(arguments, "--init"))
    if resuming:
        run = Path(out) if out else newest_run(cli.peek(arguments, "--preset"))
        if not (run / "config.json").is_file():
            raise UsageError(f"nothing to resume: {run} holds no run (there is no config.json in it)")
        base = read_preset(run / "config.json")
        if cli.peek(arguments, "--preset") not in (None, base.name):
            raise UsageError(f"{run} is a run of preset {base.name}, not {name}; leave --preset out")
        options = RunOptions.read(run)
        options.check_init(cli.peek(arguments, "--init"), run)
    with all_problems():
        if not resuming:
            base = from_data.starting_point(name, arguments, group.world_size, model)
        command = dataclasses.replace(_command(arguments, base, options, model), resume=resuming)
        refuse(_problems(command))
        asked = "--resume" in arguments
        refuse(given.problems(arguments, name, command.allow_bad, command.minutes, resuming=asked))
        command.resolved()
    if not resuming:
        if command.out is None and (group.world_size > 1 or distributed.restarted()):
            raise UsageError("name the run's directory with --out, so that a restart finds it")
        run = command.out or free_run(base.name)
        if not command.dry_run:
            _refuse_taken(run)
            check_out(run)
        return command, base, run
    refuse_changes(base, command.resolved(), run, override=command.override)
    check_out(run)
    return command, base, run


def _problems(command: Command) -> Iterator[str]:
    if not 0 < command.timeout <= distributed.MAX_TIMEOUT_S:
        yield f"--timeout must be more than 0 and at most {distributed.MAX_TIMEOUT_S:,} s; got {command.timeout}"
    if command.data_workers is not None and command.data_workers < 0:
        yield f"--data-workers must be 0 or more; got {command.data_workers}"
    if command.profile < 0:
        yield f"--profile must be 0 or more steps; got {command.profile}"


def _command(arguments: Sequence[str], base: Preset, options: RunOptions, model: Preset | None) -> Command:
    """Return the options of the command line, whose defaults are those of `base` and `options`.

    `model`: the configuration of the model that --init names, whose weights the network must fit.
    """
    default = Command(
        base.name, unet=base.unet, diffusion=base.diffusion, train=base.train, sample=base.sample, **vars(options)
    )
    command = cli.parse(Command, arguments, program=PROGRAM, common=COMMON, default=default)
    if model is None:
        return command
    return dataclasses.replace(command, unet=initial.fitted(command.resolved().unet, model.unet))


def _prepared(
    command: Command,
    arguments: Sequence[str],
    base: Preset,
    device: "torch.device",
    group: distributed.ProcessGroup,
    report: Callable[[str], None],
) -> tuple[Command, Preset, "Dataset"]:
    """Open the data. Return it with the options, to which what the images and --minutes decide is added."""
    new = not command.resume
    model = initial.preset_of_model(command.init) if new else None
    if new and command.preset == given.NAME:
        from fastddpm.training.trainer import check_options

        assert command.data is not None
        chosen = from_data.choose_here(command.data, given.Given.of(arguments, model), device, group, report)
        base = chosen.preset
        command = dataclasses.replace(_command(arguments, base, chosen.options, model), minutes=chosen.minutes)
        check_options(command.resolved(), group)
    dataset = _open_data(command, command.resolved(), group, report)
    if new and command.minutes is not None:
        from fastddpm.training.time_budget import steps_within

        wanted, workers = command.resolved(), command.data_workers
        steps = steps_within(command.minutes, wanted, dataset, device, group, data_workers=workers, report=report)
        base = from_data.with_steps(base, steps)
        command = _command(arguments, base, command.run_options(), model)
    return command, base, dataset


def _refuse_taken(run: Path) -> None:
    if (run / "config.json").exists():
        raise UsageError(f"{run} holds a run already; continue it with --resume, or choose another --out")


def _open_data(
    command: Command, wanted: Preset, group: distributed.ProcessGroup, report: Callable[[str], None]
) -> "Dataset":
    """Open the data set. Rank 0 opens it first and fills the cache for the others."""
    from fastddpm.data import open_dataset
    from fastddpm.data.order import check_batch

    def opened() -> "Dataset":
        return open_dataset(
            command.data,
            image_size=wanted.unet.image_size,
            channels=wanted.unet.image_channels,
            resize=command.resize,
            background=command.background,
            skip_bad=command.run_options().bad_share,
            report=report,
        )

    own: list[Dataset] = []
    distributed.on_main(lambda: own.append(opened()), group)
    dataset = own[0] if own else opened()
    distributed.assert_same((len(dataset.images), dataset.checksum), "the number of images or their sha256", group)
    check_batch(len(dataset.images), wanted.train.batch)
    report(f"data {dataset.name}: {len(dataset.images)} images, sha256 {dataset.checksum[:12]}")
    return dataset


def _train(
    command: Command,
    arguments: Sequence[str],
    wanted: Preset,
    base: Preset,
    run: Path,
    build: Callable[[bool], "Trainer"],
    group: distributed.ProcessGroup,
    report: Callable[[str], None],
) -> None:
    from fastddpm.pretrained.run import check_fit
    from fastddpm.storage import checkpoint
    from fastddpm.training.page import try_write_page
    from fastddpm.training.run_log import JsonLines
    from fastddpm.training.samples import draw_final_samples
    from fastddpm.training.signals import interruptible

    with contextlib.ExitStack() as held:

        def claim() -> None:
            if not command.resume:
                _refuse_taken(run)
            held.enter_context(checkpoint.lock(run))

        saved = None
        if command.resume:
            distributed.on_main(claim, group)
            with announced(f"reading the newest checkpoint of {run}", report):
                saved = newest_checkpoint(run, group, report)
            if saved is not None:
                check_fit(wanted.unet, saved.tensors.get("model", {}), saved.path)  # before the network takes memory
        trainer = build(saved is None)
        if command.resume:
            _resume(trainer, run, saved, report)
            saved = None  # its tensors are several times the network's memory
        else:  # only now, because the lines above can raise, and this makes the run directory
            distributed.on_main(claim, group)
        log = None
        if group.is_main:
            write_preset(wanted, run / "config.json")
            command.run_options().write(run)
            log = JsonLines(run / "log.jsonl", trainer.step if command.resume else None)
            held.callback(log.close)
            held.callback(try_write_page, run, training=False)  # also if it stops or fails
        with announced("opening the loggers", report):
            _attach_loggers(command, arguments, trainer, base, run, held, report)
        _describe(trainer, base, report)
        last = trainer.run(run, log, dataset_source=command.data)
        with interruptible(f"{last} is saved; --resume draws the samples"), trainer.averaged_weights() as unet:
            pictures = draw_final_samples(unet, trainer.diffusion, wanted, run, group)
    if group.is_main:
        _print_paths(run, last, [*pictures, *run.glob("index.html")])


def _print_paths(run: Path, last: Path, pictures: Sequence[Path]) -> None:
    for path in (last, *pictures):
        print(f"{path.suffix[1:] or 'checkpoint':<10} {path}")
    print(f"next: python -m fastddpm.sample {quoted(str(run))} --seeds 64-127")


def _resume(
    trainer: "Trainer", run: Path, saved: "checkpoint.Checkpoint | None", report: Callable[[str], None]
) -> None:
    """Load the checkpoint, if there is one, into `trainer`. Raises `UsageError` if its step is beyond --steps."""
    if saved is not None:
        trainer.resume(saved)
    last = trainer.preset.train.steps
    if trainer.step > last:
        raise UsageError(
            f"{run} has taken {trainer.step} steps already; --steps {last} would end before that, choose more"
        )
    report(f"resuming {run} at step {trainer.step}")


def _attach_loggers(
    command: Command,
    arguments: Sequence[str],
    trainer: "Trainer",
    base: Preset,
    run: Path,
    held: contextlib.ExitStack,
    report: Callable[[str], None],
) -> None:
    """Attach loggers, previews and profiler as the options ask, and record this session in environment.json."""
    from fastddpm.training.environment import record_session
    from fastddpm.training.loggers import Loggers, open_loggers
    from fastddpm.training.profiling import Profile
    from fastddpm.training.samples import Previews
    from fastddpm.training.saved import TrainingData

    preset, dataset, group = trainer.preset, trainer.dataset, trainer.group
    own: list[Loggers] = []

    def begin() -> None:
        data = to_dict(TrainingData.of(dataset, command.data)) | {"images": len(dataset.images)}
        line = ["python", "-m", PROGRAM, *arguments]
        others, origin = changed(base, preset) if command.resume else [], trainer.origin
        record_session(run, line, trainer.device, data, step=trainer.step, changed=others, origin=origin, group=group)
        resume_step = trainer.step if command.resume else None
        own.append(open_loggers(run, preset, resume_step=resume_step, wandb=command.wandb, report=report))
        held.callback(own[0].close)

    distributed.on_main(begin, group)
    trainer.monitor.attach(
        loggers=own[0] if own else None,
        previews=Previews(run, preset, preset.train.preview_every, preset.train.preview_steps, group=group),
        profile=Profile(run, command.profile, trainer.device) if command.profile and group.is_main else None,
    )


if __name__ == "__main__":
    keep_freed_memory()  # of this process alone, not of a caller of main
    cli.run(main)
