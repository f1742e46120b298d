"""A model in one file: its weights as safetensors, with configuration, recipe and checksum in the header.

A run's EMA weights are packed as float16; other implementations' models are converted in float32.

`digits.safetensors` beside this file is the model that comes with the package.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from fastddpm.config import Preset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.network import checksum
from fastddpm.storage.documents import from_stored, parse_json, read_object, to_dict
from fastddpm.storage.files import write_whole
from fastddpm.storage.reading import check_size, open_regular, readable
from fastddpm.storage.tensors import parse_tensors, read_start
from fastddpm.unet import network_with

from . import run
from .facts import parameters_of
from .parts import Parts

DIGITS = Path(__file__).with_name("digits.safetensors")
_FORMAT = 1
_RECIPE = ("step", "command", "fastddpm", "python", "libraries", "device", "threads", "processes", "data")
_LARGEST = torch.finfo(torch.float16).max


def pack(source: str | os.PathLike[str], path: str | os.PathLike[str], *, steps: int | None = None) -> str:
    """Write the model of a run or a checkpoint as one file, atomically; return the file's sha256.

    `steps`: of the chain that samples take by default. Default: the run's. The header also holds the run's commands and
    versions (environment.json) and the sha256 of the float32 weights. Raises as `run.load` does, `DataError` if float16
    cannot hold a weight, and `StorageError` if the file cannot be written.
    """
    parts = run.load(source)
    preset = parts.preset
    if steps is not None:
        preset = dataclasses.replace(preset, sample=dataclasses.replace(preset.sample, steps=steps))
    weights = {name: tensor.detach() for name, tensor in parts.unet.state_dict().items()}
    for name, tensor in weights.items():
        if not bool((tensor.abs() <= _LARGEST).all()):
            raise DataError(f"{source}: float16 cannot hold the values of {name}, which reach {tensor.abs().max():g}")
    parts = dataclasses.replace(parts, preset=preset)
    return write(parts, Path(path), _recipe(Path(source)), torch.float16)


def write(parts: Parts, path: Path, recipe: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> str:
    """Write a model as one file, atomically, its weights as `dtype`; return the file's sha256.

    `recipe`: what the header shall tell of how the weights were made. Raises `StorageError` if it cannot be written.
    """
    header = {
        "format": _FORMAT,
        "preset": to_dict(parts.preset),
        "steps": parts.steps,
        "weights_sha256": checksum(parts.unet),
        "recipe": recipe,
    }
    weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in parts.unet.state_dict().items()}
    data = safetensors.torch.save(weights, metadata={"fastddpm": json.dumps(header)})
    write_whole(path, lambda temporary: temporary.write_bytes(data), durable=True)
    return hashlib.sha256(data).hexdigest()


def _recipe(source: Path) -> list[dict[str, Any]]:
    """Return command, versions and data of each start of the run that `source` is or belongs to, if it tells.

    Without --out: where a run lies says nothing about the model.
    """
    root = source.parent.parent if source.parent.name == "checkpoints" else source
    try:
        sessions = read_object(root / "environment.json").get("sessions")
    except (FileNotFoundError, DataError):
        return []
    listed = [each for each in sessions if isinstance(each, dict)] if isinstance(sessions, list) else []
    recipe = [{name: each.get(name) for name in _RECIPE} for each in listed]
    for each in recipe:
        words = each["command"] if isinstance(each["command"], list) else []
        kept = [word for before, word in zip(["", *words], words, strict=False) if "--out" not in (before, word)]
        each["command"] = [word for word in kept if not str(word).startswith("--out=")]
    return recipe


def read_preset(path: Path) -> Preset:
    """Return the configuration of the model in a file. Raises `DataError` as `load` does."""
    with _opened(path) as file:
        return _header(read_start(file, path), path)[0]


def load(path: str | os.PathLike[str]) -> Parts:
    """Read a model from a file that `pack` or `write` wrote, as float32, in evaluation mode, on the CPU.

    Raises `UsageError` if there is no file, and `DataError` if it is damaged or no such file.
    """
    path = Path(path)
    with _opened(path) as file:
        start = read_start(file, path)
        preset, steps = _header(start, path)
        # No more is read than the network of the configuration can take, in float64.
        check_size(file, len(start) + 8 * parameters_of(preset))
        data = start + file.read()
    weights = parse_tensors(data, path)
    run.check_fit(preset.unet, weights, path)
    unet = network_with(preset.unet, {name: tensor.to(torch.float32) for name, tensor in weights.items()})
    return Parts(unet.requires_grad_(True).channels_last(), Diffusion(preset.diffusion), preset, steps)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    with readable(path), open_regular(path) as file:
        yield file


def _header(start: bytes, path: Path) -> tuple[Preset, int | None]:
    """Return configuration and steps from the header of a file."""
    metadata = parse_json(start[8:], path).get("__metadata__")
    text = metadata.get("fastddpm") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f"{path} holds no model of fastddpm: its header has no configuration; if it is another implementation's, "
            "convert it with python -m fastddpm.convert"
        )
    header = parse_json(text.encode(), path)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise DataError(f"{path} holds a model in a format that this version does not read; it reads {_FORMAT}")
    steps = header.get("steps")
    if steps is not None and (type(steps) is not int or steps < 0):
        raise DataError(f"{path}: steps must be an integer, 0 or more; got {steps!r:.100}")
    return from_stored(Preset, header.get("preset"), f"{path}: preset"), steps
