"""Bits per dimension of a subject: evaluated once, kept beside the results, and told as numbers and a table."""

import json
import sys
import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import UsageError
from fastddpm.figures import save_arrays, write_whole
from fastddpm.processes import gathered
from fastddpm.runlog import Meter

from .bound import BitsPerDim, Plan, bits_per_dim, or_none
from .options import BitsOptions
from .subject import Subject

__all__ = ["BitsPerDim", "bits_cost", "bits_of", "bits_per_dim", "measure_bits"]

_CACHE = "bits.npz"
_TABLE = "bits.csv"
_VERSION = 1


def bits_cost(subject: Subject, options: BitsOptions) -> int:
    """How often the network will be evaluated, for one image each, by all processes together."""
    plan = Plan.of(len(subject.dataset.images), subject.sampler.diffusion.timesteps, options)
    return int(plan.evaluated().sum())


def measure_bits(subject: Subject, options: BitsOptions) -> dict[str, Any]:
    """Bits per dimension of the subject's images, for JSON; the terms of each timestep go to bits.csv in its directory.

    `bits_per_dim` = `prior` + `terms_sum` + `decoder`, with `standard_error`. Every process returns the same, the
    first one writes. Raises as `bits_of`.
    """
    result = bits_of(subject, options)
    if subject.place.first:
        write_whole(subject.out / _TABLE, lambda path: path.write_text(_csv(result), encoding="utf-8"))
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
        "settings": _settings(subject, options),
    }


def bits_of(subject: Subject, options: BitsOptions) -> BitsPerDim:
    """The bound of the subject's images, from bits.npz in its directory when it is there, and put there otherwise.

    Raises `UsageError` where the directory holds that of another model, other data or other options, and
    `StorageError` where it cannot be written.
    """
    settings, path = _settings(subject, options), subject.out / _CACHE
    # The first process looks for all: another one might find what the first has only just written.
    kept = gathered(_kept(path, settings) if subject.place.first else None, subject.place)[0]
    if kept is not None:
        return BitsPerDim(**kept)
    dataset = subject.dataset
    mine = -(-bits_cost(subject, options) // subject.place.count)
    with Meter("bits/dim", mine, "evaluations") as meter:

        def progress(done: int) -> None:
            meter.update(min(done, mine), lambda rate: f"{rate:.0f} evaluations/s")

        result = bits_per_dim(
            subject.sampler, dataset.images, dataset.labels, options, subject.batch,
            place=subject.place, progress=progress if subject.place.first else None,
        )  # fmt: skip
    if subject.place.first:
        _keep(path, result, settings)
    return result


def _settings(subject: Subject, options: BitsOptions) -> dict[str, Any]:
    """What the numbers are a function of."""
    of_sampler = subject.sampler.settings()
    named = ("network", "diffusion", "precision", "fp8", "device")
    return {
        "version": _VERSION,
        **{name: of_sampler[name] for name in named},
        "data": subject.dataset.checksum,
        "labels": subject.dataset.labels is not None,
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
