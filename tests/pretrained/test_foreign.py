"""Checkpoints of other implementations: their networks' outputs, averaged and raw weights, configurations.

The references are those networks written again in helpers/foreign_networks.py, and where the team's files are at hand
the outputs of the implementations' own code.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import foreign_networks as networks
from helpers.foreign_files import CONFIG, container, theirs, write_bundle
from helpers.networks import random_model
from torch import Tensor

import fastddpm
from fastddpm import convert
from fastddpm.config import DiffusionConfig, UNetConfig
from fastddpm.pretrained import Model, foreign
from fastddpm.pretrained.foreign import read, unpickle, unpickle_child
from fastddpm.unet import UNet

ROOT = Path(__file__).parents[2]
ORACLES = ROOT.parent / "shared" / "data" / "foreign"
oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason="needs the team's files of other implementations' outputs")
_LATER = dict(norm_eps=1e-5, downsample_padding=1, freq_shift=0)


class _Guided(networks.OpenAI):
    heads, resblock = 2, True


class _GuidedNew(_Guided):
    by_head = False


class _Improved(networks.OpenAI):
    heads, scale = 4, 1000 / 4000


# Of each format: the network written again, our options beside those of CONFIG, and what --config has to give.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "hojonathanho": (networks.TensorFlow, {}, {}),
    "pesser": (networks.Paper, {}, {}),
    "tqch": (networks.Tqch, {}, {}),
    "w86763777": (networks.W86763777, _LATER, {}),
    "improved-diffusion": (
        _Improved,
        _LATER | dict(heads=4, scale_shift=True, learned_variance=True, time_scale=0.25),
        {"heads": 4, "timesteps": 4000, "schedule": "cosine"},
    ),
    "guided-diffusion": (
        _Guided,
        _LATER | dict(heads=2, scale_shift=True, resample="resblock", num_classes=5, learned_variance=True),
        {"heads": 2},
    ),
    "guided-diffusion, new order": (
        _GuidedNew,
        _LATER | dict(heads=2, resample="resblock", channels=(8, 16), width=16),
        {"heads": 2, "new_attention_order": True},
    ),
}


@pytest.fixture(autouse=True)
def unpickled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of torch.save are unpickled in this process, as restricted as in the child, which test_unpickle.py has."""
    monkeypatch.setattr(
        unpickle, "read", lambda path: unpickle.Unpickled(*unpickle_child.collect(unpickle_child.unpickled(str(path))))
    )


def exact(unet: UNet, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    with torch.no_grad(), fastddpm.ops.use_backend("reference"):
        return copy.deepcopy(unet).double()(x.double(), t, y)


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def model_of(case: str) -> Model:
    options = CONFIG | CASES[case][1]
    learned = options.get("learned_variance", False)
    return random_model(
        UNetConfig(**options),
        DiffusionConfig(variance="learned_range", loss="hybrid") if learned else DiffusionConfig(),
    )


def written(case: str, model: Model, directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint with the model's weights, averaged where the format tells, and these by their names."""
    name, weights = case.partition(",")[0], model.unet.state_dict()
    options = {key: value for key, value in CASES[case][2].items() if key in foreign.FORMATS[name].options}
    tensors = theirs(name, model.preset.unet, weights, **options)
    raw = {key: 2 * tensor for key, tensor in tensors.items()}
    if name == "hojonathanho":
        variables = {f"model/{key}": value.numpy() for key, value in raw.items()}
        variables |= {f"model/{key}/ExponentialMovingAverage": value.numpy() for key, value in tensors.items()}
        variables |= {f"model/{key}/Adam": value.numpy() for key, value in raw.items()}
        write_bundle(directory / "model.ckpt-9", variables | {"global_step": np.array(9)}, shards=2)
        return directory / "model.ckpt-9", tensors
    torch.save(container(name, tensors, raw), directory / "model.pt")
    return directory / "model.pt", tensors


def given_for(case: str) -> dict[str, Any]:
    # The helpers' networks attend at 8 pixels, and have 8 groups.
    return {"image_size": 16, "groups": 8} | CASES[case][2]


@pytest.mark.parametrize("case", CASES)
def test_networks_compute_what_theirs_do(case: str, tmp_path: Path) -> None:
    model = model_of(case)
    source, tensors = written(case, model, tmp_path)
    like = case.partition(",")[0]
    imported = read.read(source, like=like, given=given_for(case), unpickling=True)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 977])
    y = torch.tensor([1, 4]) if model.preset.unet.num_classes else None
    expected = CASES[case][0](tensors, 2, 1, (False, True))(x.double(), t, y)
    assert relative(exact(imported.parts.unet, x, t, y), expected) < 1e-7
    assert imported.parts.preset.unet == model.preset.unet and imported.format == like
    for name, tensor in model.unet.state_dict().items():  # there and back: the same bits
        assert torch.equal(imported.parts.unet.state_dict()[name], tensor), name


def test_every_row_of_the_table_of_formats_has_a_test() -> None:
    named = [line.split(" | ")[0].removeprefix("| ") for line in foreign.table.formats().splitlines()[2:]]
    assert named == ["diffusers", *dict.fromkeys(case.partition(",")[0] for case in CASES)]  # test_diffusers*.py


@pytest.mark.parametrize("table", ["formats", "published", "refused"])
def test_the_page_has_the_tables_of_the_code(table: str) -> None:
    assert getattr(foreign.table, table)() in (ROOT / "docs" / "import.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", ["hojonathanho", "tqch", "w86763777"])
def test_averaged_weights_are_told_from_raw_ones(case: str, tmp_path: Path) -> None:
    source, _ = written(case, model_of(case), tmp_path)
    read_as = {
        weights: read.read(source, given=given_for(case), weights=weights, unpickling=True)  # type: ignore[arg-type]
        for weights in (None, "average", "raw")
    }
    default, averaged, raw = (read_as[key].parts.unet.conv_in.weight for key in (None, "average", "raw"))
    assert torch.equal(default, averaged) and torch.equal(raw, 2 * averaged)
    assert "averaged" in read_as[None].lines[1] and "raw" in read_as["raw"].lines[1]
    assert read_as[None].parts.steps == (None if case == "tqch" else 9)


def test_a_file_with_one_set_says_so(tmp_path: Path) -> None:
    source, _ = written("pesser", model_of("pesser"), tmp_path)
    assert "does not tell" in read.read(source, given=given_for("pesser"), unpickling=True).lines[1]
    with pytest.raises(ValueError, match="does not tell whether it is averaged or raw"):
        read.read(source, given=given_for("pesser"), weights="raw", unpickling=True)


def test_tensorflow_checkpoints_are_loaded_with_the_configuration_beside_them(tmp_path: Path) -> None:
    model = random_model(UNetConfig(image_size=32, width=32, multipliers=(1, 1), blocks=1, dropout=0.2))
    tensors = theirs("hojonathanho", model.preset.unet, model.unet.state_dict())
    write_bundle(tmp_path / "model.ckpt-5", {f"model/{name}": tensor.numpy() for name, tensor in tensors.items()})
    kwargs = {
        "beta_start": 0.0001, "beta_end": 0.03, "beta_schedule": "quad", "num_diffusion_timesteps": 500,
        "model_mean_type": "xstart", "model_var_type": "fixedsmall", "loss_type": "kl", "dropout": 0.2, "lr": 1e-4,
    }  # fmt: skip
    (tmp_path / "kwargs.json").write_text(json.dumps(kwargs))
    for path in (tmp_path, tmp_path / "model.ckpt-5"):
        loaded = fastddpm.load(path)
        assert loaded.preset.unet == model.preset.unet  # 16 pixels where it attends, so 32 at full resolution
        assert all(
            torch.equal(tensor, loaded.unet.state_dict()[name]) for name, tensor in model.unet.state_dict().items()
        )
    expected = DiffusionConfig(
        timesteps=500, schedule="quad", beta_end=0.03, prediction="x0", variance="fixedsmall", loss="vlb"
    )
    assert loaded.diffusion.config == expected == fastddpm.pretrained.read_preset(tmp_path).diffusion


def test_a_converted_model_is_a_checkpoint_of_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("w86763777")
    source, _ = written("w86763777", model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"groups": 8, "variance": "fixedsmall"}))
    out = tmp_path / "out" / "model.safetensors"
    convert.main([str(source), str(out), "--config", str(tmp_path / "config.json")])
    printed = capsys.readouterr().out
    assert "format: w86763777" in printed and "weights: averaged" in printed and "image size 16" in printed
    loaded = fastddpm.load(out)
    assert loaded.steps == 9 and loaded.preset.unet == model.preset.unet and loaded.preset.name == "converted"
    assert loaded.diffusion.config == DiffusionConfig(variance="fixedsmall")
    assert all(torch.equal(tensor, loaded.unet.state_dict()[name]) for name, tensor in model.unet.state_dict().items())


# Parameters as their authors or users count them: the paper's appendix B, and the names of OpenAI's files.
@pytest.mark.parametrize(
    ("like", "millions"),
    [
        ("pesser/ema_cifar10", 35.7), ("pesser/lsun_church", 113.7), ("tqch/cifar10", 35.7),
        ("w86763777/cifar10", 35.7), ("tqch/celebahq", 113.7), ("openai/imagenet64_uncond_100M_1500K", 120),
        ("openai/cifar10_uncond_50M_500K", 52.5),
        ("openai/imagenet64_cond_270M_250K", 270), ("openai/lsun_uncond_100M_1200K_bs128", 113.7),
        ("openai/64x64_diffusion", 296), ("openai/128x128_diffusion", 422), ("openai/256x256_diffusion", 554),
        ("openai/256x256_diffusion_uncond", 552.8), ("openai/512x512_diffusion", 559), ("openai/lsun_cat", 552.8),
    ],
)  # fmt: skip
def test_published_configurations_have_the_parameters_of_their_files(like: str, millions: float) -> None:
    """Written with a published file's names and shapes, without memory, and read by its name."""
    checkpoint, published = foreign.catalogue.named(like)
    assert checkpoint is not None and published is not None
    fields = dict(checkpoint.family({}).fixed) | {
        "dropout": 0.0, "learned_variance": published.diffusion.get("variance") == "learned_range",
        "scale_shift": like.startswith("openai") and "lsun_uncond" not in like,
    } | dict(published.unet)  # fmt: skip
    unet = fastddpm.unet.meta_network(UNetConfig(**fields))
    assert abs(sum(p.numel() for p in unet.parameters()) / 1e6 - millions) < 0.02 * millions


@oracles
@pytest.mark.parametrize("name", ["pesser", "tqch", "w86763777", "improved_diffusion", "guided_diffusion"])
def test_outputs_equal_those_of_the_implementations_own_code(name: str, tmp_path: Path) -> None:
    with np.load(ORACLES / f"{name}.npz") as arrays:
        oracle = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    tensors = {key[7:]: value for key, value in oracle.items() if key.startswith("weight:")}
    torch.save(container(name, tensors, tensors), tmp_path / "model.pt")
    given = {
        "improved_diffusion": {"heads": 4, "rescale_timesteps": False}, "guided_diffusion": {"head_channels": 16}
    }.get(name, {})  # fmt: skip
    like = name.replace("_", "-")
    parts = read.read(tmp_path / "model.pt", like=like, given={"image_size": 16} | given, unpickling=True).parts
    assert relative(exact(parts.unet, oracle["x"], oracle["t"], oracle.get("y")), oracle["output"]) < 1e-7


@oracles
def test_outputs_equal_those_of_the_papers_own_code() -> None:
    with np.load(ORACLES / "tf_ckpt" / "oracle.npz") as arrays:
        x, t, raw, averaged = (torch.from_numpy(arrays[key]) for key in ("x", "t", "output", "output_ema"))
    for weights, expected in (("average", averaged), ("raw", raw)):
        given = {"image_size": 16, "groups": 4}
        parts = read.read(ORACLES / "tf_ckpt", given=given, weights=weights).parts  # type: ignore[arg-type]
        assert relative(exact(parts.unet, x.permute(0, 3, 1, 2), t, None), expected.permute(0, 3, 1, 2)) < 1e-7
        assert parts.steps == 790_000 and parts.diffusion.config == DiffusionConfig()
