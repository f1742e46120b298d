"""Another implementation's checkpoint into one file of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastddpm.errors import UsageError
from fastddpm.presets import PRESETS, describe
from fastddpm.pretrained import compact, diffusers
from fastddpm.pretrained.facts import DIFFUSERS, parameters_of
from fastddpm.runtime.progress import announced

from .read import Imported, Weights, read


def convert(
    source: Path,
    out: Path,
    *,
    like: str | None = None,
    given: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
) -> list[str]:
    """Write the model of another implementation's checkpoint to `out`, a .safetensors file; return lines about it.

    Arguments are those of `read`; `source` may also be a directory of diffusers, whose weights may be a pickle. Nothing
    is written unless every tensor fits. Raises as `read`, and `StorageError` if `out` cannot be written.
    """
    with announced(f"reading {source}"):
        model = _read(source, like, given or {}, weights)
    origin = {"converted_from": model.format, "file": source.name, "said": model.lines}
    out.parent.mkdir(parents=True, exist_ok=True)
    checksum = compact.write(model.parts, out, [origin])
    preset = model.parts.preset
    return [
        *model.lines,
        describe(preset, PRESETS["cifar10"]).splitlines()[1],
        describe(preset, PRESETS["cifar10"]).splitlines()[2],
        f"{out}: {parameters_of(preset):,} parameters, {out.stat().st_size:,} bytes, sha256 {checksum}",
    ]


def _read(source: Path, like: str | None, given: Mapping[str, Any], weights: Weights | None) -> Imported:
    if not diffusers.is_pipeline(source):
        if like == DIFFUSERS:
            raise UsageError(f"{source} is no directory of diffusers: it has no unet/config.json and no config.json")
        return read(source, like=like, given=given, weights=weights, unpickling=True)
    if like not in (None, DIFFUSERS):
        raise UsageError(f"{source} is a directory of diffusers, not of {like}")
    if weights is not None:
        raise UsageError("--weights: a directory of diffusers does not tell whether its weights are averaged or raw")
    parts = diffusers.load(source, given=given, unpickling=True)
    return Imported(parts, DIFFUSERS, [f"format: {DIFFUSERS}", "weights: those of the directory"])
