"""python -m fastddpm.evaluate CHECKPOINT: the paper's figures and pictures of a trained model."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastddpm.errors import UsageError
from fastddpm.evaluation.options import PICTURE_NAMES, QUALITY_METRICS, BitsOptions, PictureOptions, QualityOptions
from fastddpm.runtime import cli, distributed
from fastddpm.runtime.options import BatchSize, Checkpoint, Device, Resize, SkipBad, check_checkpoint, check_positive
from fastddpm.sampling.options import ChainOptions

if TYPE_CHECKING:
    from fastddpm.evaluation.context import EvaluationContext
    from fastddpm.evaluation.report import Report
    from fastddpm.metrics.features import FeatureNetwork

PROGRAM = "fastddpm.evaluate"
BITS_METRICS = ("bpd", "rate-distortion")
METRICS = (*QUALITY_METRICS, *BITS_METRICS)


@dataclass(frozen=True)
class Command:
    """Measure a checkpoint. What is done stays in --out: the same command goes on, another one adds to it."""

    checkpoint: Checkpoint
    metrics: Annotated[str | None, tyro.conf.arg(metavar=",".join(METRICS))] = None
    """One or more, with commas, or none; all that can be had here unless given."""
    pictures: Annotated[str, tyro.conf.arg(metavar="all|none|NAME,..")] = "none"
    """progressive, shared-latent, interpolation, interpolation-depths, neighbours, strips, classes."""
    data: str | None = None
    """Images to compare with, as for training. Without it, the embedded digits."""
    split: Literal["train", "test"] = "train"
    """Where the data have splits. The published FID is of train, the published bits/dim of test."""
    resize: Resize = "none"
    skip_bad: SkipBad = False
    features: Annotated[str | None, tyro.conf.arg(metavar="inception|digits|efficientnet-lite0|PATH")] = None
    """Network of the scores, or a .pth or .safetensors of Inception weights. Without it: inception where its weights
    are, else digits for the embedded digits. Only scores from the published Inception are called FID."""
    out: Path | None = None
    """Directory for figures, features and pictures. Without it, evaluation in the run's directory."""
    batch: BatchSize = None
    device: Device = "auto"
    chain: Annotated[ChainOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ChainOptions)
    quality: Annotated[QualityOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=QualityOptions)
    bits: BitsOptions = dataclasses.field(default_factory=BitsOptions)
    picture: PictureOptions = dataclasses.field(default_factory=PictureOptions)


def parse_names(text: str, known: Sequence[str], option: str) -> list[str]:
    """The names in "fid,is", each once, in the order of `known`; `UsageError` names one that is not known."""
    wanted = {name.strip() for name in text.split(",")}
    if wanted == {"all"}:
        return list(known)
    unknown = sorted(wanted.difference(known, ["none"]))
    if unknown:
        raise UsageError(f"--{option} takes {', '.join(known)}, all or none; got {unknown[0]!r}")
    return [name for name in known if name in wanted]


def main(arguments: Sequence[str]) -> None:
    command = cli.parse(Command, arguments, program=PROGRAM)
    metrics = parse_names(command.metrics or "all", METRICS, "metrics")
    pictures = parse_names(command.pictures, PICTURE_NAMES, "pictures")
    check_positive(batch=command.batch)
    check_checkpoint(command.checkpoint)
    cli.check_out(_out(command))
    group = distributed.group_from_environment()
    # Scores are computed by the first process alone, for hours perhaps, while the others wait.
    with distributed.process_group(group, timeout_s=7 * 24 * 3600):
        context = _context(command, group)
        network = _network(command, context) if set(metrics).intersection(QUALITY_METRICS) else None
        if network is None:
            metrics = [metric for metric in metrics if metric not in QUALITY_METRICS]
        if command.pictures == "all" and not context.sampler.unet.config.num_classes:
            pictures.remove("classes")
        _evaluate(command, context, network, metrics, pictures)


def _context(command: Command, group: distributed.ProcessGroup) -> "EvaluationContext":
    from fastddpm.data import open_dataset
    from fastddpm.evaluation.context import EvaluationContext
    from fastddpm.runtime.device import choose_device

    device = choose_device(command.device, distributed.local_rank())
    model, sampler, batch = command.chain.open(command.checkpoint, device, command.batch)
    dataset = open_dataset(
        command.data, image_size=model.preset.unet.image_size, channels=model.preset.unet.image_channels,
        resize=command.resize, skip_bad=command.skip_bad, split=command.split,
    )  # fmt: skip
    out = _out(command)
    out.mkdir(parents=True, exist_ok=True)
    return EvaluationContext(model, sampler, dataset, batch, device, out, group)


def _network(command: Command, context: "EvaluationContext") -> "FeatureNetwork | None":
    """The feature network; None, with a line that says why, where none is here and none was asked for."""
    from fastddpm.metrics import inception
    from fastddpm.metrics.networks import open_network

    name = command.features
    if name is None and inception.find_weights() is not None:
        name = "inception"
    elif name is None and command.data is None:
        name = "digits"
    if name is None:
        problem = f"{inception.how_to_get_them()}; or take --features efficientnet-lite0, whose scores are no FID"
        if command.metrics is not None:
            raise UsageError(problem)
        if context.group.is_main:
            print(f"{', '.join(QUALITY_METRICS)} are left out: {problem}", file=sys.stderr)
        return None
    size, network = context.dataset.images.shape[-1], None
    for turn in (True, False):  # the first process may have to train it; the others find it in the cache
        if context.group.is_main == turn:
            network = open_network(name, image_size=size, device=context.device, report=_say)
        distributed.all_gather_object(None, context.group)
    return network


def _evaluate(
    command: Command,
    context: "EvaluationContext",
    network: "FeatureNetwork | None",
    metrics: Sequence[str],
    pictures: Sequence[str],
) -> None:
    """Every process comes here; the first one estimates, writes and tells."""
    from fastddpm.evaluation.report import Report

    first = context.group.is_main
    report = Report(context, command.checkpoint) if first else None
    if first:
        for line in _estimates(command, context, network, metrics, pictures):
            _say(line)
    if network is not None:
        _add_quality(command, context, network, metrics, report)
    if set(metrics).intersection(BITS_METRICS):
        _add_bits(command, context, metrics, report)
    if report is not None:
        _add_pictures(command, context, pictures, report)
        print(report.table())


def _estimates(
    command: Command,
    context: "EvaluationContext",
    network: "FeatureNetwork | None",
    metrics: Sequence[str],
    pictures: Sequence[str],
) -> list[str]:
    """What each part will take, from a batch of each network that is timed now."""
    from fastddpm.evaluation.figures.draw import picture_cost
    from fastddpm.evaluation.likelihood import bits_cost
    from fastddpm.evaluation.quality import quality_cost, seconds_per_evaluation
    from fastddpm.runtime.progress import duration

    each = seconds_per_evaluation(context)
    count = context.group.world_size
    where = f"{context.device}" + (f", {count} processes" if count > 1 else "")
    lines = [f"{context.model.preset.name} on {where}: {1 / each:,.0f} evaluations of one image per second, each"]
    if network is not None:
        wanted = [metric for metric in metrics if metric in QUALITY_METRICS]
        cost = quality_cost(context, network, wanted, command.quality, each)
        lines.append(
            f"{','.join(wanted)}: {cost.images:,} samples to draw, {cost.evaluations:,} evaluations; {cost.features:,} "
            f"images through {network.name}: about {duration(cost.seconds)}"
        )
    if set(metrics).intersection(BITS_METRICS):
        evaluations = bits_cost(context, command.bits)
        lines.append(
            f"bpd, rate-distortion: {evaluations:,} evaluations (images x timesteps), unless they are there already: "
            f"about {duration(evaluations * each / count)}"
        )
    for name in pictures:
        evaluations = picture_cost(name, context, command.picture)
        lines.append(f"{name}: {evaluations:,} evaluations: about {duration(evaluations * each)}")
    return lines


def _add_quality(
    command: Command,
    context: "EvaluationContext",
    network: "FeatureNetwork",
    metrics: Sequence[str],
    report: "Report | None",
) -> None:
    from fastddpm.evaluation.quality import measure_quality

    wanted = [metric for metric in metrics if metric in QUALITY_METRICS]
    for name, record in measure_quality(context, network, wanted, command.quality).items():
        if report is not None:
            report.add(command.split, name, record | _data(context))


def _add_bits(command: Command, context: "EvaluationContext", metrics: Sequence[str], report: "Report | None") -> None:
    from fastddpm.evaluation.likelihood import measure_bits
    from fastddpm.evaluation.rate_distortion import measure_rate_distortion

    own = dataclasses.replace(context, out=context.out / command.split)  # the other split's bits stay
    own.out.mkdir(exist_ok=True)
    for name, measure in (("bpd", measure_bits), ("rate-distortion", measure_rate_distortion)):
        if name in metrics:
            record = measure(own, command.bits)
            if report is not None:
                report.add(command.split, name, record | _data(context))


def _add_pictures(command: Command, context: "EvaluationContext", pictures: Sequence[str], report: "Report") -> None:
    from fastddpm.evaluation.figures.draw import PICTURES

    for name in pictures:
        paths = PICTURES[name](context, command.picture)
        sampling = context.sampler.settings()
        files = [str(path.relative_to(context.out)) for path in paths]
        options = dataclasses.asdict(command.picture)
        report.add("pictures", name, {"files": files, "options": options, "sampling": sampling} | _data(context))
        for path in paths:
            print(path)


def _data(context: "EvaluationContext") -> dict[str, dict[str, str]]:
    return {"data": {"name": context.dataset.name, "sha256": context.dataset.checksum}}


def _out(command: Command) -> Path:
    return command.out or cli.run_of(command.checkpoint) / "evaluation"


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
