"""Bits per dimension of a context: evaluated once, kept beside the results, and told as numbers and a table.

bits.npz     the result, and what it is a function of; another setting is refused
bits.csv     the terms of each timestep
bits-parts/  until then: a shard of sums for each block of images, so that an interrupted bound goes on
"""

import contextlib
import json
import shutil
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import UsageError
from fastddpm.runtime.distributed import all_gather_object
from fastddpm.runtime.progress import Meter
from fastddpm.storage.files import save_arrays, write_text
from fastddpm.storage.shards import Shards

from .bits_per_dim import BLOCK, BitsPerDim, ImageSums, Plan, bits_per_dim, or_none
from .context import EvaluationContext
from .options import BitsOptions

__all__ = ["BitsPerDim", "bits_cost", "bits_of", "bits_per_dim", "measure_bits"]

_CACHE = "bits.npz"
_PARTS = "bits-parts"
_TABLE = "bits.csv"
_VERSION = 1


def bits_cost(context: EvaluationContext, options: BitsOptions) -> int:
    """How often the network will be evaluated, for one image each, by all processes together."""
    plan = Plan.of(len(context.dataset.images), context.sampler.diffusion.timesteps, options)
    return int(plan.evaluated().sum())


def measure_bits(context: EvaluationContext, options: BitsOptions) -> dict[str, Any]:
    """Bits per dimension of the context's images, for JSON; the terms of each timestep go to bits.csv in its directory.

    `bits_per_dim` = `prior` + `terms_sum` + `decoder`, with `standard_error`. Every process returns the same, the
    first one writes. Raises as `bits_of`.
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
    """The bound of the context's images, from bits.npz in its directory when it is there, and put there otherwise.

    What an interrupted call has left is not evaluated again. Raises `UsageError` where the directory holds that of
    another model, other data or other options, and `StorageError` where it cannot be written.
    """
    settings, path = _settings(context, options), context.out / _CACHE
    # The first process looks for all: another one might find what the first has only just written.
    kept = all_gather_object(_kept(path, settings) if context.group.is_main else None, context.group)[0]
    result = _evaluated(context, options, settings) if kept is None else BitsPerDim(**kept)
    if context.group.is_main:
        if kept is None:
            _keep(path, result, settings)
        shutil.rmtree(context.out / _PARTS, ignore_errors=True)
    return result


@dataclass(frozen=True)
class _Parts(Shards):
    """Sums of blocks of images instead of the images; `seeds` are the indices of the images."""

    timesteps: int

    _holds = "sums"
    _otherwise = "choose another --out, or remove it"

    def block(self, index: int) -> ImageSums:
        """The sums of a block; errors of NumPy and zip for a damaged file."""
        with np.load(self.path(index), allow_pickle=False) as arrays:
            return ImageSums(**{f.name: arrays[f.name] for f in fields(ImageSums)})

    def put(self, index: int, block: ImageSums) -> None:
        """Keep the sums of a block, whole or not at all; `StorageError` where that fails."""
        self.put_arrays(index, {f.name: getattr(block, f.name) for f in fields(ImageSums)})

    def _names(self) -> list[str]:
        return [*(f.name for f in fields(ImageSums)), "seeds"]

    def _mismatch(self, index: int, found: Mapping[str, np.ndarray]) -> str | None:
        seeds, _ = self.part(index)
        values = [found[f.name] for f in fields(ImageSums)]
        shapes, wanted = [value.shape for value in values], [(len(seeds),)] * 3 + [(4, self.timesteps)]
        if shapes != wanted or any(value.dtype != np.float64 for value in values):
            return f"has arrays {shapes}, not {wanted}"
        return None if np.array_equal(found["seeds"], seeds) else "is of other images"


def _evaluated(context: EvaluationContext, options: BitsOptions, settings: dict[str, Any]) -> BitsPerDim:
    """The bound, from what an interrupted evaluation has left and the rest of it."""
    dataset, group = context.dataset, context.group
    timesteps = context.sampler.diffusion.timesteps
    indices = Plan.of(len(dataset.images), timesteps, options).indices
    parts = _Parts(context.out / _PARTS, indices, None, BLOCK, dataset.images.shape[1:], timesteps)  # type: ignore[arg-type]
    parts.claim(settings)
    with parts.locked(group.rank), contextlib.ExitStack() as stack:
        parts.forget_temporaries(group.rank, group.world_size)
        missing, damaged = parts.missing(group.rank, group.world_size)
        for line in damaged:
            print(line, file=sys.stderr)
        known = {i: parts.block(i) for i in range(group.rank, len(parts), group.world_size) if i not in missing}
        meters: list[Meter] = []

        def progress(done: int, total: int) -> None:
            if not meters:
                meters.append(stack.enter_context(Meter("bits/dim", total, "evaluations")))
            meters[0].update(done, lambda rate: f"{rate:.0f} evaluations/s")

        return bits_per_dim(
            context.sampler, dataset.images, dataset.labels, options, context.batch, group=group,
            progress=progress if group.is_main else None, known=known, keep=parts.put,
        )  # fmt: skip


def _settings(context: EvaluationContext, options: BitsOptions) -> dict[str, Any]:
    """What the numbers are a function of."""
    of_sampler = context.sampler.settings()
    named = ("network", "diffusion", "precision", "fp8", "device")
    return {
        "version": _VERSION,
        **{name: of_sampler[name] for name in named},
        "data": context.dataset.checksum,
        "labels": context.dataset.labels is not None,
        **asdict(options),
    }


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a result that was kept; None without one, or for one that cannot be read."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = json.loads(str(arrays["settings"]))
            values = {f.name: arrays[f.name] for f in fields(BitsPerDim)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path} cannot be read ({type(error).__name__}): evaluated again", file=sys.stderr)
        return None
    for name in dict.fromkeys([*settings, *found]):
        if found.get(name) != settings.get(name):
            raise UsageError(
                f"{path} is of {name} {found.get(name)}, not {settings.get(name)}; choose another --out, or remove it"
            )
    return {name: value if value.ndim else value.item() for name, value in values.items()}


def _keep(path: Path, result: BitsPerDim, settings: dict[str, Any]) -> None:
    values = {f.name: np.asarray(getattr(result, f.name)) for f in fields(BitsPerDim)}
    save_arrays(values | {"settings": np.asarray(json.dumps(settings))}, path)


def _csv(result: BitsPerDim) -> str:
    """A line for each timestep, in bits per dimension and in units of [-1, 1] squared; t = 0 is the decoder's term."""
    columns = (result.counts, result.terms, result.term_errors, result.mse, result.mse_errors)
    lines = ["t,images,bits,bits_standard_error,x0_mse,x0_mse_standard_error"]
    for t, (count, *numbers) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        lines.append(f"{t},{count}," + ",".join(f"{number:.9g}" for number in numbers))
    return "\n".join(lines) + "\n"
