"""Runs that begin with another model's weights (--init): the first loss, what may differ, what is recorded."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.networks import SMALL, random_model, tiny
from helpers.runs import trained
from helpers.training import CPU, noise_images, tiny_preset
from torch import Tensor

import fastddpm
from fastddpm import pretrained, train
from fastddpm.config import DiffusionConfig, Preset, UNetConfig
from fastddpm.diffusion import Diffusion, draw_examples
from fastddpm.errors import UsageError
from fastddpm.ops.noise import NoiseKey
from fastddpm.pretrained import compact
from fastddpm.pretrained.model import Model
from fastddpm.runtime.network import checksum
from fastddpm.storage import checkpoint
from fastddpm.training import initial
from fastddpm.training.initial import Origin, attention_levels, fitted
from fastddpm.training.length import too_short
from fastddpm.training.trainer import Trainer

ARGUMENTS = ("--steps", "4", "--batch", "2", "--sample.count", "0", "--decay", "none", "--device", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "first")


def tensors(run: Path) -> dict[str, Tensor]:
    return {f"{part}.{name}": t for part, of in checkpoint.load(run).tensors.items() for name, t in of.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 50
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def begun(model: Model, monkeypatch: pytest.MonkeyPatch, **unet: Any) -> tuple[fastddpm.UNet, list[str]]:
    """The network of a run that begins with `model` and differs in fields of its network, and what is said."""
    monkeypatch.setattr(pretrained, "load", lambda source: model)
    wanted = fitted(dataclasses.replace(model.preset.unet, **unet), model.preset.unet)
    lines: list[str] = []
    network, origin = initial.begin("MODEL", Preset("x", wanted, model.preset.diffusion), lines.append)
    assert network is not None and origin == Origin("MODEL", checksum(model.unet), model.steps)
    return network.eval(), [line for line in lines if "reading" not in line]


def test_the_first_loss_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model in float64, on x_t and targets from NumPy."""
    preset = dataclasses.replace(tiny_preset(), diffusion=DiffusionConfig(timesteps=50, beta_end=0.2))
    model = random_model(dataclasses.replace(preset.unet, dropout=0.0), preset.diffusion)
    network, _ = begun(model, monkeypatch)
    trainer = Trainer(dataclasses.replace(preset, unet=network.config), noise_images(), CPU, network=network)
    images, labels = trainer.batches.at(0)
    key = NoiseKey.of(preset.train.seed, 0, range(8))
    draws = draw_examples(key, 50, preset.unet.label_dropout)
    x0 = np.where(oracle.column(draws.flip.numpy()), images.numpy()[..., ::-1], images.numpy()) / 127.5 - 1
    process = oracle.Process.respaced(beta=oracle.betas("linear", 50, end=0.2))
    _, eps = Diffusion(preset.diffusion).q_sample(images, draws.t, key)
    x_t = process.forward(draws.t.numpy(), x0, eps.double().numpy())
    label = torch.where(draws.drop_label, 3, labels)
    with torch.no_grad():
        out = model.unet.double()(torch.from_numpy(x_t), draws.t, label).numpy()
    loss, _, applied = trainer.train_step()
    assert bool(applied) and loss.item() == pytest.approx(((out - eps.numpy()) ** 2).mean(), rel=1e-5)


def test_averages_begin_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = tiny_preset(ema=(0.9, 0.5))
    model = random_model(preset.unet, preset.diffusion)
    expected = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    network, _ = begun(model, monkeypatch)
    trainer = Trainer(preset, noise_images(), CPU, network=network)
    for decay in (0.9, 0.5):
        assert all(torch.equal(t, expected[name]) for name, t in trainer.optimizer.averaged(decay).items())
    moments = {name: t for name, t in trainer.optimizer.state_dict().items() if not name.startswith("weight.")}
    assert all(not t.any() for t in moments.values())


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(run: Path, tmp_path: Path) -> None:
    model, whole, parts = fastddpm.load(run), tmp_path / "whole", tmp_path / "parts"
    train.main(["--init", str(run), "--out", str(whole), *ARGUMENTS])
    train.main(["--init", str(run), "--out", str(parts), *ARGUMENTS, "--steps", "2"])
    train.main(["--resume", "--init", str(run), "--out", str(parts), "--steps", "4"])
    assert_equal(tensors(whole), tensors(parts))
    for path, starts in ((whole, 1), (parts, 2)):
        sessions = json.loads((path / "environment.json").read_text())["sessions"]
        origin = {"source": str(run), "sha256": checksum(model.unet), "steps": 1}
        assert [session["origin"] for session in sessions] == [origin] * starts
        assert json.loads((path / "options.json").read_text())["init"] == str(run)
        assert checkpoint.load(path).documents["origin"] == origin
        assert fastddpm.load(path).steps is None and fastddpm.load(path).preset.name == "mnist"
    # A run that died before its first checkpoint begins with the same weights again.
    shutil.rmtree(parts / "checkpoints")
    train.main(["--resume", "--out", str(parts)])
    assert_equal(tensors(whole), tensors(parts))


def test_a_resumed_run_keeps_what_it_began_with(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"began with random weights, not with digits, and a resumed run goes on with"):
        train.main(["--resume", "--init", "digits", "--out", str(run)])


@pytest.mark.parametrize("kind", ["run", "checkpoint", "diffusers", "file"])
def test_the_configuration_is_that_of_the_model(run: Path, tmp_path: Path, kind: str) -> None:
    sources = {"run": run, "checkpoint": next((run / "checkpoints").glob("step-*"))}
    sources |= {"diffusers": tmp_path / "pipeline", "file": tmp_path / "model.safetensors"}
    fastddpm.load(run).save_pretrained(sources["diffusers"])
    compact.pack(run, sources["file"])
    expected = fastddpm.load(run).preset
    model = initial.preset_of_model(str(sources[kind]))
    assert model is not None
    for chosen, base in ((False, fastddpm.preset("mnist")), (True, fastddpm.preset("cifar10"))):
        found = initial.starting_preset(model, base, chosen=chosen)
        assert (found.unet, found.diffusion) == (expected.unet, expected.diffusion)
        assert (found.train, found.name) == ((base.train, "cifar10") if chosen else (expected.train, "mnist"))
    without_classes = random_model(SMALL)
    without_classes.save_pretrained(tmp_path / "plain")
    plain = initial.preset_of_model(str(tmp_path / "plain"))
    assert plain is not None
    found = initial.starting_preset(plain, fastddpm.preset("mnist"), chosen=True)
    assert found.sample.guidance == 1 and found.sample.steps == 150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "16"], "do not fit: width is 8 in the model and 16 here. Leave these options out, or --init"),
        (["--image-channels", "3", "--groups", "2"], "image_channels is 1 in .* and 3 here; groups is 4 in the model"),
        (["--variance", "learned", "--loss", "hybrid"], "learned_variance is False in the model and True here"),
        (
            ["--attention-resolutions", "16"],
            "for images of 16 pixels .* have attention at no resolution, not at 16x16; leave",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train.main(["--init", str(run), "--out", str(tmp_path / "new"), *ARGUMENTS, *options])
    assert not (tmp_path / "new").exists()


LEVELS = UNetConfig(image_size=32, multipliers=(1, 2, 2, 2), attention_resolutions=(16, 8))


def test_attention_stays_at_its_levels() -> None:
    assert attention_levels(LEVELS) == [1, 2]
    for size, resolutions in ((64, (32, 16)), (16, (8, 4)), (32, (16, 8))):
        found = fitted(dataclasses.replace(LEVELS, image_size=size), LEVELS)
        assert found.attention_resolutions == resolutions and attention_levels(found) == [1, 2]
        types = [type(m).__name__ for m in fastddpm.UNet(dataclasses.replace(found, width=32)).modules()]
        assert types == [type(m).__name__ for m in fastddpm.UNet(dataclasses.replace(LEVELS, width=32)).modules()]
    given = dataclasses.replace(LEVELS, image_size=64, attention_resolutions=(32, 16))
    assert fitted(given, LEVELS) == given
    with pytest.raises(UsageError, match=r"for images of 64 pixels .* attention at 32x32, 16x16, not at 64x64; leave"):
        fitted(dataclasses.replace(given, attention_resolutions=(64,)), LEVELS)


def test_another_image_size_has_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny())
    network, lines = begun(model, monkeypatch, image_size=24)
    assert network.config.attention_resolutions == (12,) and network.image_shape == (3, 24, 24)
    assert all(torch.equal(t, model.unet.state_dict()[name]) for name, t in network.state_dict().items())
    assert lines[1] == "images of 24 pixels instead of 12; attention stays at the same levels, 12x12"
    assert network(torch.randn(2, 3, 24, 24), torch.tensor([3, 5])).shape == (2, 3, 24, 24)


CONDITIONAL = {"num_classes": 3, "label_dropout": 0.1}


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (CONDITIONAL, {"num_classes": 5}, "the table of 5 classes is new; the model has 3"),
        (CONDITIONAL, {"num_classes": 0, "label_dropout": 0.0}, "without classes, of which the model has 3"),
        ({}, CONDITIONAL, "the table of 3 classes is new; the model has 0"),
        (CONDITIONAL, {"label_dropout": 0.0}, 'the label "no label" is left out'),
        ({"num_classes": 3}, {"label_dropout": 0.2}, 'the label "no label" is new'),
    ],
)
def test_other_classes_begin_where_the_model_has_none(
    before: dict[str, Any], after: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new class draws what the model draws without a class; kept classes what they drew."""
    model = random_model(tiny(**before))
    network, lines = begun(model, monkeypatch, **after)
    assert line in lines[1]
    x_t, t = torch.randn(1, 3, 12, 12), torch.tensor([7])

    def outputs(unet: fastddpm.UNet) -> dict[int | None, Tensor]:
        rows = unet.num_classes + (unet.null_label is not None)
        with torch.no_grad():
            return {i: unet(x_t, t, torch.tensor([i])) for i in range(rows)} or {None: unet(x_t, t)}

    old, new = outputs(model.unet), outputs(network)
    assert len(new) == (network.num_classes + (network.null_label is not None) or 1)
    if "null" in line or "no label" in line:
        for i in range(3):
            torch.testing.assert_close(new[i], old[i], atol=1e-6, rtol=1e-6)
    else:
        neutral = old[3] if before else old[None]
        for out in new.values():
            torch.testing.assert_close(out, neutral, atol=1e-5, rtol=1e-5)
        assert not before or not torch.allclose(old[0], neutral, atol=1e-3)


def test_another_diffusion_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SMALL)
    monkeypatch.setattr(pretrained, "load", lambda source: model)
    lines: list[str] = []
    wanted = Preset("x", SMALL, dataclasses.replace(model.preset.diffusion, prediction="v", timesteps=100))
    initial.begin("MODEL", wanted, lines.append)
    assert lines[-1] == (
        "note: the weights were trained for another diffusion: timesteps: 1000 -> 100; prediction: eps -> v"
    )


def test_a_short_fine_tune_is_not_called_noise() -> None:
    config = fastddpm.preset("cifar10").train
    line = too_short(config, 50, Origin("MODEL", "0" * 64))
    assert line is not None and "99.5% of the average" in line and "are still those of MODEL" in line
    assert "too few to leave that model behind" in line and "random" not in line and "images" not in line
    untold: Callable[..., Any] = too_short
    assert "are still random initial weights" in untold(config, 50)
