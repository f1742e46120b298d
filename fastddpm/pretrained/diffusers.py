"""Reader and writer of diffusers' pipeline directories of unconditional models, without importing diffusers.

    model_index.json                                 optional when reading
    unet/config.json                                 or config.json at the root
    unet/diffusion_pytorch_model.safetensors         or at the root; also .fp16.safetensors, and in shards with an index
    scheduler/scheduler_config.json                  or scheduler_config.json at the root
    fastddpm.json                                    fastddpm's own: training, sampling and label settings
    README.md                                        the model card; not read

No module that a file names is imported. The scheduler tells the process, the sampling method and the spacing of a
shorter chain's timesteps; with fastddpm.json beside it, that tells the latter two.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.runtime.network import checksum
from fastddpm.storage.documents import from_dict, read_json, to_dict
from fastddpm.storage.files import sync, whole_directory
from fastddpm.storage.reading import check_size, open_regular, readable
from fastddpm.storage.tensors import parse_tensors
from fastddpm.unet import network_with

from .card import check_license, model_card
from .diffusers_config import check_agreement, cosines_first, read_unet, write_unet
from .diffusers_fields import VERSION
from .diffusers_names import family, renewed, theirs
from .diffusers_scheduler import SCHEDULERS, Process, read_scheduler, write_scheduler
from .facts import DIFFUSERS, Facts, parameters_of, scores_of
from .foreign import unpickle
from .foreign.mapping import converted
from .parts import Parts

WEIGHTS = "diffusion_pytorch_model.safetensors"
OUR_FILE = "fastddpm.json"
CARD = "README.md"
STEM = WEIGHTS.removesuffix(".safetensors")
_VARIANTS = ("", ".fp16")  # in the order of preference
_MOST_SHARDS = 1000
_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")


def is_pipeline(path: Path) -> bool:
    """Return whether `path` is a directory with the configuration of a network of diffusers, or a pipeline's index."""
    return any((path / name).is_file() for name in ("model_index.json", "unet/config.json")) or (
        (path / "config.json").is_file() and any(path.glob(f"{STEM}*"))
    )


def load(path: str | os.PathLike[str], *, given: Mapping[str, Any] | None = None, unpickling: bool = False) -> Parts:
    """Read the model of a pipeline directory, as float32, in evaluation mode, on the CPU.

    The file's weights may be float32, float16 or bfloat16, with diffusers' old or new names of attention layers.
    `given`: what the directory does not tell: image_size if its sample_size is null, and fields of DiffusionConfig if
    it has no scheduler. `unpickling`: also read weights of torch.save, in a child process. Raises `UsageError` if there
    is no such directory, and `DataError` if a file is missing, damaged, or describes a model that fastddpm cannot
    represent.
    """
    root = Path(path)
    preset, cosines = _described(root, given or {})
    tensors, where = _tensors(root, preset, unpickling)
    weights = converted(family(cosines_first=cosines), preset.unet, renewed(tensors), str(where))
    unet = network_with(preset.unet, weights).requires_grad_(True)
    return Parts(unet.channels_last(), _diffusion(preset.diffusion, root), preset)


def read_preset(path: str | os.PathLike[str]) -> Preset:
    """Return the configuration of the model in a pipeline directory. Raises as `load` does; reads no weights."""
    return _described(Path(path), {})[0]


def _described(root: Path, given: Mapping[str, Any]) -> tuple[Preset, bool]:
    """Return the configuration of the model, and whether its time embedding has cosines before sines."""
    if not root.is_dir():
        raise UsageError(f"no diffusers directory at {root}")
    _check_index(root)
    unet_file = _find(root, "unet", "config.json")
    data = read_json(unet_file)
    unet_config = read_unet(data, str(unet_file), given.get("image_size"))
    process, scheduler_file = _process(root, {name: given[name] for name in given if name != "image_size"})
    diffusion_config = process.diffusion
    if unet_config.learned_variance != diffusion_config.learned_variance:
        raise DataError(
            f"{unet_file} has {'twice' if unet_config.learned_variance else 'just'} the image's channels as output, "
            f"which does not go with variance_type {diffusion_config.variance} in {scheduler_file}"
        )
    if (root / OUR_FILE).exists():
        ours = read_json(root / OUR_FILE)
        preset = from_dict(Preset, ours.get("preset") if isinstance(ours, dict) else None, str(root / OUR_FILE))
        check_agreement(preset, unet_config, diffusion_config, str(root / OUR_FILE), process.untold)
    else:
        preset = Preset(DIFFUSERS, unet_config, diffusion_config, TrainConfig(), process.sample)
    return preset, cosines_first(data)


def _process(root: Path, given: Mapping[str, Any]) -> tuple[Process, Path]:
    """Return the process and the sampling of a directory's scheduler, and the scheduler's file."""
    file = _found(root, "scheduler", "scheduler_config.json")
    if file is not None:
        if given:
            raise UsageError(f"--config: {next(iter(given))} is told by {file}; change it there")
        return read_scheduler(read_json(file), str(file)), file
    if not given:
        raise DataError(
            f"{root} lacks scheduler/scheduler_config.json (or scheduler_config.json in the directory itself). If "
            "there is none, convert it with python -m fastddpm.convert DIRECTORY OUT --config FILE.json, which tells "
            'the process, as in {"schedule": "linear", "prediction": "eps"}'
        )
    return Process(from_dict(DiffusionConfig, dict(given), "--config"), SampleConfig(), ()), root


def _diffusion(config: DiffusionConfig, root: Path) -> Diffusion:
    try:
        return Diffusion(config)
    except UsageError as error:
        raise DataError(f"{root}: {error}") from error


def save(model: Parts, path: str | os.PathLike[str], *, overwrite: bool = False, license: str | None = None) -> None:
    """Write `model` as a `DDPMPipeline` directory, atomically.

    `license`: what the card states, as apache-2.0. Default: none is stated. Raises `UsageError` for one of another
    form, if diffusers cannot express the process (prediction xprev, schedules const and jsd, variance learned), or if
    `path` is not empty, unless it is a pipeline and `overwrite` is true. Raises `StorageError` if it cannot be written.
    """
    target = Path(path)
    check_license(license)
    documents = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": VERSION,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": write_unet(model.preset.unet),
        "scheduler/scheduler_config.json": write_scheduler(model.preset.diffusion),
        OUR_FILE: {"format": 1, "preset": to_dict(model.preset)},
    }
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise UsageError(f"{target} exists and is not empty; choose another path, or set overwrite=True")
        if not (target / "model_index.json").exists():
            raise UsageError(
                f"{target} is not a diffusers pipeline, and nothing else is overwritten; choose another path"
            )
    try:
        with whole_directory(target) as directory:
            _write_all(model, documents, directory, license)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error


def _write_all(model: Parts, documents: dict[str, Any], directory: Path, license: str | None) -> None:
    for name, document in documents.items():
        _write(directory / name, (json.dumps(document, indent=2) + "\n").encode())
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in theirs(model.preset.unet, model.unet.state_dict()).items()
    }
    _write(directory / CARD, model_card(_facts(model), license).encode())
    _write(directory / "unet" / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _facts(model: Parts) -> Facts:
    scores = () if model.run is None else scores_of(model.run, checksum(model.unet))
    sigma_rel = None if model.average is None else model.average.sigma_rel
    return Facts(model.preset, parameters_of(model.preset), model.steps, model.data, scores, sigma_rel)


def _check_index(root: Path) -> None:
    index = root / "model_index.json"
    if not index.exists():
        return
    data = read_json(index)
    if not isinstance(data, dict):
        raise DataError(f"{index} must hold a JSON object; it holds {type(data).__name__}")
    if data.get("_class_name") not in _PIPELINES:
        raise DataError(f"{index}: _class_name must be {' or '.join(_PIPELINES)}; got {data.get('_class_name')!r:.100}")
    for part, known in (("unet", ["UNet2DModel"]), ("scheduler", list(SCHEDULERS))):
        if not isinstance(data.get(part), list) or data[part][-1:] not in [[name] for name in known]:
            raise DataError(f"{index}: {part} must be {' or '.join(known)}; got {data.get(part)!r:.100}")
    others = [name for name in data if name not in ("unet", "scheduler") and not name.startswith("_")]
    if others:
        raise DataError(f"{index}: a pipeline must have a unet and a scheduler only; it also has {', '.join(others)}")


def _find(root: Path, folder: str, name: str) -> Path:
    path = _found(root, folder, name)
    if path is None:
        raise DataError(f"{root} lacks {folder}/{name} (or {name} in the directory itself)")
    return path


def _found(root: Path, folder: str, name: str) -> Path | None:
    return next((path for path in (root / folder / name, root / name) if path.is_file()), None)


def _tensors(root: Path, preset: Preset, unpickling: bool) -> tuple[dict[str, Tensor], Path]:
    """Return the tensors of a directory's weights by diffusers' names, and where they are from."""
    most = most_bytes(parameters_of(preset))
    present = [path.relative_to(root).as_posix() for path in (*root.glob("unet/*"), *root.iterdir()) if path.is_file()]
    files = [root / name for name in weights_among(present, root.joinpath, str(root))]
    if files:
        return _read(files, most), files[0] if len(files) == 1 else files[0].parent
    pickled = [p for p in (*root.glob("unet/*.bin"), *root.glob("*.bin"), *root.glob("*.ckpt")) if p.is_file()]
    if not pickled:
        raise DataError(f"{root} lacks unet/{WEIGHTS} (or {WEIGHTS} in the directory itself)")
    if not unpickling:
        raise DataError(
            f"{pickled[0]} is a pickle, which can run code, and is not read; if you trust it, name the directory to "
            "python -m fastddpm.convert, which reads its tensors in a process of its own"
        )
    if len(pickled) > 1:
        raise DataError(f"{root} holds {len(pickled)} pickles, of which one can be read: {pickled[0]}, {pickled[1]}")
    return dict(unpickle.read(pickled[0]).tensors), pickled[0]


def weights_among(names: Collection[str], read_index: Callable[[str], Path], where: str) -> list[str]:
    """Return which of `names`, the files of a directory, hold the weights: one or several shards; [] if none do.

    `names`: relative, with "/". `read_index`: the path of an index of shards, by its name. `where`: the directory, for
    messages. Full precision is preferred to variants, of which only fp16 is known. Raises `DataError` for another
    variant alone, and for an index that is damaged or whose shards are not there.
    """
    for prefix in ("unet/", ""):
        for variant in _VARIANTS:
            whole, index = f"{prefix}{STEM}{variant}.safetensors", f"{prefix}{STEM}.safetensors.index{variant}.json"
            if whole in names:
                return [whole]
            if index in names:
                found = [prefix + name for name in _shards(read_index(index))]
                lacking = [name for name in found if name not in names]
                if lacking:
                    raise DataError(f"{where} lacks {lacking[0]:.200}, which {index} names")
                return found
        others = sorted(name for name in names if re.fullmatch(rf"{prefix}{STEM}\.[^/]+\.safetensors", name))
        if others:
            raise DataError(
                f"{where} holds weights of the variant {others[0].split('.')[1]!r:.50} only; rename "
                f"{others[0]:.200} to {WEIGHTS} if they are what you want"
            )
    return []


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index names, which lie beside it. Raises `DataError`."""
    data = read_json(index)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{index}: weight_map must be an object of file names")
    files = sorted(set(names.values()))
    strange = [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]
    if strange or not 1 <= len(files) <= _MOST_SHARDS:
        raise DataError(
            f"{index}: weight_map must name 1 to {_MOST_SHARDS} .safetensors files beside it; got "
            f"{strange[0] if strange else len(files)!r:.100}"
        )
    return files


def _read(files: Sequence[Path], most: int) -> dict[str, Tensor]:
    """Return the tensors of files that have at most `most` bytes together."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with readable(path), open_regular(path) as file:
            most -= check_size(file, most)
            found = parse_tensors(file.read(), path)
        twice = next((name for name in found if name in tensors), None)
        if twice is not None:
            raise DataError(f"{path} holds {twice:.100}, which another file holds as well")
        tensors |= found
    return tensors


def most_bytes(parameters: int) -> int:
    """Return the bytes that are read of the weights of a network with so many parameters: twice those of float32."""
    return 8 * parameters + 2**20


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    sync(path)
