"""Other implementations' checkpoints for `fuzz.py` to damage, and the commands that convert them.

The pickles are read in the process that makes the try, which is confined as their own child would be: to import torch
anew takes longer than a try may.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Line = tuple[str, ...]
_WIDTH = 32  # the least that has 32 groups


def _convert(source: str, *options: str) -> Line:
    return ("convert", source, "out.safetensors", *options)


_TF = (_convert("tf"), ("sample", "tf/model.ckpt-1", "--seeds", "0", "--steps", "2", "--out", "drawn"))
_GIVEN = _convert("guided.pt", "--like", "guided-diffusion", "--config", "given.json")
_SHARDS = (("sample", "shards", "--seeds", "0", "--steps", "2", "--out", "drawn"), _convert("shards"))
# What a case is called, the pattern of its files, and the commands that read them.
FILES: tuple[tuple[str, str, tuple[Line, ...]], ...] = (
    ("foreign: TensorFlow, index", "tf/*.index", _TF),
    ("foreign: TensorFlow, data", "tf/*.data-*", _TF),
    ("foreign: TensorFlow, kwargs.json", "tf/kwargs.json", _TF),
    ("foreign: pesser, older pickle", "pesser.ckpt", (_convert("pesser.ckpt"),)),
    ("foreign: tqch", "tqch.pt", (_convert("tqch.pt"), _convert("tqch.pt", "--weights", "raw"))),
    ("foreign: w86763777", "w86763777.pt", (_convert("w86763777.pt"),)),
    ("foreign: guided-diffusion", "guided.pt", (_GIVEN,)),
    ("foreign: --config", "given.json", (_GIVEN,)),
    ("foreign: state dict as safetensors", "pesser.safetensors", (_convert("pesser.safetensors"),)),
    ("diffusers: index of shards", "shards/*.index.json", _SHARDS),
    ("diffusers: shards", "shards/*.safetensors", _SHARDS),
    ("diffusers: pickled weights", "pickled/*.bin", (_convert("pickled"),)),
    ("converted model", "converted.safetensors", (
        ("sample", "converted.safetensors", "--seeds", "0", "--steps", "2", "--out", "drawn"),
    )),
)  # fmt: skip


def _files() -> ModuleType:
    """The tests' writers of these checkpoints."""
    path = Path(__file__).parents[1] / "tests" / "helpers" / "foreign_files.py"
    spec = importlib.util.spec_from_file_location("foreign_files", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_foreign() -> None:
    """Write a checkpoint of each kind in the current directory, with random weights."""
    import safetensors.torch

    from fastddpm.config import DiffusionConfig, Preset, UNetConfig
    from fastddpm.diffusion import Diffusion
    from fastddpm.pretrained import Model
    from fastddpm.pretrained.diffusers import WEIGHTS
    from fastddpm.unet import UNet

    files = _files()
    torch.manual_seed(0)
    config = UNetConfig(image_size=16, width=_WIDTH, multipliers=(1,), blocks=1, dropout=0.0)
    weights = UNet(config).state_dict()
    Path("tf").mkdir()
    tensors = files.theirs("hojonathanho", config, weights)
    files.write_bundle(Path("tf/model.ckpt-1"), {f"model/{name}": t.numpy() for name, t in tensors.items()}, shards=2)
    Path("tf/kwargs.json").write_text(json.dumps({"num_diffusion_timesteps": 20, "model_var_type": "fixedlarge"}))
    for name in ("pesser", "tqch", "w86763777"):
        tensors = files.theirs(name, config, weights)
        end, zipped = (".ckpt", False) if name == "pesser" else (".pt", True)
        torch.save(files.container(name, tensors, tensors), name + end, _use_new_zipfile_serialization=zipped)
        if name == "pesser":
            safetensors.torch.save_file(tensors, "pesser.safetensors")
    torch.save(files.theirs("guided-diffusion", config, weights), "guided.pt")
    Path("given.json").write_text(
        json.dumps({"image_size": 16, "heads": 1, "timesteps": 20, "new_attention_order": True})
    )
    preset = Preset("fuzz", config, DiffusionConfig(timesteps=20))
    unet = UNet(config)
    unet.load_state_dict(weights)
    Model(unet, Diffusion(preset.diffusion), preset).save_pretrained("pipeline")
    stored = safetensors.torch.load_file(f"pipeline/unet/{WEIGHTS}")
    _shard(stored, Path("shards"))
    Path("pickled").mkdir()
    torch.save(stored, "pickled/diffusion_pytorch_model.bin")
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        for folder in ("shards", "pickled"):
            (Path(folder) / Path(name).name).write_bytes((Path("pipeline") / name).read_bytes())
    from fastddpm.convert import main

    main(["tf", "converted.safetensors"])


def _shard(tensors: Mapping[str, Tensor], folder: Path) -> None:
    import safetensors.torch

    folder.mkdir()
    places = {}
    for i in range(2):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        some = {name: tensors[name] for name in list(tensors)[i::2]}
        safetensors.torch.save_file(some, folder / file)
        places |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def unpickle_here() -> None:
    """Let pickles be read in this process, with the child's checks and the parent's words."""
    from fastddpm.errors import DataError
    from fastddpm.pretrained.foreign import unpickle, unpickle_child
    from fastddpm.storage.reading import check_size, open_regular, readable

    def read(source: Path) -> unpickle.Unpickled:
        with readable(source), open_regular(source) as file:
            check_size(file, unpickle._MOST_BYTES)
        try:
            return unpickle.Unpickled(*unpickle_child.collect(unpickle_child.unpickled(str(source))))
        except Exception as error:
            problem = unpickle._explained(f"{type(error).__name__}: {error}")
            raise DataError(f"{source} cannot be read: {problem}") from error

    unpickle.read = read
