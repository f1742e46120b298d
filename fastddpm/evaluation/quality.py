"""Measure the quality of a model's samples: draw them, compute features batch by batch, compare with the data set.

Samples are passed to the feature network as uint8, rounded to the nearest level, as if read from image files. All
processes draw samples and compute features. The main process computes the scores from the shards, in their order, so
that neither the number of processes nor an interruption changes a score.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.errors import UsageError, refuse
from fastddpm.metrics.features import Activations, FeatureNetwork
from fastddpm.metrics.frechet import Moments, frechet_distance
from fastddpm.metrics.inception_score import inception_score
from fastddpm.metrics.kid import kernel_distance, kernel_distance_of_subsets
from fastddpm.metrics.precision_recall import precision_recall
from fastddpm.metrics.statistics import Reference, write_statistics
from fastddpm.runtime.distributed import all_gather_object
from fastddpm.runtime.progress import Meter, announced, discard, log
from fastddpm.sampling.images import to_uint8
from fastddpm.sampling.trajectories import evaluations as evaluations_of
from fastddpm.sampling.trajectories import trajectories

from .context import EvaluationContext
from .features import (
    SIZE,
    FeatureShards,
    fill,
    fill_reference,
    missing_shards,
    reference_moments,
    reference_shards,
)
from .options import QUALITY_METRICS, QualityOptions

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What FID compares with and leaves behind. `reference`: statistics to compare with, in place of the data set's.

    `write`: the file that the data set's own statistics are written to.
    """

    reference: Reference | None = None
    write: Path | None = None

    def needs_images(self, metrics: Sequence[str]) -> bool:
        """Return whether features of the data set are needed."""
        return self.write is not None or bool(set(metrics).difference({"is", "fid"} if self.reference else {"is"}))


def score_name(metric: str, network: FeatureNetwork) -> str:
    """Return the name of a score: `metric` is one of `QUALITY_METRICS`, precision or recall.

    The usual name is used only with the published Inception network, because scores of other networks differ.
    """
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
    """The work that is left: `images` to draw, images to compute `features` of, `evaluations` of the model, `seconds`.

    `evaluations`: each of one image, images x steps; steps with guidance count twice.
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
    comparison: Comparison | None = None,
) -> Cost:
    """Estimate the work that is left for all processes together, timing a batch of the feature network.

    `per_evaluation`: the result of `seconds_per_evaluation`.
    """
    images = sample_shards(context, network, options).unfinished()
    features = images
    if (comparison or Comparison()).needs_images(metrics):
        features += reference_shards(context, network).unfinished()
    seconds = 0.0
    if features:
        batch = torch.zeros(context.batch, *context.sampler.interface.shape, dtype=torch.uint8, device=context.device)
        seconds += features * _timed(lambda: network(batch), context.device) / len(batch)
    evaluations = evaluations_of(context.sampler, images, range(context.sampler.steps))
    seconds += evaluations * per_evaluation
    return Cost(images, features, evaluations, seconds / context.group.world_size)


def seconds_per_evaluation(context: EvaluationContext) -> float:
    """Return the seconds that the model takes for one image in a batch of `context.batch`, timed after a warm-up."""
    x = torch.zeros(context.batch, *context.sampler.interface.shape, device=context.device)
    evaluations = len(x) * (2 if context.sampler.guided_steps.any() else 1)
    return _timed(lambda: context.sampler.probe(x), context.device) / evaluations


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that the second call of `work` takes."""
    work()  # the first call compiles and allocates
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_quality(
    context: EvaluationContext,
    network: FeatureNetwork,
    metrics: Sequence[str],
    options: QualityOptions,
    comparison: Comparison | None = None,
) -> dict[str, Record]:
    """Measure `metrics`, names in `QUALITY_METRICS`; return scores with their settings, for JSON, by `score_name`.

    The main process returns the scores, the others an empty dictionary. The samples' features stay in `context.out`: an
    interrupted call is resumed by the same call, and other metrics of the same samples need no sampling. Raises
    `UsageError` for unknown metrics and unsuitable options, and if the directory holds samples of another model or
    other settings.
    """
    comparison = comparison or Comparison()
    check_quality(context, metrics, options)
    if "is" in metrics and not network.classes:
        raise UsageError(f"metric is needs a network with classes; {network.name} has none")
    samples = sample_shards(context, network, options)
    _fill_samples(context, network, samples)
    shards = None
    if comparison.needs_images(metrics):
        shards = reference_shards(context, network)
        fill_reference(context, network, shards)
    with announced("waiting for the shards of the other processes", log if context.group.is_main else discard):
        all_gather_object(None, context.group)
    if not context.group.is_main:
        return {}
    if comparison.write is not None:
        assert shards is not None
        comparison.write.parent.mkdir(parents=True, exist_ok=True)
        write_statistics(reference_moments(shards).statistics(), network, comparison.write)
    common = _common(context, network, options)
    with announced("reading the features of the samples"):
        fake = samples.together()
    scores: dict[str, Record] = {}
    for metric in metrics:
        if metric == "fid" and comparison.reference is not None:
            scores[score_name("fid", network)] = common | _distance_to(comparison.reference, fake)
            continue
        for name, record in _scores(metric, fake, shards, context.device, options).items():
            scores[score_name(name, network)] = common | record
    return scores


def check_quality(context: EvaluationContext, metrics: Sequence[str], options: QualityOptions) -> None:
    """Raise `UsageError` for unknown metrics, and for options that do not suit them or the data set."""
    unknown = [metric for metric in metrics if metric not in QUALITY_METRICS]
    if unknown:
        raise UsageError(f"metrics of samples are {', '.join(QUALITY_METRICS)}; got {unknown[0]!r}")
    if "is" in metrics and options.samples < options.splits:
        refuse([f"--samples {options.samples} cannot be split into --splits {options.splits} parts; use --splits 1"])
    if "pr" in metrics and min(options.samples, len(context.dataset.images)) <= options.neighbours:
        refuse(
            [
                f"metric pr with --neighbours {options.neighbours} needs {options.neighbours + 1} samples and images "
                f"at least; got --samples {options.samples} and {len(context.dataset.images)} images"
            ]
        )


def sample_shards(context: EvaluationContext, network: FeatureNetwork, options: QualityOptions) -> FeatureShards:
    """Return the shards of features of the samples of seeds 0, 1, .. in `context.out`, complete or not.

    Raises `UsageError` if the directory holds samples of another model or other settings.
    """
    sampler = context.sampler
    seeds = range(options.samples)
    shards = FeatureShards(
        context.out / "features" / network.name, seeds, sampler.labels_for(seeds), SIZE,
        sampler.interface.shape, network.dimension, network.classes,
    )  # fmt: skip
    shards.claim(sampler.settings() | {"features": {"name": network.name, "sha256": network.checksum}})
    return shards


def _fill_samples(context: EvaluationContext, network: FeatureNetwork, shards: FeatureShards) -> None:
    """Draw the samples of this process's missing shards and write their features."""
    group = context.group

    def images_of(seeds: Sequence[int], labels: Sequence[int] | None) -> Iterator[np.ndarray]:
        for _, state in trajectories(context.sampler, seeds, labels, batch=context.batch):
            yield to_uint8(state.x)

    with shards.locked(group.rank):
        missing, damaged = missing_shards(context, shards)
        for line in damaged:
            log(line)
        if missing:
            fill(shards, missing, images_of, network, context.device, "sampling")


def _scores(
    metric: str, fake: Activations, reference: FeatureShards | None, device: torch.device, options: QualityOptions
) -> dict[str, Record]:
    """Compute the scores of a metric from the features `fake` of the samples; "pr" gives two."""
    if metric == "is":
        assert fake.logits is not None
        mean, std = inception_score(fake.logits, options.splits)
        return {"is": {"value": mean, "std": std, "splits": options.splits}}
    assert reference is not None
    if metric == "fid":
        with announced("computing the Fréchet distance"):
            moments = Moments.of_batches(fake.features.split(SIZE))
            return {"fid": {"value": frechet_distance(moments, reference_moments(reference))}}
    x, y = reference.together().features.to(device), fake.features.to(device)
    if metric == "kid":
        return {"kid": _kid(x, y, options)}
    with _progress("precision and recall", "rows") as progress:
        precision, recall = precision_recall(x, y, options.neighbours, progress)
    neighbours = {"neighbours": options.neighbours}
    return {"precision": {"value": precision} | neighbours, "recall": {"value": recall} | neighbours}


def _distance_to(reference: Reference, fake: Activations) -> Record:
    """Return the Fréchet distance of the samples to statistics of a file, and what is told about those."""
    with announced("computing the Fréchet distance"):
        value = frechet_distance(Moments.of_batches(fake.features.split(SIZE)), reference.statistics)
    return {"value": value, "reference_images": reference.statistics.count, "data": _statistics_of(reference)}


def _statistics_of(reference: Reference) -> dict[str, str]:
    return {"name": f"statistics {reference.name}", "sha256": reference.sha256}


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
    """Return the settings that all scores share."""
    return {
        "samples": options.samples,
        "reference_images": None if context.data is None else len(context.data.images),
        "features": {"name": network.name, "sha256": network.checksum},
        "images": "uint8, rounded to the nearest level",
        "sampling": context.sampler.settings(),
    }


@contextlib.contextmanager
def _progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Provide a progress callback whose first call starts a meter with its total."""
    with contextlib.ExitStack() as stack:
        meter: Meter | None = None

        def report(done: int, total: int) -> None:
            nonlocal meter
            if meter is None:
                meter = stack.enter_context(Meter(title, total, unit))
            meter.update(done)

        yield report
