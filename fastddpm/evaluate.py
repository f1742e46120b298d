"""python -m fastddpm.evaluate CHECKPOINT: the paper's scores, bits per dimension and pictures of a trained model."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastddpm.errors import UsageError, all_problems, problem, refuse
from fastddpm.evaluation.options import (
    PICTURE_NAMES,
    PICTURES_OF_DATA,
    QUALITY_METRICS,
    BitsOptions,
    OdeBitsOptions,
    PictureOptions,
    QualityOptions,
)
from fastddpm.runtime import cli, distributed
from fastddpm.runtime.options import (
    Background,
    BatchSize,
    Checkpoint,
    Device,
    Resize,
    SkipBad,
    check_checkpoint,
    check_positive,
    parse_names,
)
from fastddpm.runtime.progress import announced, discard, duration, log
from fastddpm.sampling.options import ChainOptions
from fastddpm.storage.files import check_out

if TYPE_CHECKING:
    import torch

    from fastddpm.evaluation.context import EvaluationContext
    from fastddpm.evaluation.quality import Comparison
    from fastddpm.evaluation.report import Report
    from fastddpm.metrics.features import FeatureNetwork
    from fastddpm.pretrained.model import Model
    from fastddpm.sampling.sampler import Sampler

PROGRAM = "fastddpm.evaluate"
COMMON = (  # what --help shows; --help-all shows the rest
    "metrics", "pictures", "data", "split", "resize", "features", "out", "batch", "device", "method", "steps",
    "guidance", "samples", "images", "every",
)  # fmt: skip
BITS_METRICS = ("bpd", "rate-distortion")
BY_DEFAULT = (*QUALITY_METRICS, *BITS_METRICS)
METRICS = (*BY_DEFAULT, "ode-bpd")


@dataclass(frozen=True)
class Command:
    """Measure a checkpoint and draw the paper's pictures of it.

    Results are kept in --out. An interrupted command resumes there, and another one adds to them.
    """

    checkpoint: Checkpoint
    metrics: Annotated[str | None, tyro.conf.arg(metavar=",".join(METRICS))] = None
    """What to measure: one or more names, separated by commas, or all or none. Default: all that can run here but
    ode-bpd, the likelihood by the probability-flow ODE."""
    pictures: Annotated[str, tyro.conf.arg(metavar="all|none|NAME,..")] = "none"
    """Pictures to draw: one or more names, separated by commas, or all or none. The names are
    progressive, shared-latent, interpolation, interpolation-depths, neighbours, strips, classes."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH|hf:NAME")] = None
    """Images to compare with: any source that training takes as --data. Default: the embedded digits."""
    split: Literal["train", "test"] = "train"
    """Split of the data, if they have splits. The published FID is of train, the published bits/dim are of test."""
    reference: Path | None = None
    """FID statistics to compare with in place of the data's: an .npz with mu and sigma of the same feature network, as
    pytorch-fid, clean-fid and ADM write it. Without --data only fid and is are measured."""
    write_statistics: Path | None = None
    """File to write the FID statistics of the data to, as .npz with mu and sigma."""
    resize: Resize = "none"
    background: Background = None
    skip_bad: SkipBad = False
    features: Annotated[str | None, tyro.conf.arg(metavar="inception|digits|efficientnet-lite0|PATH")] = None
    """Feature network of the scores, or a .pth or .safetensors file of Inception weights.
    Default: inception if its weights are found, otherwise digits for the embedded digits.
    Only scores from the published Inception network are called FID."""
    out: Path | None = None
    """Directory for results, features and pictures. Default: evaluation in the run directory."""
    batch: BatchSize = None
    device: Device = "auto"
    chain: Annotated[ChainOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ChainOptions)
    quality: Annotated[QualityOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=QualityOptions)
    bits: BitsOptions = dataclasses.field(default_factory=BitsOptions)
    ode_bits: OdeBitsOptions = dataclasses.field(default_factory=OdeBitsOptions)
    picture: PictureOptions = dataclasses.field(default_factory=PictureOptions)


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    group = distributed.group_from_environment()
    report = log if group.is_main else discard
    metrics, pictures = list(BY_DEFAULT), list(PICTURE_NAMES)
    with all_problems():
        command = cli.parse(Command, arguments, program=PROGRAM, common=COMMON)
        check_positive(batch=command.batch)
        with problem():
            check_checkpoint(command.checkpoint)
        with problem():
            metrics = parse_names(command.metrics or ",".join(BY_DEFAULT), METRICS, "metrics")
        with problem():
            pictures = parse_names(command.pictures, PICTURE_NAMES, "pictures")
        metrics, pictures = _with_reference(command, metrics, pictures, report)
    check_out(_out(command))
    with announced("loading PyTorch", report):
        from fastddpm.evaluation.features import open_on_main_first
        from fastddpm.evaluation.report import Report
        from fastddpm.runtime.device import choose_device
        from fastddpm.training.length import report_notes
        from fastddpm.training.page import try_write_page

    # Rank 0 computes the scores alone, which may take hours, while the other ranks wait.
    with distributed.process_group(group, timeout_s=7 * 24 * 3600):
        device = choose_device(command.device, distributed.local_rank())
        with announced(f"reading {command.checkpoint}", report):
            opened = command.chain.open(command.checkpoint, device, command.batch, report)
        features = _features(command, metrics, opened[0], report)
        if features is None:
            metrics = [metric for metric in metrics if metric not in QUALITY_METRICS]
        if command.pictures == "all" and not opened[0].unet.config.num_classes:
            pictures.remove("classes")
        context = _context(command, *opened, device, group)
        with announced(f"checking the options against the data and {context.out}", report):
            _check(command, context, metrics, pictures)
            context.out.mkdir(parents=True, exist_ok=True)
            results = Report(context, command.checkpoint) if group.is_main else None
        report_notes(opened[0], report)
        network = None if features is None else open_on_main_first(features, context, report)
        comparison = _comparison(command, network, report)
        _evaluate(command, context, network, comparison, metrics, pictures, results)
        run = cli.run_of(command.checkpoint)
        if group.is_main and (run / "log.jsonl").exists():  # not of a pipeline or a checkpoint alone
            try_write_page(run)


def _with_reference(
    command: Command, metrics: list[str], pictures: list[str], report: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """Return the metrics and pictures that are possible with the statistics of --reference, if that is given.

    Raises `UsageError` for others that were asked for, for a file that is missing, and for options that contradict.
    """
    if command.write_statistics is not None:
        if command.write_statistics.is_dir():
            refuse([f"{command.write_statistics} is a directory; name the .npz file to write"])
        else:
            check_out(command.write_statistics.parent)
        if command.reference is not None and command.data is None:
            refuse(["--write-statistics writes those of the data; name them with --data beside --reference"])
        if not set(metrics).intersection(QUALITY_METRICS):
            refuse(["--write-statistics needs the features of the data; add fid to --metrics"])
    if command.reference is None:
        return metrics, pictures
    if not command.reference.is_file():
        raise UsageError(f"there is no file of statistics at {command.reference}")
    if command.data is not None:
        return metrics, pictures
    possible = [metric for metric in metrics if metric in ("fid", "is")]
    drawable = [name for name in pictures if name not in PICTURES_OF_DATA]
    left_out = [name for name in (*metrics, *pictures) if name not in (*possible, *drawable)]
    asked = [name for name in left_out if name in f"{command.metrics},{command.pictures}".split(",")]
    if asked:
        raise UsageError(f"{', '.join(asked)}: these need the images, not only --reference; name them with --data")
    if left_out:
        report(f"left out, as they need images (--data): {', '.join(left_out)}")
    return possible, drawable


def _comparison(command: Command, network: "FeatureNetwork | None", report: Callable[[str], None]) -> "Comparison":
    from fastddpm.evaluation.quality import Comparison
    from fastddpm.metrics.statistics import read_statistics

    reference = None
    if command.reference is not None and network is not None:
        with announced(f"reading {command.reference}", report):
            reference = read_statistics(command.reference, network, report)
    return Comparison(reference, command.write_statistics)


def _features(command: Command, metrics: Sequence[str], model: "Model", report: Callable[[str], None]) -> str | None:
    """Return the name of the feature network of the scores, None if no scores are to be measured.

    If none is available, report the reason and return None, or raise `UsageError` if --metrics asked for the scores.
    Raises `UsageError` for a network that is missing or does not take the model's images.
    """
    from fastddpm.metrics import inception
    from fastddpm.metrics.networks import check_network

    if not set(metrics).intersection(QUALITY_METRICS):
        return None
    name, config = command.features, model.unet.config
    if name is not None:
        check_network(name, image_size=config.image_size, channels=config.image_channels)
        return name
    if inception.find_weights() is not None:
        return "inception"
    if command.data is None and command.reference is None:
        return "digits"
    problem = f"{inception.how_to_get_them()}; or use --features efficientnet-lite0, whose scores are not FID"
    if command.metrics is not None:
        raise UsageError(problem)
    report(f"{', '.join(QUALITY_METRICS)} are left out: {problem}")
    return None


def _context(
    command: Command,
    model: "Model",
    sampler: "Sampler",
    batch: int,
    device: "torch.device",
    group: distributed.ProcessGroup,
) -> "EvaluationContext":
    from fastddpm.data import open_dataset
    from fastddpm.evaluation.context import EvaluationContext

    config, dataset = model.unet.config, None
    if command.data is not None or command.reference is None:
        dataset = open_dataset(
            command.data, image_size=config.image_size, channels=config.image_channels,
            resize=command.resize, background=command.background, skip_bad=command.skip_bad, split=command.split,
        )  # fmt: skip
    return EvaluationContext(model.preset.name, sampler, dataset, batch, device, _out(command), group, model.steps)


def _check(command: Command, context: "EvaluationContext", metrics: Sequence[str], pictures: Sequence[str]) -> None:
    """Raise `UsageError`, before anything long, for options that do not fit the model, the data or earlier results.

    It names all of them.
    """
    from fastddpm.evaluation.figures.draw import check_picture
    from fastddpm.evaluation.likelihood import check_bits
    from fastddpm.evaluation.ode_likelihood import check_ode_bits
    from fastddpm.evaluation.quality import check_quality

    with all_problems():
        with problem():
            check_quality(context, [metric for metric in metrics if metric in QUALITY_METRICS], command.quality)
        with problem():
            if set(metrics).intersection(BITS_METRICS):
                check_bits(_split_context(command, context), command.bits)
        with problem():
            if "ode-bpd" in metrics:
                check_ode_bits(context, command.ode_bits)
        for name in pictures:
            with problem():
                check_picture(name, context, command.picture)


def _evaluate(
    command: Command,
    context: "EvaluationContext",
    network: "FeatureNetwork | None",
    comparison: "Comparison",
    metrics: Sequence[str],
    pictures: Sequence[str],
    report: "Report | None",
) -> None:
    """Measure and draw on all ranks. Rank 0 also logs the estimates, writes the results and prints the table."""
    if report is not None:
        for line in _estimates(command, context, network, comparison, metrics, pictures):
            log(line)
    if network is not None:
        _add_quality(command, context, network, comparison, metrics, report)
    if set(metrics).difference(QUALITY_METRICS):
        _add_bits(command, context, metrics, report)
    if report is not None:
        _add_pictures(command, context, pictures, report)
        table = report.table()
        if table:
            print(table)


def _estimates(
    command: Command,
    context: "EvaluationContext",
    network: "FeatureNetwork | None",
    comparison: "Comparison",
    metrics: Sequence[str],
    pictures: Sequence[str],
) -> list[str]:
    """Return one line for each part with its work and the time it will take, from timing a batch of each network."""
    from fastddpm.evaluation.figures.draw import picture_cost
    from fastddpm.evaluation.likelihood import bits_cost
    from fastddpm.evaluation.ode_likelihood import ode_bits_cost
    from fastddpm.evaluation.quality import quality_cost, seconds_per_evaluation

    with announced("timing the network"):
        seconds = seconds_per_evaluation(context)
    count = context.group.world_size
    where, in_each = (f"{context.device}, {count} processes", " in each") if count > 1 else (f"{context.device}", "")
    lines = [f"{command.checkpoint} on {where}: {1 / seconds:,.0f} evaluations of one image per second{in_each}"]
    if network is not None:
        wanted = [metric for metric in metrics if metric in QUALITY_METRICS]
        with announced(f"timing the feature network {network.name}"):
            cost = quality_cost(context, network, wanted, command.quality, seconds, comparison)
        lines.append(
            f"{','.join(wanted)}: {cost.images:,} samples to draw, {cost.evaluations:,} evaluations; {cost.features:,} "
            f"images through {network.name}: about {duration(cost.seconds)}"
        )
    if set(metrics).intersection(BITS_METRICS):
        evaluations = bits_cost(context, command.bits)
        lines.append(
            f"bpd, rate-distortion: {evaluations:,} evaluations (images x timesteps), unless they are done already: "
            f"about {duration(evaluations * seconds / count)}"
        )
    if "ode-bpd" in metrics:
        evaluations, each = ode_bits_cost(context, command.ode_bits)
        lines.append(
            f"ode-bpd: {evaluations:,} evaluations with a derivative, unless they are done already: about "
            f"{duration(evaluations * each / count)}"
        )
    for name in pictures:
        evaluations = picture_cost(name, context, command.picture)
        lines.append(f"{name}: {evaluations:,} evaluations: about {duration(evaluations * seconds)}")
    return lines


def _add_quality(
    command: Command,
    context: "EvaluationContext",
    network: "FeatureNetwork",
    comparison: "Comparison",
    metrics: Sequence[str],
    report: "Report | None",
) -> None:
    from fastddpm.evaluation.quality import measure_quality

    wanted = [metric for metric in metrics if metric in QUALITY_METRICS]
    for name, record in measure_quality(context, network, wanted, command.quality, comparison).items():
        if report is not None:
            report.add(command.split, name, _data(context) | record)
    if report is not None and comparison.write is not None:
        print(comparison.write)


def _add_bits(command: Command, context: "EvaluationContext", metrics: Sequence[str], report: "Report | None") -> None:
    from fastddpm.evaluation.likelihood import measure_bits
    from fastddpm.evaluation.ode_likelihood import measure_ode_bits
    from fastddpm.evaluation.rate_distortion import measure_rate_distortion

    split_context = _split_context(command, context)
    split_context.out.mkdir(exist_ok=True)
    measures = {
        "bpd": lambda: measure_bits(split_context, command.bits),
        "rate-distortion": lambda: measure_rate_distortion(split_context, command.bits),
        "ode-bpd": lambda: measure_ode_bits(split_context, command.ode_bits),
    }
    for name, measure in measures.items():
        if name in metrics:
            record = measure()
            if report is not None:
                report.add(command.split, name, record | _data(context))


def _split_context(command: Command, context: "EvaluationContext") -> "EvaluationContext":
    """Return the context with a directory of the split, whose results do not replace those of the other split."""
    return dataclasses.replace(context, out=context.out / command.split)


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
    data = context.data
    return {
        "data": {"name": "no images", "sha256": ""} if data is None else {"name": data.name, "sha256": data.checksum}
    }


def _out(command: Command) -> Path:
    return command.out or cli.run_of(command.checkpoint) / "evaluation"


if __name__ == "__main__":
    cli.run(main)
