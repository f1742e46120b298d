"""How good a model's samples are: drawn, turned into features batch by batch, and compared with the data set.

Samples go to the feature network as uint8, rounded to the nearest level, as they would from image files. All processes
draw and look; the first one computes the scores from the shards, in their order, so that the number of processes and
interruptions change nothing.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastddpm.errors import UsageError
from fastddpm.metrics.features import Activations, FeatureNetwork
from fastddpm.metrics.frechet import Moments, frechet_distance
from fastddpm.metrics.inception_score import inception_score
from fastddpm.metrics.kid import kernel_distance, kernel_distance_of_subsets
from fastddpm.metrics.precision_recall import precision_recall
from fastddpm.runtime.distributed import all_gather_object
from fastddpm.runtime.progress import Meter
from fastddpm.sampling.images import to_uint8
from fastddpm.sampling.trajectories import evaluations as evaluations_of

from .context import EvaluationContext
from .features import SIZE, FeatureShards, fill, fill_reference, reference_moments, reference_shards
from .options import QUALITY_METRICS, QualityOptions

Record = dict[str, Any]
_OF_SAMPLES_ALONE = ("is",)


def score_name(metric: str, network: FeatureNetwork) -> str:
    """What a metric of `QUALITY_METRICS`, or precision or recall, is called: only with Inception by its usual name."""
    if metric in ("precision", "recall"):
        return f"{metric}[{network.name}]"
    usual, other = {
        "fid": ("fid", "frechet_distance"),
        "is": ("inception_score", "classifier_score"),
        "kid": ("kid", "kernel_distance"),
    }[metric]
    return usual if network.is_inception else f"{other}[{network.name}]"


@dataclass(frozen=True)
class Cost:
    """What is left to do: images to draw and to look at, evaluations of the network, seconds.

    `evaluations`: of one image each, images x steps; with guidance twice that.
    """

    images: int
    features: int
    evaluations: int
    seconds: float


def quality_cost(
    context: EvaluationContext,
    network: FeatureNetwork,
    metrics: Sequence[str],
    options: QualityOptions,
    per_evaluation: float,
) -> Cost:
    """By all processes together, from a timed batch of `network` and from `seconds_per_evaluation`."""
    images = sample_shards(context, network, options).unfinished()
    features = images
    if set(metrics).difference(_OF_SAMPLES_ALONE):
        features += reference_shards(context, network).unfinished()
    seconds = 0.0
    if features:
        batch = torch.from_numpy(context.dataset.images[: context.batch].copy()).to(context.device)
        seconds += features * _timed(lambda: network(batch), context.device) / len(batch)
    evaluations = evaluations_of(context.sampler, images, context.sampler.steps)
    seconds += evaluations * per_evaluation
    return Cost(images, features, evaluations, seconds / context.group.world_size)


def seconds_per_evaluation(context: EvaluationContext) -> float:
    """Of the network, for one image of a batch of this context: two batches are timed, the second one counts."""
    config = context.model.unet.config
    shape = (context.batch, config.image_channels, config.image_size, config.image_size)
    x = torch.zeros(shape, device=context.device)
    return _timed(lambda: context.sampler.probe(x), context.device) / evaluations_of(context.sampler, context.batch, 1)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    work()  # the first call prepares and allocates
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_quality(
    context: EvaluationContext, network: FeatureNetwork, metrics: Sequence[str], options: QualityOptions
) -> dict[str, Record]:
    """Scores by `score_name`, each with its value and settings, for JSON; on the first process, nothing on the others.

    `metrics`: of `QUALITY_METRICS`. Features of the samples stay in the context's directory: the same call finishes
    what a killed one left, and other metrics of the same samples cost no sampling. Raises `UsageError` for metrics or
    samples that cannot be, and where the directory holds those of another model or other settings.
    """
    _check(context, network, metrics, options)
    samples = sample_shards(context, network, options)
    _fill_samples(context, network, samples)
    reference = None
    if set(metrics).difference(_OF_SAMPLES_ALONE):
        reference = reference_shards(context, network)
        fill_reference(context, network, reference)
    all_gather_object(None, context.group)  # from here on every shard is there
    if not context.group.is_main:
        return {}
    common = _common(context, network, options)
    fake = samples.together()
    scores: dict[str, Record] = {}
    for metric in metrics:
        for name, record in _scores(metric, fake, reference, context.device, options).items():
            scores[score_name(name, network)] = record | common
    return scores


def _check(
    context: EvaluationContext, network: FeatureNetwork, metrics: Sequence[str], options: QualityOptions
) -> None:
    unknown = [metric for metric in metrics if metric not in QUALITY_METRICS]
    if unknown:
        raise UsageError(f"metrics of samples are {', '.join(QUALITY_METRICS)}; got {unknown[0]!r}")
    if "is" in metrics and not network.classes:
        raise UsageError(f"network {network.name} tells no classes apart, which metric is needs")
    if "is" in metrics and options.samples < options.splits:
        raise UsageError(f"{options.samples} samples cannot be split into {options.splits} parts; use --splits 1")
    fewest = min(options.samples, len(context.dataset.images))
    if "pr" in metrics and fewest <= options.neighbours:
        raise UsageError(f"{options.neighbours} neighbours need more images of each set; got {fewest}")


def sample_shards(context: EvaluationContext, network: FeatureNetwork, options: QualityOptions) -> FeatureShards:
    """The shards, perhaps unfinished, of samples of seeds 0, 1, .. in the context's directory; claimed for them."""
    sampler, config = context.sampler, context.model.unet.config
    seeds = range(options.samples)
    shards = FeatureShards(
        context.out / "features" / network.name, seeds, sampler.labels_for(seeds), SIZE,
        (config.image_channels, config.image_size, config.image_size), network.dimension, network.classes,
    )  # fmt: skip
    shards.claim(sampler.settings() | {"features": {"name": network.name, "sha256": network.checksum}})
    return shards


def _fill_samples(context: EvaluationContext, network: FeatureNetwork, shards: FeatureShards) -> None:
    group = context.group

    def images(seeds: Sequence[int], labels: Sequence[int] | None) -> Tensor:
        return torch.from_numpy(to_uint8(context.sampler.sample(seeds, labels))).to(context.device)

    with shards.locked(group.rank):
        shards.forget_temporaries(group.rank, group.world_size)
        missing, damaged = shards.missing(group.rank, group.world_size)
        for line in damaged:
            print(line, file=sys.stderr)
        if missing:
            fill(shards, missing, images, network, context.batch, "sampling")


def _scores(
    metric: str, fake: Activations, reference: FeatureShards | None, device: torch.device, options: QualityOptions
) -> dict[str, Record]:
    if metric == "is":
        assert fake.logits is not None
        mean, std = inception_score(fake.logits, options.splits)
        return {"is": {"value": mean, "std": std, "splits": options.splits}}
    assert reference is not None
    if metric == "fid":
        moments = Moments.of_batches(fake.features.split(SIZE))
        return {"fid": {"value": frechet_distance(moments, reference_moments(reference))}}
    x, y = reference.together().features.to(device), fake.features.to(device)
    if metric == "kid":
        return {"kid": _kid(x, y, options)}
    with _progress("precision and recall", "rows") as progress:
        precision, recall = precision_recall(x, y, options.neighbours, progress)
    neighbours = {"neighbours": options.neighbours}
    return {"precision": {"value": precision} | neighbours, "recall": {"value": recall} | neighbours}


def _kid(real: Tensor, fake: Tensor, options: QualityOptions) -> Record:
    size = min(options.kid_subset_size, len(real), len(fake))
    with _progress("kernel distance", "subsets") as progress:
        mean, std = kernel_distance_of_subsets(real, fake, options.kid_subsets, size, progress=progress)
    with _progress("kernel distance of all images", "blocks") as progress:
        whole = kernel_distance(real, fake, progress)
    return {
        "value": mean, "std": std, "all_images": whole, "subsets": options.kid_subsets, "subset_size": size,
        "kernel": "(x.y / d + 1)^3",
    }  # fmt: skip


def _common(context: EvaluationContext, network: FeatureNetwork, options: QualityOptions) -> Record:
    return {
        "samples": options.samples,
        "reference_images": len(context.dataset.images),
        "features": {"name": network.name, "sha256": network.checksum},
        "images": "uint8, rounded to the nearest level",
        "sampling": context.sampler.settings(),
    }


@contextlib.contextmanager
def _progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A meter that learns its total from the first report."""
    with contextlib.ExitStack() as stack:
        meter: Meter | None = None

        def report(done: int, total: int) -> None:
            nonlocal meter
            if meter is None:
                meter = stack.enter_context(Meter(title, total, unit))
            meter.update(done)

        yield report
