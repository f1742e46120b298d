"""Files that do not fit: one line that names the tensor and what is expected, before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.foreign_files import CONFIG, container, theirs
from helpers.networks import random_model
from torch import Tensor

import fastddpm
from fastddpm import convert
from fastddpm.config import UNetConfig
from fastddpm.errors import DataError, FastddpmError, UsageError
from fastddpm.pretrained.foreign import catalogue, unpickle, unpickle_child


@pytest.fixture(autouse=True)
def unpickled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_foreign.py."""
    monkeypatch.setattr(
        unpickle, "read", lambda path: unpickle.Unpickled(*unpickle_child.collect(unpickle_child.unpickled(str(path))))
    )


@pytest.fixture(scope="module")
def pesser() -> dict[str, Tensor]:
    model = random_model(UNetConfig(**CONFIG))
    return theirs("pesser", model.preset.unet, model.unet.state_dict())


def refused(directory: Path, tensors: Any, *options: str, config: dict[str, Any] | None = None) -> str:
    """The message with which the command refuses a file of `tensors`; nothing was written."""
    torch.save(tensors, directory / "model.pt")
    (directory / "config.json").write_text(json.dumps({"groups": 8, "image_size": 16} if config is None else config))
    out = directory / "out" / "model.safetensors"
    with pytest.raises(FastddpmError) as error:
        convert.main([str(directory / "model.pt"), str(out), "--config", str(directory / "config.json"), *options])
    assert not out.exists() and not list((directory / "out").glob("*") if (directory / "out").exists() else [])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_out.weight"), "conv_out.weight is missing"),
        (lambda t: t.pop("mid.attn_1.q.bias"), "mid.attn_1.q.bias is missing"),
        (lambda t: t.update(stranger=torch.zeros(1)), "stranger belongs to no layer"),
        (
            lambda t: t.update({"mid.block_1.conv1.weight": torch.zeros(32, 32, 1, 1)}),
            "mid.block_1.conv1.weight is of shape (32, 32, 1, 1), expected (32, 32, 3, 3)",
        ),
        (
            lambda t: t.update({"down.1.attn.0.q.weight": torch.zeros(32, 32)}),
            "down.1.attn.0.q.weight is of shape (32, 32), expected (32, 32, 1, 1)",
        ),
        (lambda t: t["norm_out.bias"].fill_(float("nan")), "norm_out.bias has numbers that are not finite"),
        (
            lambda t: t.update({"norm_out.bias": torch.full((16,), 1e300, dtype=torch.float64)}),
            "norm_out.bias has numbers that are not finite in float32",
        ),
        (
            lambda t: t.update({"norm_out.bias": torch.zeros(16, dtype=torch.int64)}),
            "norm_out.bias is int64, expected floating numbers",
        ),
        (lambda t: t.pop("conv_in.bias"), "conv_in.bias is missing"),
        (lambda t: t.update({"conv_in.weight": torch.zeros(16)}), "conv_in.weight is of shape (16,)"),
        (
            lambda t: t.update({"down.99.block.0.conv1.weight": torch.zeros(1)}),
            "tell of 100 levels with 1 residual blocks each; expected 1 to 12 levels",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    pesser: dict[str, Tensor], change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    tensors = {name: tensor.clone() for name, tensor in pesser.items()}
    change(tensors)
    assert message in refused(tmp_path, tensors)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        (["--like", "tqch"], None, "it lacks embed.0.weight; its tensors are named as pesser's"),
        (["--like", "openai/64x64_diffusion"], None, "checkpoint of guided-diffusion: it lacks time_embed.0"),
        (["--like", "openai/64x64_difusion"], None, "no 'openai/64x64_difusion'; it knows openai/64x64_diff"),
        (["--like", "openai/64x64_classifier"], None, "cannot be converted: it is a classifier"),
        (["--like", "openai/64_256_upsampler"], None, "cannot be converted: it is an upsampling model"),
        (["--like", "lucidrains"], None, "lucidrains cannot be converted: denoising-diffusion-pyt"),
        (["--like", "diffusers"], None, "is no directory of diffusers"),
        (["--like", "pesser/cifar10"], {}, "as pesser/cifar10: the tensors do not fit the network: down.0.block.1"),
        (["--weights", "average"], None, "does not tell whether it is averaged or raw"),
        ([], {}, "groups must divide each level's channels; 32 does not divide 16; fields that a file does not tell"),
        ([], {"groups": 4, "heads": 0}, "heads must be positive"),
        ([], {"image_size": [16, 16, 16]}, "image_size"),
        ([], {"image_size": "big"}, "image_size must be an integer"),
        ([], {"colour": 1}, "--config has 'colour', which is no field of UNetConfig"),
        ([], {"groups": 8, "image_size": 16, "schedule": "steep"}, "schedule must be one of linear"),
        ([], {"groups": 8, "image_size": 16, "timesteps": 0}, "timesteps must be in 2"),
    ],
)  # fmt: skip
def test_names_and_fields_that_do_not_fit_are_refused(
    pesser: dict[str, Tensor], options: list[str], config: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    assert message in refused(tmp_path, pesser, *options, config=config)


def test_openais_two_formats_must_be_told_apart_and_need_their_heads(tmp_path: Path) -> None:
    config = UNetConfig(**CONFIG, norm_eps=1e-5, downsample_padding=1, freq_shift=0)
    tensors = theirs("improved-diffusion", config, random_model(config).unet.state_dict())
    assert "may be of improved-diffusion or guided-diffusion" in refused(tmp_path, tensors)
    like = ("--like", "improved-diffusion")
    message = refused(tmp_path, tensors, *like, config={"groups": 8})
    assert "does not tell image_size (" in message and "heads or head_channels (" in message
    assert "rescale_timesteps must be bool; got 1" in refused(
        tmp_path, tensors, *like, config={"groups": 8, "image_size": 16, "heads": 1, "rescale_timesteps": 1}
    )
    wide = {name: tensor.clone() for name, tensor in tensors.items()}
    wide["input_blocks.0.0.weight"] = torch.zeros(16, 6, 3, 3)
    wide["out.2.weight"], wide["out.2.bias"] = torch.zeros(6, 16, 3, 3), torch.zeros(6)
    given = {"groups": 8, "image_size": 16, "heads": 1}
    assert "an upsampling model" in refused(tmp_path, wide, *like, config=given)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"step": 1, "model": {"model.init_conv.weight": torch.zeros(1)}}, "is of lucidrains and cannot be converted"),
        ({"ema": {"ema_model.model.init_conv.weight": torch.zeros(1)}}, "give the network to fastddpm.Sampler"),
        ({"model.enc.32x32_conv.weight": torch.zeros(1)}, "is of EDM and cannot be converted"),
        ({"state_dict": {"model.diffusion_model.out.weight": torch.zeros(1)}}, "it is a latent diffusion model"),
        ({"weight": torch.zeros(1)}, "its tensors (weight, ..) are named as in none of hojonathanho, pesser, tqch"),
        ({}, "its tensors (none, ..) are named as in none of"),
    ],
)
def test_networks_of_other_kinds_are_refused_by_name(tensors: Any, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, tensors)


def test_edms_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "edm.pkl").write_bytes(b"\x80\x04whatever")
    with pytest.raises(DataError, match=r"is a \.pkl file and not read: EDM has .*: python generate\.py"):
        convert.main([str(tmp_path / "edm.pkl"), str(tmp_path / "o.safetensors")])


def test_weights_that_a_file_lacks_are_not_replaced_by_others(pesser: dict[str, Tensor], tmp_path: Path) -> None:
    config = UNetConfig(**CONFIG)
    tensors = theirs("tqch", config, random_model(config).unet.state_dict())
    file = container("tqch", tensors, tensors)
    del file["ema"]
    assert "has no average weights, only raw ones" in refused(tmp_path, file, "--weights", "average")


def test_the_command_says_all_mistakes_before_it_reads(tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(UsageError) as error:
        convert.main(["nothing.pt", str(tmp_path / "out.pt"), "--config", str(tmp_path / "no.json")])
    assert "name a .safetensors file to write" in str(error.value) and "there is no file" in str(error.value)
    with pytest.raises(UsageError, match="exists; name another file, or remove it"):
        convert.main(["nothing.pt", str(tmp_path / "there.safetensors")])
    with pytest.raises(UsageError, match=r"there is no file or TensorFlow checkpoint nothing\.pt"):
        convert.main(["nothing.pt", str(tmp_path / "out.safetensors")])


def test_pickles_are_not_loaded_but_their_reader_is_named(pesser: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(pesser, tmp_path / "model.ckpt")
    with pytest.raises(FastddpmError, match=r"python -m fastddpm\.convert"):
        fastddpm.load(tmp_path / "model.ckpt")
    safetensors.torch.save_file({name: t.contiguous() for name, t in pesser.items()}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"holds no model of fastddpm.*python -m fastddpm\.convert"):
        fastddpm.load(tmp_path / "model.safetensors")


def test_every_published_name_is_known_to_like() -> None:
    for each in catalogue.FORMATS.values():
        for name in each.published:
            assert catalogue.named(name) == (each, each.published[name])
        for name in each.refused:
            with pytest.raises(UsageError, match="cannot be converted"):
                catalogue.named(name)
