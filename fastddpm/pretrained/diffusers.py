"""Reader and writer of diffusers' `DDPMPipeline` directories, without importing diffusers.

    model_index.json                                 optional when reading
    unet/config.json                                 or config.json at the root
    unet/diffusion_pytorch_model.safetensors         or at the root
    scheduler/scheduler_config.json                  or scheduler_config.json at the root
    fastddpm.json                                    fastddpm's own: training, sampling and label settings
    README.md                                        the model card; not read

No module that a file names is imported. diffusers' timesteps for short chains (`timestep_spacing`) are not adopted:
`fastddpm.Sampler` spreads its own, or takes a list of timesteps.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastddpm.config import Preset, SampleConfig, TrainConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.runtime.network import checksum
from fastddpm.storage.documents import from_dict, read_json, to_dict
from fastddpm.storage.files import sync, whole_directory
from fastddpm.storage.reading import read_bytes, readable
from fastddpm.storage.tensors import parse_tensors
from fastddpm.unet import UNet

from .card import model_card
from .diffusers_config import VERSION, check_agreement, read_scheduler, read_unet, write_scheduler, write_unet
from .facts import FOREIGN, Facts, parameters_of, scores_of
from .parts import Parts

WEIGHTS = "diffusion_pytorch_model.safetensors"
OUR_FILE = "fastddpm.json"
CARD = "README.md"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# (pattern, replacement): our parameter names to those of diffusers, applied in this order.
_RENAMES = [
    (r"^time([12])\.", r"time_embedding.linear_\1."),
    (r"^label\.", "class_embedding."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^mid\.block1\.", "mid_block.resnets.0."),
    (r"^mid\.block2\.", "mid_block.resnets.1."),
    (r"^mid\.attention\.", "mid_block.attentions.0."),
    (r"^down\.(\d+)\.resample\.", r"down_blocks.\1.downsamplers.0."),
    (r"^up\.(\d+)\.resample\.", r"up_blocks.\1.upsamplers.0."),
    (r"^(down|up)\.(\d+)\.blocks\.", r"\1_blocks.\2.resnets."),
    (r"^(down|up)\.(\d+)\.attentions\.", r"\1_blocks.\2.attentions."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj\.", r"\1.to_out.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."),
]
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(path: str | os.PathLike[str]) -> Parts:
    """Read the model of a pipeline directory, as float32, in evaluation mode, on the CPU.

    The file's weights may be float32, float16 or bfloat16, with diffusers' old or new names of attention layers. Raises
    `UsageError` if there is no such directory, and `DataError` if a file is missing, damaged, or describes a model that
    fastddpm cannot represent.
    """
    root = Path(path)
    preset = read_preset(root)
    with torch.device("meta"):
        unet = UNet(preset.unet)
    unet.load_state_dict(_read_weights(root, unet), assign=True)
    return Parts(unet.channels_last().eval(), Diffusion(preset.diffusion), preset)


def read_preset(path: str | os.PathLike[str]) -> Preset:
    """Return the configuration of the model in a pipeline directory. Raises as `load` does; reads no weights."""
    root = Path(path)
    if not root.is_dir():
        raise UsageError(f"no diffusers directory at {root}")
    _check_index(root)
    unet_file = _find(root, "unet", "config.json")
    scheduler_file = _find(root, "scheduler", "scheduler_config.json")
    unet_config = read_unet(read_json(unet_file), str(unet_file))
    diffusion_config = read_scheduler(read_json(scheduler_file), str(scheduler_file))
    if unet_config.learned_variance != diffusion_config.learned_variance:
        raise DataError(
            f"{unet_file} has {'twice' if unet_config.learned_variance else 'just'} the image's channels as output, "
            f"which does not go with variance_type {diffusion_config.variance} in {scheduler_file}"
        )
    preset = Preset(FOREIGN, unet_config, diffusion_config, TrainConfig(), SampleConfig())
    if (root / OUR_FILE).exists():
        ours = read_json(root / OUR_FILE)
        preset = from_dict(Preset, ours.get("preset") if isinstance(ours, dict) else None, str(root / OUR_FILE))
        check_agreement(preset, unet_config, diffusion_config, str(root / OUR_FILE))
    return preset


def save(model: Parts, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write `model` as a `DDPMPipeline` directory, atomically.

    Raises `UsageError` if diffusers cannot express the process (prediction xprev, schedules const and jsd, variance
    learned), or if `path` is not empty, unless it is a pipeline and `overwrite` is true. Raises `StorageError` if it
    cannot be written.
    """
    target = Path(path)
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
            _write_all(model, documents, directory)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error


def _write_all(model: Parts, documents: dict[str, Any], directory: Path) -> None:
    for name, document in documents.items():
        _write(directory / name, (json.dumps(document, indent=2) + "\n").encode())
    tensors = {
        their_name(name): tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.unet.state_dict().items()
    }
    _write(directory / CARD, model_card(_facts(model)).encode())
    _write(directory / "unet" / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _facts(model: Parts) -> Facts:
    scores = () if model.run is None else scores_of(model.run, checksum(model.unet))
    sigma_rel = None if model.average is None else model.average.sigma_rel
    return Facts(model.preset, parameters_of(model.preset), model.steps, model.data, scores, sigma_rel)


def their_name(name: str) -> str:
    """Return diffusers' name of one of our parameters."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_index(root: Path) -> None:
    index = root / "model_index.json"
    if not index.exists():
        return
    data = read_json(index)
    name = data.get("_class_name") if isinstance(data, dict) else None
    if name != "DDPMPipeline":
        raise DataError(f"{index}: _class_name must be DDPMPipeline; got {name!r}")
    for part, expected in (("unet", "UNet2DModel"), ("scheduler", "DDPMScheduler")):
        if not isinstance(data.get(part), list) or data[part][-1:] != [expected]:
            raise DataError(f"{index}: {part} must be {expected}; got {data.get(part)!r}")


def _find(root: Path, folder: str, name: str) -> Path:
    for path in (root / folder / name, root / name):
        if path.is_file():
            return path
    raise DataError(f"{root} lacks {folder}/{name} (or {name} in the directory itself)")


def _read_weights(root: Path, unet: UNet) -> dict[str, Tensor]:
    """Return float32 weights by our names, with the shapes of `unet` (a network on the meta device)."""
    for folder in (root / "unet", root):
        if (folder / WEIGHTS).is_file():
            path = folder / WEIGHTS
            break
    else:
        pickled = [p for p in (*root.glob("*.bin"), *root.glob("unet/*.bin"), *root.glob("*.ckpt")) if p.is_file()]
        if pickled:
            raise DataError(
                f"{pickled[0]} is a pickle, which can run code, and is not read; if you trust it, load it with "
                "diffusers and save it with save_pretrained(..., safe_serialization=True)"
            )
        raise DataError(f"{root} lacks unet/{WEIGHTS} (or {WEIGHTS} in the directory itself)")
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.state_dict().items()}
    with readable(path):
        data = read_bytes(path, most_bytes(sum(parameter.numel() for parameter in unet.state_dict().values())))
    theirs = {_new_attention_name(name): tensor for name, tensor in parse_tensors(data, path).items()}
    names = {name: their_name(name) for name in shapes}
    problems = [f"{theirs_name} is missing" for theirs_name in names.values() if theirs_name not in theirs]
    problems += [f"{name} belongs to no layer" for name in theirs if name not in set(names.values())]
    weights = {}
    for name, theirs_name in names.items():
        if theirs_name not in theirs:
            continue
        tensor = theirs[theirs_name]
        if tensor.ndim == 4 and len(shapes[name]) == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # old attention projections were 1x1 convolutions
        if tuple(tensor.shape) != shapes[name] or tensor.dtype not in _FLOATS:
            problems.append(f"{theirs_name} is {tensor.dtype} {tuple(tensor.shape)}, expected {shapes[name]}")
        weights[name] = tensor.to(torch.float32)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{path} does not fit its configuration: {'; '.join(problems[:5])}{more}")
    return weights


def most_bytes(parameters: int) -> int:
    """Return the bytes that are read of the weights of a network with so many parameters: twice those of float32."""
    return 8 * parameters + 2**20


def _new_attention_name(name: str) -> str:
    match = re.fullmatch(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else name


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    sync(path)
