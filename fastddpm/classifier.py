"""python -m fastddpm.classifier MODEL: train a classifier of noisy images, whose gradient guides the model's chain."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastddpm.config import Preset
from fastddpm.errors import UsageError, all_problems, problem, refuse
from fastddpm.presets import PRESETS, preset
from fastddpm.runtime import cli, distributed
from fastddpm.runtime.options import Background, Device, Resize, SkipBad, check_checkpoint, quoted
from fastddpm.runtime.progress import announced, counted, log
from fastddpm.sampling.classifier_config import ClassifierConfig, ClassifierTraining
from fastddpm.storage.documents import difference, from_stored, read_json, to_dict
from fastddpm.storage.files import check_out, write_json
from fastddpm.training.saved import RunOptions

if TYPE_CHECKING:
    from fastddpm.data import Dataset

PROGRAM = "fastddpm.classifier"
COMMON = (  # what --help shows; --help-all shows the rest
    "preset", "data", "resize", "out", "resume", "device", "steps", "batch", "lr", "precision", "width", "save_every",
)  # fmt: skip
CONFIG = "classifier.json"  # not config.json, which marks the run of a model
FREE_TO_CHANGE = {"steps", "log_every", "save_every", "keep"}  # on --resume
NETWORK = ("width", "multipliers", "blocks", "attention_resolutions", "dropout")


@dataclass(frozen=True)
class Overrides:
    """What of the model's own network and training the classifier shall have otherwise; None: as the model."""

    steps: int | None = None
    """Optimizer steps of the whole training, including those before a resume. Default: the model's."""
    batch: int | None = None
    """Images per optimizer step. Default: the model's."""
    lr: float | None = None
    """Learning rate of Adam after warm-up. Default: the model's."""
    warmup: int | None = None
    """Steps of linear learning rate warm-up. Default: the model's."""
    decay: Literal["none", "cosine"] | None = None
    """Learning rate after warm-up: constant (none), or a cosine to zero at the last step. Default: the model's."""
    precision: Literal["fp32", "bf16"] | None = None
    """bf16: run the network under autocast. Default: the model's."""
    seed: int | None = None
    """Seed of initial weights, data order, t, noise and dropout: 64 bits, -2^63..2^63-1. Default: the model's."""
    log_every: int | None = None
    """Steps between lines of the log. Default: the model's."""
    save_every: int | None = None
    """Steps between checkpoints. Default: the model's."""
    keep: int | None = None
    """Number of checkpoints to keep; older ones are removed. Default: the model's."""
    width: int | None = None
    """Channels of the first level. Default: the model's."""
    multipliers: tuple[int, ...] | None = None
    """Channels of each level, as multiples of width. Default: the model's."""
    blocks: int | None = None
    """Residual blocks per level. Default: the model's."""
    attention_resolutions: tuple[int, ...] | None = None
    """Feature map sizes, in pixels, at which attention follows every residual block. Default: the model's."""
    dropout: float | None = None
    """Dropout probability in each residual block. Default: the model's."""

    def __post_init__(self) -> None:
        ClassifierTraining(**self._given(of_network=False))  # raises UsageError for values that suit no training

    def _given(self, *, of_network: bool) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if value is not None and (name in NETWORK) == of_network
        }

    def applied_to(self, config: ClassifierConfig) -> ClassifierConfig:
        """Return `config` with what is given here. Raises `UsageError` for impossible values."""
        return dataclasses.replace(
            config,
            unet=dataclasses.replace(config.unet, **self._given(of_network=True)),
            train=dataclasses.replace(config.train, **self._given(of_network=False)),
        )


@dataclass(frozen=True)
class Command:
    """Train a classifier of noisy images, for guidance: half of the model's U-Net, on the x_t of its process.

    Use it with sample MODEL --classifier DIRECTORY --classifier-scale S.
    """

    checkpoint: Annotated[
        Path | None,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="MODEL",
            help="The model to guide, as for sample: a run, a checkpoint, a diffusers directory, a file, or digits. "
            "The classifier has its process, its size of network and its training options.",
        ),
    ] = None
    preset: Annotated[str | None, tyro.conf.arg(metavar="|".join(PRESETS))] = None
    """In place of MODEL: a configuration whose models the classifier shall guide."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH|hf:NAME")] = None
    """Labelled images: any source that train takes as --data. Default: the embedded digits."""
    resize: Resize = "none"
    background: Background = None
    skip_bad: SkipBad = False
    out: Path | None = None
    """Directory of the classifier. Default: classifier in the run directory of the model, or runs/PRESET-classifier."""
    resume: bool = False
    """Continue the training in --out, on its data and with its options; only --steps, --log-every, --save-every and
    --keep may be others."""
    device: Device = "auto"
    overrides: Annotated[Overrides, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Overrides)


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    with all_problems():
        command = cli.parse(Command, arguments, program=PROGRAM, common=COMMON)
        _check(command)
    out = _out(command)
    if command.resume:
        base, options = _read(out), RunOptions.read(out)
    else:
        options = RunOptions(command.data, command.resize, command.background, command.skip_bad)
        if (out / CONFIG).exists():
            raise UsageError(f"{out} holds a classifier already; continue it with --resume, or choose another --out")
    check_out(out)
    with announced("loading PyTorch"):
        from fastddpm.runtime.device import choose_device

    device = choose_device(command.device)
    if not command.resume:
        base = like_model(_preset(command))
    config = command.overrides.applied_to(base)
    if command.resume:
        _refuse_changes(base, config, out)
    dataset = _open_data(options, config)
    if not command.resume:
        config = _with_classes(config, dataset)
    _train(config, dataset, options, out, device, resume=command.resume)


def like_model(model: Preset) -> ClassifierConfig:
    """Return the classifier for `model` with half of its network, its process and its training options.

    Until the data are known it tells as many classes apart as the model has, at least two.
    """
    classes = max(2, model.unet.num_classes)
    unet = dataclasses.replace(model.unet, num_classes=classes, label_dropout=0.0)
    return ClassifierConfig(unet, model.diffusion, ClassifierTraining.like(model.train))


def _check(command: Command) -> None:
    """Raise `UsageError` for options that do not go together. Reads nothing."""
    if distributed.group_from_environment().world_size > 1:
        refuse(["a classifier is trained by one process; start the command without torchrun"])
    if command.resume:
        named = [name for name in ("checkpoint", "preset", "data") if getattr(command, name) is not None]
        if command.out is None:
            refuse(["--resume needs --out, the directory of the classifier to continue"])
        if named:
            given = ", ".join("MODEL" if name == "checkpoint" else f"--{name}" for name in named)
            refuse([f"--resume takes model and data of the training in --out; leave out {given}"])
        return
    if (command.checkpoint is None) == (command.preset is None):
        what = "neither is given" if command.preset is None else "both are given"
        refuse([f"name the model to guide, or the configuration of one with --preset; {what}"])
    if command.checkpoint is not None:
        with problem():
            check_checkpoint(command.checkpoint)
    if command.preset is not None:
        with problem():
            preset(command.preset)


def _out(command: Command) -> Path:
    if command.out is not None:
        return command.out
    if command.checkpoint is not None:
        return cli.run_of(command.checkpoint) / "classifier"
    return Path("runs") / f"{command.preset}-classifier"


def _preset(command: Command) -> Preset:
    """Return the configuration of the model to guide."""
    if command.checkpoint is None:
        assert command.preset is not None
        return preset(command.preset)
    from fastddpm.pretrained import read_preset

    with announced(f"reading {command.checkpoint}"):
        return read_preset(command.checkpoint)


def _read(out: Path) -> ClassifierConfig:
    """Return the configuration of the training in `out`."""
    try:
        document: Any = read_json(out / CONFIG)
    except FileNotFoundError:
        raise UsageError(f"nothing to resume: {out} holds no classifier (there is no {CONFIG} in it)") from None
    config: ClassifierConfig = from_stored(ClassifierConfig, document, str(out / CONFIG))
    return config


def _refuse_changes(base: ClassifierConfig, config: ClassifierConfig, out: Path) -> None:
    changed = [line for line in difference(base, config) if line.partition(":")[0].split(".")[-1] not in FREE_TO_CHANGE]
    if changed:
        raise UsageError(f"{out} was trained with other options: {'; '.join(changed)}. Leave them out, or start anew")


def _open_data(options: RunOptions, config: ClassifierConfig) -> "Dataset":
    from fastddpm.data import open_dataset
    from fastddpm.data.order import check_batch

    dataset = open_dataset(
        options.data, image_size=config.unet.image_size, channels=config.unet.image_channels, resize=options.resize,
        background=options.background, skip_bad=options.bad_share, report=log,
    )  # fmt: skip
    check_batch(len(dataset.images), config.train.batch)
    log(f"data {dataset.name}: {counted(len(dataset.images), 'images')}, sha256 {dataset.checksum[:12]}")
    return dataset


def _with_classes(config: ClassifierConfig, dataset: "Dataset") -> ClassifierConfig:
    """Return `config` with the classes of the data. A model with labels must have as many."""
    from fastddpm.training.classifier import check_labels

    classes = check_labels(dataset)
    if config.unet.num_classes > 2 and classes != config.unet.num_classes:
        raise UsageError(
            f"{dataset.name} has {classes} classes, and the model {config.unet.num_classes}; name the images that the "
            "model was trained on with --data"
        )
    return dataclasses.replace(config, unet=dataclasses.replace(config.unet, num_classes=classes))


def _train(
    config: ClassifierConfig,
    dataset: "Dataset",
    options: RunOptions,
    out: Path,
    device: Any,
    *,
    resume: bool,
) -> None:
    from fastddpm.ops.backend import report_obstacles
    from fastddpm.storage import checkpoint
    from fastddpm.training.classifier import ClassifierTrainer
    from fastddpm.training.run_log import JsonLines

    with announced("building the network"):
        trainer = ClassifierTrainer(config, dataset, device)
    with contextlib.ExitStack() as held:
        held.callback(trainer.batches.close)
        held.enter_context(checkpoint.lock(out))
        if resume:
            saved = checkpoint.load_newest(out, log)
            if saved is not None:
                trainer.resume(saved)
            log(f"resuming {out} at step {trainer.step}")
        write_json(out / CONFIG, to_dict(config))
        options.write(out)
        lines = JsonLines(out / "log.jsonl", trainer.step if resume else None)
        held.callback(lines.close)
        report_obstacles(device.type, log)
        weights = sum(p.numel() for p in trainer.classifier.parameters())
        log(f"classifier of {config.unet.num_classes} classes, {weights:,} weights, on {device}")
        last = trainer.run(out, lines, dataset_source=options.data)
    print(f"checkpoint {last}")
    print(f"next: python -m fastddpm.sample MODEL --classifier {quoted(str(out))} --classifier-scale 1")


if __name__ == "__main__":
    cli.run(main)
