"""python -m fastddpm.evaluate as a user meets it: a whole run, going on, two processes, mistakes."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.evaluations import command, document, home, refused_before_anything_long, run
from helpers.runs import trained
from PIL import Image

from fastddpm import evaluate
from fastddpm.data import open_dataset
from fastddpm.errors import DataError, UsageError
from fastddpm.evaluation import report
from fastddpm.metrics import open_network
from fastddpm.runtime import distributed
from fastddpm.sampling.options import ChainOptions

__all__ = ["home", "run"]
SCORES = {
    "frechet_distance[digits]", "classifier_score[digits]", "kernel_distance[digits]", "precision[digits]",
    "recall[digits]",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(run: Path, home: Path) -> Path:
    """Everything, by one process."""
    out = home / "whole"
    evaluate.main(command(run, out))
    return out


@pytest.mark.slow
def test_one_command_measures_everything(whole: Path, run: Path) -> None:
    found = document(whole)
    assert set(found["train"]) == SCORES | {"bpd", "rate-distortion"}
    assert found["checkpoint"]["preset"] == "mnist" and len(found["checkpoint"]["network"]) == 64
    data = open_dataset(None, image_size=16, channels=1)
    network = open_network("digits", image_size=16)
    for name, record in found["train"].items():
        assert record["data"] == {"name": "digits", "sha256": data.checksum}
        assert record["date"] and set(record["versions"]) == {"fastddpm", "torch", "numpy", "python"}
        if name in SCORES:
            assert record["features"] == {"name": "digits", "sha256": network.checksum}
            assert record["samples"] == 40 and record["reference_images"] == 5000
            assert record["sampling"]["steps"] == 2 and np.isfinite(record["value"])
    assert found["train"]["bpd"]["num_images"] == 2 and (whole / "train" / "bits.csv").exists()
    assert "fid" not in (whole / "metrics.json").read_text().lower()


def test_the_page_of_the_run_shows_the_scores(run: Path, home: Path) -> None:
    evaluate.main(command(run, run / "evaluation", "--metrics", "bpd"))
    found = document(run / "evaluation")
    assert found["checkpoint"]["step"] == 1
    text = (run / "index.html").read_text()
    assert f"{found['train']['bpd']['bits_per_dim']:.4f} ± " in text and "averaged weights after 1 steps." in text


def test_before_anything_long_it_says_what_that_takes(
    run: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(command(run, tmp_path, "--metrics", "is,bpd"))
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"{run} on cpu: ") for line in lines)  # the model's name, as it was given
    cost = [line.partition(";")[0] for line in lines].index("is: 40 samples to draw, 160 evaluations")
    assert lines[cost + 1].startswith("bpd, rate-distortion: 200 evaluations (images x timesteps)")
    assert next(i for i, line in enumerate(lines) if line.startswith("sampling")) > cost + 1


@pytest.mark.slow
def test_the_table_is_of_this_command_and_names_what_else_the_file_holds(
    whole: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = document(whole)["train"]
    evaluate.main(command(run, whole, "--metrics", "fid,bpd"))
    *lines, earlier = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| metric | measured | paper | data |", "|---|---|---|---|"]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| frechet_distance[digits], train", "| bpd, train"]
    value = document(whole)["train"]["frechet_distance[digits]"]["value"]
    assert f"| {value:.5g} |" in lines[2] and "40 samples, ancestral, 2 steps; 5,000 images of digits" in lines[2]
    others = before.keys() - {"frechet_distance[digits]", "bpd"}
    named = [f"{name}, train ({before[name]['date'][:10]})" for name in before if name in others]
    assert earlier == f"{whole / 'metrics.json'} also holds, of earlier commands: {'; '.join(named)}"
    evaluate.main(command(run, whole, "--metrics", "none"))
    (only,) = capsys.readouterr().out.splitlines()
    assert only.startswith(str(whole / "metrics.json")) and only.count("train (") == 7


@pytest.mark.slow
def test_another_command_adds_to_the_figures(
    run: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, photos = tmp_path / "out", tmp_path / "photos"
    for i, image in enumerate(open_dataset(None, image_size=16, channels=1).images[:40]):
        path = photos / ("train", "test")[i % 2] / f"{i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    evaluate.main(command(run, out, "--metrics", "is"))
    first = document(out)["train"]
    assert set(first) == {"classifier_score[digits]"}
    capsys.readouterr()
    with pytest.raises(UsageError, match=r"the embedded digits have no test split: .*use --split train"):
        evaluate.main(command(run, out, "--metrics", "fid", "--split", "test"))
    evaluate.main(
        command(run, out, "--metrics", "fid,pr", "--split", "test", "--data", str(photos), "--features", "digits")
    )
    assert "0 samples to draw" in capsys.readouterr().err
    both = document(out)
    assert both["train"] == first and set(both["test"]) == SCORES - {
        "classifier_score[digits]", "kernel_distance[digits]",
    }  # fmt: skip


def test_pictures(run: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--picture.rows", "2", "--picture.columns", "2", "--picture.frames", "2"]
    evaluate.main(command(run, tmp_path, "--metrics", "none", "--pictures", "strips", *options))
    record = document(tmp_path)["pictures"]["strips"]
    assert record["options"]["rows"] == 2 and record["sampling"]["steps"] == 2
    assert "strips-reverse.png" in record["files"] and all((tmp_path / name).exists() for name in record["files"])
    assert str(tmp_path / "strips.gif") in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_of_torchrun_measure_the_same(whole: Path, run: Path, tmp_path: Path, home: Path) -> None:
    """To the bit for what the samples are scored by: the first process reads the shards in their order."""
    main = tmp_path / "main.py"  # with the changes of `home`
    main.write_text(
        "from fastddpm import evaluate\nfrom fastddpm.evaluation import quality\nfrom fastddpm.runtime import cli\n"
        "from fastddpm.metrics import digits\ndigits.EPOCHS, digits.SEEDS, quality.SIZE = 1, (0,), 16\n"
        "cli.run(evaluate.main)\n"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(main),
            *command(run, tmp_path / "two"),
        ],
        text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (document(out)["train"] for out in (whole, tmp_path / "two"))
    assert one.keys() == two.keys()
    for name in SCORES:
        assert two[name]["value"] == one[name]["value"]
    assert two["bpd"]["bits_per_dim"] == pytest.approx(one["bpd"]["bits_per_dim"], rel=1e-6)
    assert two["rate-distortion"]["rmse"] == pytest.approx(one["rate-distortion"]["rmse"], rel=1e-6)
    assert done.stdout.count("| metric |") == 1 and "2 processes" in done.stderr


@pytest.mark.slow
def test_samples_of_other_settings_are_refused(run: Path, tmp_path: Path, home: Path) -> None:
    evaluate.main(command(run, tmp_path, "--metrics", "is"))
    before = (tmp_path / "metrics.json").read_bytes()
    for more, name in (
        (["--steps", "3"], r"steps \d+, not 3"),
        (["--samples", "39"], "seeds"),
        (["--guidance", "1"], "guid"),
    ):
        with pytest.raises(UsageError, match=f"holds images with {name}.*another --out"):
            evaluate.main(command(run, tmp_path, "--metrics", "is", *more))
    assert (tmp_path / "metrics.json").read_bytes() == before


@pytest.mark.slow
def test_figures_of_other_weights_are_refused(run: Path, tmp_path: Path, home: Path) -> None:
    evaluate.main(command(run, tmp_path / "out", "--metrics", "is"))
    other = trained(tmp_path / "other", "--timesteps", "100", "--seed", "1", "--sample.steps", "2")
    with pytest.raises(UsageError, match=r"metrics.json holds results of network [0-9a-f]{12}, not [0-9a-f]{12}"):
        evaluate.main(command(other, tmp_path / "out", "--metrics", "none"))
    (tmp_path / "out" / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"metrics\.json: not valid JSON.*choose another --out"):
        evaluate.main(command(run, tmp_path / "out", "--metrics", "none"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Some images of our own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_without_a_feature_network_the_rest_is_measured(
    run: Path, tmp_path: Path, home: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where images are given, digits are no network to compare them by; asked for explicitly it is a mistake."""
    evaluate.main(command(run, tmp_path, "--data", str(pictures)))
    error = capsys.readouterr().err
    assert "fid, is, kid, pr are left out: the Inception weights are missing: download" in error
    assert set(document(tmp_path)["train"]) == {"bpd", "rate-distortion"}
    with pytest.raises(UsageError, match="--features efficientnet-lite0, whose scores are not FID"):
        evaluate.main(command(run, tmp_path, "--data", str(pictures), "--metrics", "fid"))


def test_other_settings_than_those_of_bits_npz_are_refused_before_the_scores(
    whole: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"bits.npz holds a result with images 2, not 3; choose another --out"
    refused_before_anything_long(command(run, whole, "--bits.images", "3"), message, monkeypatch, data_first=True)


def test_the_papers_figures_stand_beside_ours(run: Path, tmp_path: Path, home: Path) -> None:
    """Of a model of the paper's preset: Table 1, and the FID against the test set of section 4.1."""
    device = torch.device("cpu")
    opened = ChainOptions().open(run, device, 16)
    context = evaluate._context(evaluate.Command(run, out=tmp_path), *opened, device, distributed.ProcessGroup())
    ours = report.Report(dataclasses.replace(context, name="cifar10"), run)
    score = {
        "value": 3.21, "samples": 50000, "reference_images": 50000, "data": {"name": "cifar"},
        "sampling": {"method": "ancestral", "steps": 1000},
    }  # fmt: skip
    ours.add("train", "fid", score)
    ours.add("train", "inception_score", score | {"value": 9.4, "std": 0.125})
    ours.add("test", "fid", score | {"value": 5.27})
    bits = {"bits_per_dim": 3.7512, "standard_error": 0.002, "num_images": 10000, "data": {"name": "cifar"}}
    ours.add("test", "bpd", bits)
    ours.add("train", "bpd", bits | {"bits_per_dim": None, "standard_error": None})
    ours.add("train", "rate-distortion", bits | {"rate": None, "rmse": 0.5})
    ours.add("train", "frechet_distance[digits]", score)
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in ours.table().splitlines()[2:]]
    assert rows == [
        ["fid, train", "3.21", "3.17"],
        ["inception_score, train", "9.4 ± 0.125", "9.46 ± 0.11"],
        ["bpd, train", "not finite bits/dim", "≤ 3.72"],
        ["rate-distortion, train", "not finite bits/dim at RMSE 0.5000", ""],
        ["frechet_distance[digits], train", "3.21", ""],
        ["fid, test", "5.27", "5.24"],
        ["bpd, test", "3.7512 ± 0.0020 bits/dim", "≤ 3.75"],
    ]


@pytest.mark.slow
def test_statistics_are_written_and_compared_with(
    whole: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the file alone the distance is that to the images, and what needs images is left out or refused."""
    path = tmp_path / "made" / "digits.npz"
    evaluate.main(command(run, whole, "--metrics", "fid", "--write-statistics", str(path)))
    assert str(path) in capsys.readouterr().out.splitlines()
    expected = document(whole)["train"]["frechet_distance[digits]"]
    with np.load(path) as found:
        assert int(found["count"]) == 5000 and found["sigma"].shape == (32, 32)
    given = ("--reference", str(path), "--features", "digits")
    evaluate.main(command(run, tmp_path / "out", *given))
    shown = capsys.readouterr()
    assert "left out, as they need images (--data): kid, pr, bpd, rate-distortion" in shown.err
    assert "5,000 images of statistics digits.npz" in shown.out
    scores = document(tmp_path / "out")["train"]
    assert set(scores) == {"frechet_distance[digits]", "classifier_score[digits]"}
    record = scores["frechet_distance[digits]"]
    assert record["value"] == pytest.approx(expected["value"], rel=1e-9)
    assert record["data"] == {"name": "statistics digits.npz", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    for more, message in (
        (("--metrics", "fid,kid"), "kid: these need the images, not only --reference; name them with --data"),
        (("--pictures", "strips"), "strips: these need the images"),
        (("--write-statistics", "a.npz"), "--write-statistics writes those of the data; name them with --data"),
        (("--reference", "absent.npz"), "there is no file of statistics at absent.npz"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate.main(command(run, tmp_path / "new", *given, *more))
    with pytest.raises(UsageError, match=r"is a directory; name the \.npz file to write"):
        evaluate.main(command(run, tmp_path / "new", "--write-statistics", str(tmp_path)))
    with pytest.raises(UsageError, match="--write-statistics needs the features of the data; add fid to --metrics"):
        evaluate.main(command(run, tmp_path / "new", "--metrics", "bpd", "--write-statistics", str(path)))
    assert not (tmp_path / "new").exists()
