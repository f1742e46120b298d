"""Quality against evaluations: what a row says, and the picture."""

import json
from pathlib import Path

import few_steps
import numpy as np
import pytest
import torch
from digits import Scorer
from helpers.networks import SMALL, random_model

import fastddpm


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(16, seeds=(0,), epochs=1)


@pytest.mark.slow
def test_a_row_is_the_score_of_the_samplers_images(scorer: Scorer) -> None:
    """Two noise keys, whose images are scored one by one here."""
    from digits import score

    model = fastddpm.load("digits")
    guidance = model.preset.sample.guidance
    (row,) = few_steps.measure(model, few_steps.of_digits(scorer, 20), "dpm2m:logsnr", 4, 20, 2, guidance=guidance)
    assert (row["steps"], row["evaluations"]) == (4, 4) and row["seconds"] > 0
    labels, found = [seed % 10 for seed in range(20)], []
    for key in range(2):
        sampler = fastddpm.Sampler(
            model.unet, model.diffusion, 4, "dpm2m", spacing="logsnr", guidance=guidance, seed=key
        )
        levels = ((sampler.sample(range(20), labels) + 1) * 127.5).round().to(torch.uint8).numpy()
        found.append(score(levels, np.array(labels), scorer)["sets"]["samples"]["classifier_frechet_distance"])
    assert row["classifier_frechet_distance"] == pytest.approx(np.mean(found), rel=1e-6)
    assert row["classifier_frechet_distance_sd"] == pytest.approx(np.std(found, ddof=1), rel=1e-6)


@pytest.mark.slow
def test_the_command_writes_rows_and_a_picture(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(few_steps, "Scorer", lambda size: scorer)
    out, picture = tmp_path / "few.json", tmp_path / "few.png"
    arguments = [
        "--chains",
        "ancestral:even",
        "dpm2m:logsnr",
        "--steps",
        "2",
        "3",
        "--images",
        "20",
        "--reference",
        "3",
        "--rounds",
        "1",
        "--out",
        str(out),
        "--plot",
        str(picture),
    ]
    assert few_steps.main(arguments) == 0
    document = json.loads(out.read_text())
    assert [(row["method"], row["evaluations"]) for row in document["rows"]] == [
        ("ancestral", 2), ("ancestral", 3), ("dpm2m", 2), ("dpm2m", 3),
    ]  # fmt: skip
    assert [row["distance"] > 0.01 for row in document["rows"]] == [True] * 4
    assert document["rows"][0]["recall_sd"] is None and picture.read_bytes().startswith(b"\x89PNG")


def test_distance_is_from_the_solution_of_the_same_guidance_and_clipping(scorer: Scorer) -> None:
    """Even steps of dpm2m, as many as the reference's, are the reference."""
    model = fastddpm.load("digits")
    judge = few_steps.of_digits(scorer, 4)
    for clip in (True, False):
        references = few_steps.solutions(model, 3, 4, 1, 1.5, clip)
        (row,) = few_steps.measure(model, judge, "dpm2m:even", 3, 4, 1, guidance=1.5, clip=clip, references=references)
        (other,) = few_steps.measure(
            model, judge, "dpm2m:even", 3, 4, 1, guidance=2.0, clip=clip, references=references
        )
        assert row["distance"] == 0 < other["distance"]


@pytest.mark.usefixtures("bf16_instructions")
def test_precisions_draw_the_same_seeds_and_are_set_beside_the_first(scorer: Scorer) -> None:
    judge = few_steps.of_digits(scorer, 12)
    arguments = (fastddpm.load("digits"), judge, "ddim:even", 3, 12, 2)
    fp32, bf16, again = few_steps.measure(*arguments, guidance=2.0, precisions=("fp32", "bf16", "fp32"))
    assert [row["precision"] for row in (fp32, bf16, again)] == ["fp32", "bf16", "fp32"] and "beside" not in fp32
    assert 1e-4 < bf16["beside"]["images"] < 0.05 and again["beside"]["images"] == 0
    for name in judge.names:
        found = bf16["beside"][name]
        assert found["difference"] == pytest.approx(bf16[name] - fp32[name]) and found["first_sd"] == fp32[f"{name}_sd"]
        assert again["beside"][name]["difference"] == again["beside"][name]["difference_sd"] == 0
    assert "beside the first precision" in few_steps._line(bf16, judge.names)
    assert few_steps.line_of(bf16) == ("ddim", "even", "bf16")


@pytest.mark.parametrize("method", ["ancestral", "ddim", "dpm2m", "dpm2m-sde"])
def test_the_peers_take_the_same_timesteps(method: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import few_steps_peers

    model = random_model(SMALL)
    model.save_pretrained(tmp_path / "pipeline")
    theirs = few_steps_peers.scheduler(method, tmp_path / "pipeline" / "scheduler")
    theirs.set_timesteps(7)
    ours = fastddpm.Sampler(model.unet, model.diffusion, 7, method, spacing=few_steps_peers.SPACINGS[method])
    assert theirs.timesteps.tolist() == ours.timesteps.tolist()


@pytest.mark.slow
def test_the_peers_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import few_steps_peers

    out = tmp_path / "peers.json"
    arguments = ["--steps", "1", "2", "--methods", "dpm2m", "--batch", "1", "--rounds", "1", "--out", str(out)]
    assert few_steps_peers.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["steps"] for row in rows] == [1, 2] and all(row["seconds"].keys() > {"fastddpm"} for row in rows)
