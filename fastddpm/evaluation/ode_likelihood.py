"""Bits per dimension by the probability-flow ODE, of a data set; what is done is kept in the directory of the results.

ode-bits.csv     the bits of each image
ode-bits-parts/  the bits of each block of images, for resuming an interrupted evaluation
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from fastddpm.runtime.distributed import all_gather_object
from fastddpm.runtime.progress import Meter, log
from fastddpm.storage.files import write_text
from fastddpm.storage.shards import Shards

from .context import EvaluationContext
from .features import missing_shards
from .ode_bits import BLOCK, OdeBits, OdeEvaluator, summary
from .options import OdeBitsOptions
from .probability_flow import STAGES

_PARTS = "ode-bits-parts"
_TABLE = "ode-bits.csv"
_VERSION = 1


@dataclass(frozen=True)
class _BitShards(Shards):
    """Shards that hold the bits of images, (n, draws), and those of the first block with half of the steps."""

    draws: int

    _holds = "bits"
    _otherwise = "choose another --out, or remove it"

    def _names(self) -> list[str]:
        return ["bits", "halved", "seeds"]

    def _num_bytes(self, num: int) -> int:
        return 16 * num * self.draws

    def _mismatch(self, index: int, found: Mapping[str, np.ndarray]) -> str | None:
        seeds, _ = self.part(index)
        wanted = [(len(seeds), self.draws), (len(seeds) if index == 0 else 0, self.draws)]
        shapes = [found[name].shape for name in ("bits", "halved")]
        if shapes != wanted or any(found[name].dtype != np.float64 for name in ("bits", "halved")):
            return f"has arrays {shapes}, not {wanted}"
        return None if np.array_equal(found["seeds"], seeds) else "holds bits of other images"


def check_ode_bits(context: EvaluationContext, options: OdeBitsOptions) -> None:
    """Raise `UsageError`, as `measure_ode_bits` would, for options that do not fit. Evaluates nothing."""
    _evaluator(context, options)


def ode_bits_cost(context: EvaluationContext, options: OdeBitsOptions) -> tuple[int, float]:
    """Return the number of evaluations of one image with a derivative, by all processes, and the seconds of one.

    The seconds are measured on one batch.
    """
    evaluator = _evaluator(context, options)
    rows, first = (count * options.draws for count in (len(evaluator.indices), len(evaluator.blocks()[0])))
    derivatives = int(np.prod(context.sampler.interface.shape)) if options.exact_trace else 1
    total = STAGES * derivatives * (rows * evaluator.steps + first * (len(evaluator.halved) - 1))
    start = perf_counter()
    evaluator.evaluate(evaluator.blocks()[0], evaluator.nodes[:2])
    return total, (perf_counter() - start) / (first * STAGES * derivatives)


def measure_ode_bits(context: EvaluationContext, options: OdeBitsOptions) -> dict[str, Any]:
    """Measure the bits per dimension of the data set by the ODE and return them for JSON.

    Blocks of images that an interrupted call has finished are not evaluated again; a call for more images adds to them.
    The main process writes the bits of each image to ode-bits.csv in `context.out`. Raises `UsageError` for options
    that do not fit the data, the model or the results in the directory, and `StorageError` if it cannot be written.
    """
    evaluator, group = _evaluator(context, options), context.group
    shape = context.sampler.interface.shape
    shards = _BitShards(
        context.out / _PARTS, evaluator.indices.tolist(), None, BLOCK, (shape[0], shape[1], shape[2]), options.draws
    )
    settings = _settings(context, options)
    shards.claim(settings)
    blocks = evaluator.blocks()
    with shards.locked(group.rank), ExitStack() as stack:
        missing, damaged = missing_shards(context, shards)
        for line in damaged:
            log(line)
        total = sum(len(blocks[i]) * options.draws * STAGES * evaluator.steps for i in missing)
        meter = stack.enter_context(Meter("bits/dim by the ODE", total, "evaluations")) if total else None

        def progress(evaluations: int) -> None:
            if meter is not None and group.is_main:
                meter.update(min(total, meter.done + evaluations), lambda rate: f"{rate:.0f} evaluations/s")

        for index in missing:
            bits = evaluator.evaluate(blocks[index], evaluator.nodes, progress)
            halved = evaluator.evaluate(blocks[0], evaluator.halved) if index == 0 else np.empty((0, options.draws))
            shards.put_arrays(index, {"bits": bits, "halved": halved})
        own = {index: shards.arrays(index) for index in range(group.rank, len(shards), group.world_size)}
    found = {index: arrays for part in all_gather_object(own, group) for index, arrays in part.items()}
    result = summary(evaluator, [found[index]["bits"] for index in range(len(blocks))], found[0]["halved"])
    if group.is_main:
        write_text(context.out / _TABLE, _csv(result))
    record = result.to_dict()
    return {"bits_per_dim": record.pop("total"), **record, "per_image": _TABLE, "settings": settings}


def _evaluator(context: EvaluationContext, options: OdeBitsOptions) -> OdeEvaluator:
    dataset = context.dataset
    return OdeEvaluator(context.sampler, dataset.images, dataset.labels, options, context.batch)


def _settings(context: EvaluationContext, options: OdeBitsOptions) -> dict[str, Any]:
    """Return what determines the bits of an image, besides its index."""
    sampler_settings, chosen = context.sampler.settings(), asdict(options)
    del chosen["images"]
    return {
        "ode_version": _VERSION,
        **{name: sampler_settings[name] for name in ("network", "diffusion", "device")},
        "data": context.dataset.checksum,
        "given_labels": context.dataset.labels is not None,
        **chosen,
    }


def _csv(result: OdeBits) -> str:
    """Return one line per image: its index in the data set and its bits per dimension."""
    pairs = zip(result.indices.tolist(), result.per_image.tolist(), strict=True)
    return "\n".join(["image,bits_per_dim", *(f"{index},{bits:.9g}" for index, bits in pairs)]) + "\n"
