"""Quality against evaluations: what a row says, and the picture."""

import json
from pathlib import Path

import few_steps
import numpy as np
import pytest
import torch
from digits import Scorer

import fastddpm


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(16, seeds=(0,), epochs=1)


@pytest.mark.slow
def test_a_row_is_the_score_of_the_samplers_images(scorer: Scorer) -> None:
    """Two noise keys, whose images are scored one by one here."""
    from digits import score

    model = fastddpm.load("digits")
    row = few_steps.measure(model, scorer, "dpm2m", "logsnr", 4, 20, 2)
    assert (row["steps"], row["evaluations"]) == (4, 4) and row["seconds"] > 0
    labels, found = [seed % 10 for seed in range(20)], []
    for key in range(2):
        sampler = fastddpm.Sampler(
            model.unet, model.diffusion, 4, "dpm2m", spacing="logsnr", guidance=model.preset.sample.guidance, seed=key
        )
        levels = ((sampler.sample(range(20), labels) + 1) * 127.5).round().to(torch.uint8).numpy()
        found.append(score(levels, np.array(labels), scorer)["sets"]["samples"]["classifier_frechet_distance"])
    assert row["classifier_frechet_distance"] == pytest.approx(np.mean(found), rel=1e-6)
    assert row["classifier_frechet_distance_sd"] == pytest.approx(np.std(found, ddof=1), rel=1e-6)


def test_the_command_writes_rows_and_a_picture(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(few_steps, "Scorer", lambda size: scorer)
    monkeypatch.setattr(few_steps, "CHAINS", [("ancestral", "even"), ("dpm2m", "logsnr")])
    out, picture = tmp_path / "few.json", tmp_path / "few.png"
    arguments = ["--steps", "2", "3", "--images", "20", "--rounds", "1", "--out", str(out), "--plot", str(picture)]
    assert few_steps.main(arguments) == 0
    document = json.loads(out.read_text())
    assert [(row["method"], row["evaluations"]) for row in document["rows"]] == [
        ("ancestral", 2), ("ancestral", 3), ("dpm2m", 2), ("dpm2m", 3),
    ]  # fmt: skip
    assert document["rows"][0]["recall_sd"] is None and picture.read_bytes().startswith(b"\x89PNG")
