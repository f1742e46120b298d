"""Mistakes in `python -m fastddpm.evaluate`, told before anything long."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.evaluations import command, home, refused_before_anything_long, run
from helpers.runs import trained
from PIL import Image

from fastddpm import evaluate
from fastddpm.errors import UsageError
from fastddpm.runtime.options import parse_names

__all__ = ["home", "run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--metrics", "fid,fvd"],
            "--metrics takes fid, is, kid, pr, bpd, rate-distortion, ode-bpd, all or none; got 'fvd'",
        ),
        (["--pictures", "strip"], "--pictures takes progressive, .*; got 'strip'"),
        (["--batch", "0"], "--batch must be positive"),
        (["--features", "resnet"], "got 'resnet'"),
        (["--features", "nowhere.pth"], "there is no weights file at nowhere.pth"),
        (["--data", "nowhere"], "nowhere"),
        (["--steps", "101"], "steps must be in 1..100"),
    ],
)
def test_mistakes(arguments: list[str], message: str, run: Path, tmp_path: Path, home: Path) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate.main(command(run, tmp_path, *arguments))
    assert not (tmp_path / "metrics.json").exists()


def test_the_classifier_of_digits_is_refused_for_colour_before_it_is_trained(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 255)).save(photos / f"{i}.png")
    options = ["--image-channels", "3", "--num-classes", "0", "--label-dropout", "0", "--sample.guidance", "1"]
    run = trained(tmp_path / "run", *options, "--data", str(photos))
    message = (
        "the classifier of digits takes grey images, of 1 channel, and the model has 3; choose the feature network"
    )
    arguments = command(run, tmp_path / "out", "--data", str(photos))
    refused_before_anything_long([*arguments, "--features", "digits"], message, monkeypatch)
    more = [
        "--metrics",
        "none",
        "--pictures",
        "neighbours",
        "--picture.features",
        "digits",
        "--picture.neighbours",
        "1",
    ]
    monkeypatch.undo()
    refused_before_anything_long([*arguments, *more], message, monkeypatch, data_first=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits.every", "30", "--bits.images", "4"], "too few images for --bits.every 30: it needs 60"),
        (["--bits.every", "100", "--bits.images", "400"], "--bits.every must be below 100, the number of timesteps"),
        (["--samples", "9"], "--samples 9 cannot be split into --splits 10 parts"),
        (["--pictures", "neighbours", "--picture.crop", "17"], "crop must be in 1..16"),
        (["--pictures", "neighbours", "--picture.features", "nowhere.pth"], "no weights file at nowhere.pth"),
        (["--pictures", "shared-latent", "--picture.depths", "101"], "a depth counts steps"),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused_before_anything_long(
    arguments: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused_before_anything_long(command(run, tmp_path, *arguments), message, monkeypatch, data_first=True)


def test_help_answers_without_torch() -> None:
    program = "import sys, fastddpm.evaluate, fastddpm.evaluation.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint at"):
        evaluate.main([str(tmp_path / "nowhere")])


def test_names_are_taken_once_and_in_order() -> None:
    known = ("a", "b", "c")
    assert parse_names("c, a,c", known, "x") == ["a", "c"]
    assert parse_names("all", known, "x") == ["a", "b", "c"]
    assert parse_names("none", known, "x") == []
