"""The options of the reverse chain, as the commands take them: method, spacing, clipping, guidance."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import trained

import fastddpm
from fastddpm import sample
from fastddpm.sampling.images import to_uint8
from fastddpm.sampling.options import ChainOptions
from fastddpm.sampling.spacing import FEW, MANY, method_for


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run")


def test_the_method_that_suits_the_number_of_steps(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """auto: DPM-Solver++ for few steps, with noise from 8 on, Algorithm 2 for many; a spacing that is given stays."""
    model = fastddpm.load(run)
    for given, expected in {
        ("--steps", "4"): ("dpm2m", 4, "even"),
        ("--steps", "8"): ("dpm2m-sde", 8, "logsnr"),
        ("--steps", "8", "--spacing", "even"): ("dpm2m-sde", 8, "even"),
        ("--steps", "20"): ("dpm2m-sde", 20, "logsnr"),
    }.items():
        method, steps, spacing = expected
        sample.main([str(run), "--seeds", "0-1", "--method", "auto", *given, "--guidance", "1", "--out", str(tmp_path)])
        assert f"{method}, " in capsys.readouterr().err
        sampler = fastddpm.Sampler(model.unet, model.diffusion, steps, method, spacing=spacing)
        np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["images"], to_uint8(sampler.sample([0, 1])))
    chosen = {steps: method_for(steps)[0] for steps in (1, FEW - 1, FEW, MANY, MANY + 1, 1000)}
    assert list(chosen.values()) == ["dpm2m"] * 2 + ["dpm2m-sde"] * 2 + ["ancestral"] * 2
    assert method_for(10, multistep=False) == ("ancestral", "even")


def test_a_run_of_several_step_methods_is_completed_by_ancestral_steps(run: Path) -> None:
    """Inpainting cannot take the run's own method, and says so; the user's word is kept and refused later."""
    model = fastddpm.load(run)
    own = dataclasses.replace(model.preset.sample, method="dpm2m-sde", spacing="logsnr", steps=4)
    model = dataclasses.replace(model, preset=dataclasses.replace(model.preset, sample=own))
    notes: list[str] = []
    assert ChainOptions().sampler(model, notes.append, multistep=False).method == "ancestral"
    assert notes == ["note: the run's method dpm2m-sde does not go with this; it is ancestral here (--method)"]
    for options in (ChainOptions(method="dpm2m", steps=2), ChainOptions(method="ddim")):
        assert options.sampler(model, notes.append, multistep=False).method == options.method
    assert ChainOptions().sampler(model).method == "dpm2m-sde"


def test_predictions_are_clipped_or_not(run: Path, tmp_path: Path) -> None:
    model = fastddpm.load(run)
    images = {}
    for clip in ("on", "off"):
        options = ["--seeds", "0-1", "--steps", "3", "--clip-x0", clip, "--guidance", "1", "--out", str(tmp_path)]
        sample.main([str(run), *options])
        images[clip] = np.load(tmp_path / "samples.npz")["images"]
        diffusion = fastddpm.Diffusion(dataclasses.replace(model.diffusion.config, clip_x0=clip == "on"))
        expected = fastddpm.Sampler(model.unet, diffusion, 3).sample([0, 1])
        np.testing.assert_array_equal(images[clip], to_uint8(expected))
    assert (images["on"] != images["off"]).any()


def test_guidance_options_without_effect_are_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--guidance", "1", "--guidance-interval", "0", "10", "--guidance-rescale", "0.5"]
    sample.main([str(run), "--seeds", "0", "--steps", "2", *options, "--out", str(tmp_path)])
    expected = "note: --guidance-interval and --guidance-rescale without effect, because guidance 1 means none"
    assert expected in capsys.readouterr().err


def test_dpm_solver_and_spacing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's images are the sampler's, of as many steps as there are different timesteps."""
    options = ["--method", "dpm2m-sde", "--steps", "12", "--spacing", "logsnr", "--guidance", "1"]
    sample.main([str(run), "--seeds", "0-1", *options, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert re.search(
        "note: spacing logsnr gives [0-9]+ different timesteps for 12 steps; the chain takes these\n", said
    )
    model = fastddpm.load(run)
    with pytest.warns(UserWarning, match="spacing logsnr"):
        sampler = fastddpm.Sampler(model.unet, model.diffusion, 12, "dpm2m-sde", spacing="logsnr")
    assert f"dpm2m-sde, {sampler.steps} steps" in said and sampler.steps < 12
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["images"], to_uint8(sampler.sample([0, 1])))
