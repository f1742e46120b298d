"""Read another implementation's checkpoint: its format, weights and configuration are found and mapped to ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, UsageError
from fastddpm.pretrained.facts import CONVERTED
from fastddpm.pretrained.parts import Parts
from fastddpm.storage.documents import from_dict, read_object
from fastddpm.storage.reading import open_regular, readable
from fastddpm.storage.tensors import parse_tensors, read_start
from fastddpm.unet import network_with

from . import hojonathanho, tensor_bundle, unpickle
from .catalogue import FORMATS, TENSORFLOW, named, recognised
from .format import Format, Published
from .mapping import converted, inferred
from .refused import REFUSED

Weights = Literal["average", "raw"]
_UNET = tuple(UNetConfig.__dataclass_fields__)
_PROCESS = tuple(DiffusionConfig.__dataclass_fields__)
_PARALLEL = "module."  # what torch.nn.DataParallel puts before every name
_STEPS = ("step", "global_step")


@dataclass(frozen=True)
class Stored:
    """The network's tensors of a file, the others and plain values, and what a document beside it tells of the two
    configurations."""

    tensors: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    values: Mapping[str, object]
    unet: Mapping[str, Any]
    process: Mapping[str, Any]


@dataclass(frozen=True)
class Imported:
    """A model, the name of its format, and lines about what was read and what was assumed."""

    parts: Parts
    format: str
    lines: list[str]


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` names what `load` reads without unpickling: a TensorFlow checkpoint."""
    return tensor_bundle.find(path) is not None


def load(path: Path) -> Parts:
    """Read the model of a TensorFlow checkpoint, averaged weights if it has them. Raises as `read` does."""
    return read(path).parts


def read_preset(path: Path) -> Preset:
    """Return the configuration of the model in a TensorFlow checkpoint. Raises as `read` does."""
    return read(path).parts.preset


def read(
    source: Path,
    *,
    like: str | None = None,
    given: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    unpickling: bool = False,
) -> Imported:
    """Read the model of another implementation's checkpoint, as float32, in evaluation mode, on the CPU.

    `source`: the prefix or the directory of a TensorFlow checkpoint, a safetensors file, or with `unpickling` a file of
    torch.save. `like`: the name of a published configuration or of a format. `given`: fields of UNetConfig and
    DiffusionConfig, as plain data, and options of the format, that shall hold whatever else tells. `weights`: averaged
    or raw; default: averaged if there are any. Raises `UsageError` for names, fields and files that do not exist, and
    what has to be given, and `DataError`, naming a tensor and what is expected, for files that are damaged or do not
    fit.
    """
    wanted, published = named(like)
    prefix = tensor_bundle.find(source)
    if prefix is not None:
        if wanted is not None and wanted.name != TENSORFLOW:
            raise UsageError(f"{source} is a TensorFlow checkpoint, which {wanted.name} does not write")
        stored, label, steps = _of_bundle(prefix, weights)
        checkpoint = FORMATS[TENSORFLOW]
        recognised(stored.tensors, str(source), checkpoint)
    else:
        stored = _of_file(source, unpickling)
        checkpoint, tensors, label = _chosen(stored, str(source), wanted, weights)
        stored = Stored(tensors, stored.tensors, stored.values, stored.unet, stored.process)
        steps = next((value for name in _STEPS if type(value := stored.values.get(name)) is int and value >= 0), None)
    lines = [f"format: {checkpoint.name} ({checkpoint.repository})", f"weights: {label}"]
    where = str(source) if published is None else f"{source} as {like}"
    unet, diffusion, tensors, told = _configured(checkpoint, published, stored, given or {}, where)
    preset = Preset(CONVERTED, unet, diffusion, TrainConfig(), SampleConfig())
    process = Diffusion(diffusion)
    network = network_with(unet, tensors).requires_grad_(True)
    return Imported(Parts(network.channels_last(), process, preset, steps), checkpoint.name, lines + told)


def _configured(
    checkpoint: Format, published: Published | None, stored: Stored, given: Mapping[str, Any], where: str
) -> tuple[UNetConfig, DiffusionConfig, dict[str, Tensor], list[str]]:
    """Return both configurations, our weights, and lines about what was assumed."""
    unknown = [name for name in given if name not in (*_UNET, *_PROCESS, *checkpoint.options)]
    if unknown:
        raise UsageError(
            f"--config has {unknown[0]!r:.100}, which is no field of UNetConfig ({', '.join(_UNET)}), of "
            f"DiffusionConfig ({', '.join(_PROCESS)}) or option of {checkpoint.name}"
            f"{' (' + ', '.join(checkpoint.options) + ')' if checkpoint.options else ''}"
        )
    options = dict(checkpoint.options) | dict(published.options if published else {})
    options |= {name: given[name] for name in checkpoint.options if name in given}
    for name, default in checkpoint.options.items():
        if type(options[name]) is not type(default):
            raise UsageError(f"--config: {name} must be {type(default).__name__}; got {options[name]!r:.100}")
    family = checkpoint.family(options)
    fields = inferred(family, stored.tensors, where)
    attends = fields.pop("attends")
    reason = checkpoint.refuses(fields)
    if reason is not None:
        raise DataError(f"{where} cannot be converted: {reason}")
    known = dict(stored.unet) | dict(published.unet if published else {}) | _of(given, _UNET)
    if "channels" in known or "multipliers" in known:
        fields.pop("channels", None)
        fields.pop("multipliers", None)
    lines = []
    fields |= {"dropout": 0.0} | known
    if "image_size" not in fields:
        size = checkpoint.image_size(attends, stored.others)
        if size is not None:
            fields["image_size"] = size
            lines.append(f"assumed: image size {size}, from the level of the first attention or the file's noise")
    _refuse_untold(checkpoint, fields, where)
    if "attention_resolutions" not in fields:
        height = fields["image_size"]
        height = height[0] if isinstance(height, list | tuple) and height else height
        if type(height) is not int:
            raise UsageError(f"--config: image_size must be an integer, or a height and a width; got {height!r:.100}")
        fields["attention_resolutions"] = tuple(height >> level for level, on in enumerate(attends) if on)
    process = dict(stored.process) | dict(published.diffusion if published else {}) | _of(given, _PROCESS)
    assumed, text = checkpoint.diffusion(fields, process)
    if not stored.process and not published:
        lines.append(f"assumed: {text}" + (", but for what --config gives" if _of(given, _PROCESS) else ""))
    process = dict(assumed) | process
    timesteps = process.get("timesteps", 1000)
    if options.get("rescale_timesteps") and "time_scale" not in fields and timesteps > 0:
        fields["time_scale"] = 1000 / timesteps
    try:
        unet = from_dict(UNetConfig, {name: to_plain(value) for name, value in fields.items()}, f"{where}: network")
        diffusion = from_dict(DiffusionConfig, process, f"{where}: process")
        Preset(CONVERTED, unet, diffusion)
    except UsageError as error:
        raise DataError(
            f"{where} is no network with these fields: {error}; fields that a file does not tell, as groups, heads "
            'and image_size, are given by --config FILE.json, as in {"groups": 32}'
        ) from error
    return unet, diffusion, converted(family, unet, stored.tensors, where), lines


def to_plain(value: Any) -> Any:
    """Return a field's value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _of(given: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}


def _refuse_untold(checkpoint: Format, fields: Mapping[str, Any], where: str) -> None:
    needed = dict(checkpoint.needed) | {"image_size": "height and width of the images"}
    missing = {names: word for names, word in needed.items() if not any(name in fields for name in names.split("|"))}
    if not missing:
        return
    wanted = ", ".join(f"{names.replace('|', ' or ')} ({word})" for names, word in missing.items())
    example = next(iter(checkpoint.published), None)
    raise UsageError(
        f"{where}: a checkpoint of {checkpoint.name} does not tell {wanted}; give "
        + (f"--like {example}, if it is that published file or another of docs/import.md, or " if example else "")
        + f'--config FILE.json, as in {{"{next(iter(missing)).split("|")[0]}": 32}}'
    )


def _chosen(
    stored: Stored, where: str, wanted: Format | None, weights: Weights | None
) -> tuple[Format, dict[str, Tensor], str]:
    """Return the format, the tensors of the averaged or raw weights by the format's own names, and which they are."""
    sets: dict[str, dict[str, Tensor]] = {}
    for prefix in {prefix for each in FORMATS.values() for prefix in each.sets.values()}:
        found = {name.removeprefix(prefix): t for name, t in stored.tensors.items() if name.startswith(prefix)}
        if found and all(name.startswith(_PARALLEL) for name in found):
            found = {name.removeprefix(_PARALLEL): tensor for name, tensor in found.items()}
        sets[prefix] = found
    names = dict.fromkeys(name for prefix in sorted(sets, key=len, reverse=True) for name in sets[prefix])
    checkpoint = recognised(names, where, wanted)
    own = {label: sets[prefix] for label, prefix in checkpoint.sets.items() if _network(checkpoint, sets[prefix])}
    if not own:  # a state dict alone
        own = {"": sets[""]}
    label: str = weights or ("average" if "average" in own else next(iter(own)))
    if list(own) == [""]:
        label, text = "", "those of the file, which does not tell whether they are averaged"
        if weights is not None:
            raise UsageError(f"{where} has one set of weights and does not tell whether it is averaged or raw")
    elif label not in own:
        raise UsageError(f"{where} has no {label} weights, only {' and '.join(own)} ones")
    else:
        text = {"average": "averaged", "raw": "raw"}[label] + f" ({checkpoint.sets[label]}..)"
    tensors = {name: tensor for name, tensor in own[label].items() if name not in checkpoint.ignored}
    return checkpoint, tensors, text


def _network(checkpoint: Format, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(checkpoint.signature[0]) for name in tensors)


def _of_file(source: Path, unpickling: bool) -> Stored:
    """Return what a file of tensors holds."""
    try:
        with readable(source), open_regular(source) as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file or TensorFlow checkpoint {source}") from error
    if start[8:9] == b"{":  # safetensors: the header's length, and JSON
        with readable(source), open_regular(source) as file:
            data = read_start(file, source) + file.read()
        return Stored(parse_tensors(data, source), {}, {}, {}, {})
    if source.suffix == ".pkl":
        raise DataError(f"{source} is a .pkl file and not read: {REFUSED['EDM'].reason}; {REFUSED['EDM'].way_round}")
    if not unpickling:
        raise UsageError(
            f"{source} is no format that is read directly. If it is of torch.save, a pickle, name it to "
            "`python -m fastddpm.convert`, which reads it in a process of its own"
        )
    found = unpickle.read(source)
    return Stored(found.tensors, {}, found.values, {}, {})


def _of_bundle(prefix: Path, weights: Weights | None) -> tuple[Stored, str, int | None]:
    """Return the weights of a TensorFlow checkpoint without their common prefix, which they are, and their steps."""
    bundle = tensor_bundle.open_bundle(prefix)
    root, average = hojonathanho.ROOT, hojonathanho.AVERAGE
    averaged = [name for name in bundle.variables if name.startswith(root) and name.endswith(average)]
    raw = [name for name in bundle.variables if name.startswith(root) and "/Adam" not in name and average not in name]
    if weights == "average" and not averaged:
        raise UsageError(f"{prefix} has no averaged weights (..{average}), only raw ones")
    chosen = averaged if weights != "raw" and averaged else raw
    arrays = tensor_bundle.read(bundle, chosen)
    tensors = {
        name.removeprefix(root).removesuffix(average): torch.from_numpy(array.copy()) for name, array in arrays.items()
    }
    unet: dict[str, Any] = {}
    process: dict[str, Any] = {}
    document = prefix.with_name("kwargs.json")
    if document.exists():
        unet, process = hojonathanho.of_kwargs(read_object(document))
    steps = None
    if hojonathanho.STEPS in bundle.variables:
        steps = int(tensor_bundle.read(bundle, [hojonathanho.STEPS])[hojonathanho.STEPS].reshape(-1)[0])
    label = f"averaged (..{average})" if chosen is averaged else "raw"
    return Stored(tensors, {}, {}, unet, process), label, steps if steps is None or steps >= 0 else None
