"""The judge of generated digits: its measures against independent formulas, and sets whose quality is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.scripts import load_script

from fastddpm.data import open_dataset
from fastddpm.errors import DataError
from fastddpm.metrics.digits import held_out_halves

digits = load_script("benchmarks/digits.py", "digits_benchmark")


@pytest.fixture(scope="module")
def judge() -> Any:
    """One net, trained for less long than the benchmark's three."""
    return digits.Scorer(16, seeds=(0,), epochs=4)


@pytest.fixture(scope="module")
def chosen() -> np.ndarray:
    return np.random.default_rng(7).choice(500, 64, replace=False)


@pytest.fixture(scope="module")
def real(judge: Any, chosen: np.ndarray) -> dict[str, Any]:
    """The figures of 64 held-out digits, given as if they were samples."""
    return digits.score(judge.probe_images[chosen], judge.probe_labels[chosen], judge)


def test_halves_are_disjoint_and_balanced() -> None:
    labels = open_dataset(None, image_size=16, channels=1).labels
    assert labels is not None
    train, reference, probe = held_out_halves(labels)
    assert sorted([*train, *reference, *probe]) == list(range(5000))
    assert [np.bincount(labels[part]).tolist() for part in (train, reference, probe)] == [
        [400] * 10,
        [50] * 10,
        [50] * 10,
    ]


@pytest.mark.slow
def test_held_out_accuracy(judge: Any) -> None:
    assert (judge.probe.probabilities.argmax(axis=1) == judge.probe_labels).mean() > 0.93


@pytest.mark.slow
def test_real_digits_score_high(real: dict[str, Any]) -> None:
    sets = real["sets"]
    assert sets["samples"]["confident_share"] > 0.75
    assert sets["samples"]["recognised_share"] > 0.9
    assert sets["real_held_out"]["images"] == 1000
    assert sets["real_held_out"]["confident_share"] > 0.8
    floor = sets["real_at_this_size"]
    assert floor["images"] == 64
    # The samples are one more draw from the digits the floor is drawn from.
    for name in ("classifier_frechet_distance", "precision", "recall", "class_entropy_bits"):
        assert abs(sets["samples"][name] - floor[name]) < 5 * floor[f"{name}_sd"]


@pytest.mark.slow
def test_small_samples_have_a_higher_floor(real: dict[str, Any]) -> None:
    sets = real["sets"]
    distance = "classifier_frechet_distance"
    assert sets["real_held_out"][distance] < 0.5 * sets["real_at_this_size"][distance]


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["uniform_noise", "shuffled_digits"])
def test_noise_scores_low(real: dict[str, Any], noise: str) -> None:
    row = real["sets"][noise]
    assert row["images"] == 64
    assert row["confident_share"] < 0.15
    assert row["recall"] < 0.1
    assert row["classifier_frechet_distance"] > 10 * real["sets"]["real_at_this_size"]["classifier_frechet_distance"]


@pytest.mark.slow
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_constant_images_are_not_taken_for_digits(judge: Any, grey: int) -> None:
    images = np.full((4, 1, 16, 16), grey, dtype=np.uint8)
    assert judge(images).probabilities.max() < 0.9


@pytest.mark.slow
def test_one_digit_repeated_is_confident_and_bad(judge: Any, real: dict[str, Any]) -> None:
    one = judge.probe.probabilities[:, 1].argmax()
    images = np.repeat(judge.probe_images[one : one + 1], 64, axis=0)
    row, floor = (s["sets"] for s in (digits.score(images, np.ones(64, dtype=np.int64), judge), real))
    assert row["samples"]["confident_share"] == row["samples"]["recognised_share"] == 1
    assert row["samples"]["class_counts"] == [0, 64, 0, 0, 0, 0, 0, 0, 0, 0]
    assert row["samples"]["class_entropy_bits"] == 0
    assert row["samples"]["recall"] == 0
    # The reference's total variance is 1, so a single point is at least that far away.
    assert row["samples"]["classifier_frechet_distance"] > 1
    assert floor["samples"]["class_entropy_bits"] > 3
    assert floor["samples"]["recall"] > 0.8


@pytest.mark.slow
def test_labels_are_the_classes_asked_for(judge: Any, chosen: np.ndarray) -> None:
    images, wrong = judge.probe_images[chosen], (judge.probe_labels[chosen] + 1) % 10
    assert digits.score(images, wrong, judge)["sets"]["samples"]["recognised_share"] < 0.1
    assert digits.score(images, None, judge)["sets"]["samples"]["recognised_share"] is None


@pytest.mark.slow
def test_shuffled_digits_keep_their_pixels(judge: Any) -> None:
    shuffled = digits.noise_images(judge, 500)["shuffled_digits"]
    real, fake = (np.sort(x.reshape(500, -1), axis=1) for x in (judge.probe_images, shuffled))
    assert sorted(map(tuple, real)) == sorted(map(tuple, fake))
    assert digits.noise_images(judge, 600)["shuffled_digits"].shape == (600, 1, 16, 16)


@pytest.mark.slow
def test_temperature_recovers_a_known_one(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(8000, 10)) * 2
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits)
    for factor in (0.5, 1.0, 2.5):
        assert digits.fit_temperature(factor * logits[None], labels) == pytest.approx(factor, rel=0.05)


@pytest.mark.slow
def test_features_are_scaled_to_a_total_variance_of_one(judge: Any) -> None:
    for features in judge.reference.features:
        assert features.dtype == np.float64
        assert np.trace(np.cov(features.T)) == pytest.approx(1)


IMAGES = np.zeros((5, 1, 16, 16), dtype=np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float32), None, "uint8"),
        (IMAGES[:, 0], None, "S, S"),
        (IMAGES.repeat(3, axis=1), None, "S, S"),
        (IMAGES[..., :8], None, "S, S"),
        (IMAGES[..., :4, :4], None, "S >= 8"),
        (IMAGES[:3], None, "at least 4"),
        (IMAGES, np.zeros(4, dtype=np.int64), r"\(5,\)"),
        (IMAGES, np.zeros(5), "integers"),
        (IMAGES, np.array([0, 1, 2, 3, 10]), "0..9"),
        (IMAGES, np.array([-1, 1, 2, 3, 9]), "0..9"),
        (np.zeros((5, 1, 8, 8), dtype=np.uint8), None, "trained on 16x16"),
    ],
)
def test_bad_samples(judge: Any, images: np.ndarray, labels: np.ndarray | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        digits.score(images, labels, judge)


@pytest.mark.slow
def test_command(
    judge: Any, chosen: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits, "Scorer", lambda size: judge)
    samples, report = tmp_path / "samples.npz", tmp_path / "report.json"
    np.savez(samples, images=judge.probe_images[chosen], labels=judge.probe_labels[chosen])
    assert digits.main([str(samples), "--json", str(report)]) == 0
    figures = json.loads(report.read_text())
    assert figures["versions"]["torch"] == torch.__version__ and figures["machine"] and figures["date"]
    share = figures["sets"]["samples"]["confident_share"]
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("samples"))
    assert row[1:3] == ["64", f"{share:.3f}"]


def test_command_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.npz"
    np.savez(samples, images=IMAGES)
    assert digits.main([str(samples), "--json", str(tmp_path / "none" / "report.json")]) == 2
    np.savez(tmp_path / "other.npz", pictures=IMAGES)
    np.save(tmp_path / "array.npy", IMAGES)
    (tmp_path / "text.npz").write_text("text")
    for name in ("other.npz", "array.npy", "text.npz", "missing.npz"):
        capsys.readouterr()
        assert digits.main([str(tmp_path / name)]) == 3
        assert "images" in capsys.readouterr().err
