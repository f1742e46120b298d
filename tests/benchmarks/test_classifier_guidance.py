"""Guidance by a classifier as a benchmark: what its rows are."""

import json
from pathlib import Path

import classifier_guidance
import numpy as np
import pytest
import torch
from digits import Scorer, figures_of
from helpers.classifiers import config

import fastddpm
from fastddpm.config import UNetConfig
from fastddpm.sampling.classifier import Classifier
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import to_dict

SMALL = UNetConfig(
    image_size=16, image_channels=1, width=8, multipliers=(1,), blocks=1, groups=4, dropout=0.0, num_classes=10,
    attention_resolutions=(),
)  # fmt: skip


@pytest.mark.slow
def test_rows_are_the_scores_of_guided_chains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier that has learned nothing changes nothing; one that has, does."""
    scorer, model = Scorer(16, seeds=(0,), epochs=1), fastddpm.load("digits")
    monkeypatch.setattr(classifier_guidance, "Scorer", lambda size: scorer)
    settings = config(SMALL, model.preset.diffusion)
    torch.manual_seed(0)
    classifier = Classifier(settings)
    torch.nn.init.normal_(classifier.head.weight)
    checkpoint.save(tmp_path, 0, {"model": classifier.state_dict()}, {"classifier": to_dict(settings)}, 1)
    out = tmp_path / "rows.json"
    classifier_guidance.main(
        [str(tmp_path), "--scales", "0", "50", "--images", "20", "--steps", "3", "--method", "ddim", "--out", str(out)]
    )
    rows = json.loads(out.read_text())["rows"]
    names = ["classifier, scale 0", "classifier, scale 50", "classifier-free, scale 2"]
    assert [row["guidance"] for row in rows] == names
    labels = [seed % 10 for seed in range(20)]
    plain = fastddpm.Sampler(model.unet, model.diffusion, 3, "ddim").sample(range(20), [10] * 20)
    levels = ((plain + 1) * 127.5).round().to(torch.uint8).numpy()
    expected = figures_of(scorer, levels, np.array(labels))
    for figure in classifier_guidance.DIGITS:
        assert rows[0][figure] == pytest.approx(expected[figure], rel=1e-5), figure
    distances = [row["classifier_frechet_distance"] for row in rows]
    assert len(set(distances)) == 3 and all(name in capsys.readouterr().out for name in names[:1])
