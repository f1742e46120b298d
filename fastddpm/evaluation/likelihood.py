"""Bits per dimension of a data set, evaluated once and kept in the directory of the results.

bits.npz     the result, and the settings that determine it; other settings are refused
bits.csv     the terms of each timestep
bits-parts/  during the evaluation: the sums of each block of images, for resuming an interrupted one
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.distributed import all_gather_object
from fastddpm.runtime.progress import Meter, log
from fastddpm.storage.documents import parse_json
from fastddpm.storage.files import save_arrays, write_text
from fastddpm.storage.reading import read_arrays
from fastddpm.storage.shards import Shards

from .bits_per_dim import BLOCK, BitsPerDim, ImageSums, Plan, bits_per_dim, or_none
from .context import EvaluationContext
from .features import missing_shards
from .options import BitsOptions

__all__ = ["BitsPerDim", "bits_cost", "bits_of", "bits_per_dim", "measure_bits"]

_CACHE = "bits.npz"
_PARTS = "bits-parts"
_TABLE = "bits.csv"
_VERSION = 1
_SLACK = 2**20  # bytes of a result beside its numbers for each image and timestep


def bits_cost(context: EvaluationContext, options: BitsOptions) -> int:
    """Return the number of network evaluations, each of one image, by all processes together."""
    plan = Plan.of(len(context.dataset.images), context.sampler.diffusion.timesteps, options)
    return int(plan.evaluated().sum())


def check_bits(context: EvaluationContext, options: BitsOptions) -> None:
    """Raise `UsageError`, as `bits_of` would, for options that do not fit the data set or the result in `context.out`.

    Evaluates nothing.
    """
    Plan.of(len(context.dataset.images), context.sampler.diffusion.timesteps, options)
    if context.group.is_main:
        _kept(context, _settings(context, options))


def measure_bits(context: EvaluationContext, options: BitsOptions) -> dict[str, Any]:
    """Measure the bits per dimension of the data set and return them for JSON.

    `bits_per_dim` = `prior` + `terms_sum` + `decoder`, with `standard_error`. All processes return the same; the main
    one writes the terms of each timestep to bits.csv in `context.out`. Raises as `bits_of` does.
    """
    result = bits_of(context, options)
    if context.group.is_main:
        write_text(context.out / _TABLE, _csv(result))
    summary = result.to_dict()
    return {
        "bits_per_dim": summary["total"],
        "standard_error": summary["standard_error"],
        "prior": summary["prior"],
        "terms_sum": or_none(float(result.terms[1:].sum())),
        "decoder": summary["decoder"],
        "per_timestep": _TABLE,
        "conditioning": result.conditioning,
        "num_images": result.num_images,
        "evaluations": result.evaluations,
        "settings": _settings(context, options),
    }


def bits_of(context: EvaluationContext, options: BitsOptions) -> BitsPerDim:
    """Return the bound of the data set from bits.npz in `context.out`, evaluating it into that file if needed.

    Blocks of images that an interrupted call has finished are not evaluated again. Raises `UsageError` if the directory
    holds a result of another model, data set or options, and `StorageError` if it cannot be written.
    """
    settings = _settings(context, options)
    # The main process reads it for all, because another one might find the file that the main one has just written.
    kept = all_gather_object(_kept(context, settings) if context.group.is_main else None, context.group)[0]
    result = _evaluated(context, options, settings) if kept is None else BitsPerDim(**kept)
    if context.group.is_main:
        if kept is None:
            _keep(context.out / _CACHE, result, settings)
        shutil.rmtree(context.out / _PARTS, ignore_errors=True)
    return result


@dataclass(frozen=True)
class _SumShards(Shards):
    """Shards that hold the sums of a block of images instead of images; `seeds` are the images' indices."""

    timesteps: int

    _holds = "sums"
    _otherwise = "choose another --out, or remove it"

    def sums(self, index: int) -> ImageSums:
        """Return the sums of a block. Raises as `arrays` does."""
        arrays = self.arrays(index)
        return ImageSums(**{f.name: arrays[f.name] for f in fields(ImageSums)})

    def put(self, index: int, sums: ImageSums) -> None:
        """Write the sums of a block, completely or not at all. Raises `StorageError` on failure."""
        self.put_arrays(index, {f.name: getattr(sums, f.name) for f in fields(ImageSums)})

    def _names(self) -> list[str]:
        return [*(f.name for f in fields(ImageSums)), "seeds"]

    def _num_bytes(self, num: int) -> int:
        return 8 * (4 * num + 4 * self.timesteps)

    def _mismatch(self, index: int, found: Mapping[str, np.ndarray]) -> str | None:
        seeds, _ = self.part(index)
        values = [found[f.name] for f in fields(ImageSums)]
        shapes, wanted = [value.shape for value in values], [(len(seeds),)] * 3 + [(4, self.timesteps)]
        if shapes != wanted or any(value.dtype != np.float64 for value in values):
            return f"has arrays {shapes}, not {wanted}"
        return None if np.array_equal(found["seeds"], seeds) else "holds sums of other images"


def _evaluated(context: EvaluationContext, options: BitsOptions, settings: dict[str, Any]) -> BitsPerDim:
    """Evaluate the bound, reusing the blocks that an interrupted evaluation has finished."""
    dataset, group = context.dataset, context.group
    timesteps = context.sampler.diffusion.timesteps
    indices = Plan.of(len(dataset.images), timesteps, options).indices
    shards = _SumShards(context.out / _PARTS, indices, None, BLOCK, dataset.images.shape[1:], timesteps)  # type: ignore[arg-type]
    shards.claim(settings)
    with shards.locked(group.rank), contextlib.ExitStack() as stack:
        missing, damaged = missing_shards(context, shards)
        for line in damaged:
            log(line)
        known = {i: shards.sums(i) for i in range(group.rank, len(shards), group.world_size) if i not in missing}
        meters: list[Meter] = []

        def progress(done: int, total: int) -> None:
            if not meters:
                meters.append(stack.enter_context(Meter("bits/dim", total, "evaluations")))
            meters[0].update(done, lambda rate: f"{rate:.0f} evaluations/s")

        return bits_per_dim(
            context.sampler, dataset.images, dataset.labels, options, context.batch, group=group,
            progress=progress if group.is_main else None, known=known, keep=shards.put,
        )  # fmt: skip


def _settings(context: EvaluationContext, options: BitsOptions) -> dict[str, Any]:
    """Return the settings that determine the result."""
    sampler_settings = context.sampler.settings()
    relevant = ("network", "diffusion", "precision", "fp8", "device")
    return {
        "version": _VERSION,
        **{name: sampler_settings[name] for name in relevant},
        "data": context.dataset.checksum,
        "labels": context.dataset.labels is not None,
        **asdict(options),
    }


def _kept(context: EvaluationContext, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields of the result in bits.npz; None if there is none or, after a line to stderr, a damaged one.

    Raises `UsageError` if it was evaluated with other settings.
    """
    path = context.out / _CACHE
    limit = 8 * (5 * (context.sampler.diffusion.timesteps + 1) + 2 * len(context.dataset.images)) + _SLACK
    try:
        arrays = read_arrays(path, ["settings", *(f.name for f in fields(BitsPerDim))], limit)
        found = parse_json(str(arrays.pop("settings")).encode(), f"{path}: settings")
        _check_result(path, arrays, found)
    except FileNotFoundError:
        return None
    except DataError as error:
        log(f"{error}; evaluating again")
        return None
    for name in dict.fromkeys([*settings, *found]):
        if found.get(name) != settings.get(name):
            raise UsageError(
                f"{path} holds a result with {name} {found.get(name)}, not {settings.get(name)}; choose another --out, "
                "or remove it"
            )
    return {name: value if value.ndim else value.item() for name, value in arrays.items()}


def _check_result(path: Path, arrays: Mapping[str, np.ndarray], settings: Any) -> None:
    """Raise `DataError` for settings that are no object, or arrays that cannot be the fields of a result."""
    terms, indices = arrays["terms"], arrays["indices"]
    shapes = {name: terms.shape for name in ("terms", "term_errors", "mse", "mse_errors", "counts")}
    shapes |= {name: indices.shape for name in ("indices", "per_image")}
    kinds = {"counts": "i", "indices": "i", "conditioning": "U"}
    wrong = [
        name
        for name, array in arrays.items()
        if array.shape != shapes.get(name, ()) or array.dtype.kind != kinds.get(name, "f")
    ]
    if not isinstance(settings, dict) or terms.ndim != 1 or not len(terms) or indices.ndim != 1 or wrong:
        raise DataError(f"{path} holds no result of an evaluation")


def _keep(path: Path, result: BitsPerDim, settings: dict[str, Any]) -> None:
    values = {f.name: np.asarray(getattr(result, f.name)) for f in fields(BitsPerDim)}
    save_arrays(values | {"settings": np.asarray(json.dumps(settings))}, path)


def _csv(result: BitsPerDim) -> str:
    """Return one line per timestep: terms in bits per dimension, errors in units of [-1, 1] squared; t = 0: decoder."""
    columns = (result.counts, result.terms, result.term_errors, result.mse, result.mse_errors)
    lines = ["t,images,bits,bits_standard_error,x0_mse,x0_mse_standard_error"]
    for t, (count, *numbers) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        lines.append(f"{t},{count}," + ",".join(f"{number:.9g}" for number in numbers))
    return "\n".join(lines) + "\n"
