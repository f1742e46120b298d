"""Scores of a model's samples against the images drawn and compared by hand; shards, restarts and the cache."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.networks import SMALLEST, shaken
from helpers.own_networks import MLP

from fastddpm.config import DiffusionConfig
from fastddpm.data import Dataset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import StorageError, UsageError
from fastddpm.evaluation import features, quality
from fastddpm.evaluation.context import EvaluationContext
from fastddpm.evaluation.options import QUALITY_METRICS, QualityOptions
from fastddpm.evaluation.quality import measure_quality, quality_cost, score_name, seconds_per_evaluation
from fastddpm.metrics import Pretrained
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.images import to_uint8
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.files import host
from fastddpm.unet import UNet

linalg = pytest.importorskip("scipy.linalg")

OPTIONS = QualityOptions(samples=50, splits=3, kid_subsets=4, kid_subset_size=20, neighbours=2)


class Corners(torch.nn.Module):
    """Five of an image's sixteen pixels, and three as logits; it counts the images that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += len(images)
        pixels = images.float().flatten(1) / 64
        return pixels[:, :5].contiguous(), pixels[:, 7:10].contiguous()


@pytest.fixture
def network() -> Pretrained:
    return Pretrained("corners", "c" * 64, 5, 3, False, 1, Corners())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seven images in each, and a cache of our own."""
    monkeypatch.setattr(quality, "SIZE", 7)
    monkeypatch.setattr(features, "SIZE", 7)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def subject_in(out: Path, *, group: ProcessGroup | None = None, seed: int = 0, images: int = 40) -> EvaluationContext:
    torch.manual_seed(seed)
    unet = shaken(UNet(SMALLEST))
    assert isinstance(unet, UNet)
    diffusion = Diffusion(DiffusionConfig())
    sampler = Sampler(unet, diffusion, 3)
    out.mkdir(exist_ok=True)
    data = np.random.default_rng(1).integers(0, 256, (images, 1, 4, 4), dtype=np.uint8)
    return EvaluationContext(
        "own", sampler, Dataset.of(data, None, "noise"), 3, torch.device("cpu"), out, group or ProcessGroup()
    )


def values(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: record["value"] for name, record in scores.items()}


def seen(network: Pretrained) -> int:
    assert isinstance(network.module, Corners)
    return network.module.seen


@pytest.mark.parametrize("own", [False, True], ids=["UNet", "network of one's own"])
def test_scores_are_those_of_the_images(network: Pretrained, tmp_path: Path, own: bool) -> None:
    """Drawn here and looked at here, in one batch; the Fréchet distance by the formula, the score by its definition."""
    context = subject_in(tmp_path / "out")
    if own:
        context = dataclasses.replace(context, sampler=Sampler(MLP(16), Diffusion(), 3, shape=(1, 4, 4)))
    found = measure_quality(context, network, QUALITY_METRICS, OPTIONS)
    images = to_uint8(context.sampler.sample(range(50)))
    assert images.std() > 10
    fake, real = (x.reshape(len(x), -1).astype(np.float64) / 64 for x in (images, context.dataset.images))
    a, b = fake[:, :5], real[:, :5]
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found["frechet_distance[corners]"]["value"] == pytest.approx(expected, rel=1e-6)

    p = np.exp(fake[:, 7:10])
    p /= p.sum(1, keepdims=True)
    parts = [p[i * 50 // 3 : (i + 1) * 50 // 3] for i in range(3)]
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    record = found["classifier_score[corners]"]
    assert (record["value"], record["std"]) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-6)

    kernel = [(x @ y.T / 5 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    whole = found["kernel_distance[corners]"]["all_images"]
    assert whole == pytest.approx(sum(within) - 2 * kernel[2].mean(), rel=1e-6)

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        distances = np.linalg.norm(centres[:, None] - centres, axis=2)
        radii = np.sort(distances, axis=1)[:, 2]
        return float((np.linalg.norm(points[:, None] - centres, axis=2) <= radii).any(1).mean())

    assert found["precision[corners]"]["value"] == share(a, b)
    assert found["recall[corners]"]["value"] == share(b, a)


def test_every_score_says_what_it_is_of(network: Pretrained, tmp_path: Path) -> None:
    context = subject_in(tmp_path / "out")
    for record in measure_quality(context, network, QUALITY_METRICS, OPTIONS).values():
        assert record["features"] == {"name": "corners", "sha256": "c" * 64}
        assert record["samples"] == 50 and record["reference_images"] == 40
        assert record["sampling"] == context.sampler.settings()
        json.dumps(record)


def test_only_inception_gives_an_fid(network: Pretrained) -> None:
    names = ("fid", "is", "kid", "precision")
    genuine = dataclasses.replace(network, name="inception", is_inception=True)
    assert [score_name(name, genuine) for name in names] == ["fid", "inception_score", "kid", "precision[inception]"]
    assert [score_name(name, network) for name in names] == [
        "frechet_distance[corners]", "classifier_score[corners]", "kernel_distance[corners]", "precision[corners]",
    ]  # fmt: skip


def files(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("shard-*.npz")}


def arrays(out: Path) -> dict[str, np.ndarray]:
    """All features of a directory, by shard; a file's bytes hold a time."""
    return {path.name: np.load(path)["features"] for path in sorted(out.rglob("shard-*.npz"))}


def test_no_image_is_on_the_disk_and_features_are_float32(network: Pretrained, tmp_path: Path) -> None:
    measure_quality(subject_in(tmp_path / "out"), network, ["fid"], OPTIONS)
    shards = sorted((tmp_path / "out").rglob("shard-*.npz"))
    assert len(shards) == 8 and len(list((tmp_path / "cache").rglob("shard-*.npz"))) == 6
    for i, path in enumerate(shards):
        with np.load(path) as shard:
            assert set(shard) == {"features", "logits", "seeds"} and shard["features"].dtype == np.float32
            assert shard["seeds"].tolist() == list(range(7 * i, min(50, 7 * i + 7)))


def test_what_is_there_is_not_drawn_again(network: Pretrained, tmp_path: Path) -> None:
    """Another metric of the same samples needs no sampling, another model no second look at the data set."""
    context = subject_in(tmp_path / "out")
    first = values(measure_quality(context, network, ["fid"], OPTIONS))
    assert seen(network) == 90
    before = files(tmp_path / "out")
    assert values(measure_quality(context, network, ["fid", "is", "kid"], OPTIONS)).items() >= first.items()
    assert seen(network) == 90 and files(tmp_path / "out") == before
    measure_quality(subject_in(tmp_path / "other", seed=1), network, ["fid"], OPTIONS)
    assert seen(network) == 140
    measure_quality(subject_in(tmp_path / "third", seed=2), network, ["is"], OPTIONS)
    assert seen(network) == 190


def test_other_data_and_other_weights_have_other_references(network: Pretrained, tmp_path: Path) -> None:
    context = subject_in(tmp_path / "out")
    other_data = subject_in(tmp_path / "out", images=30)
    other_weights = dataclasses.replace(network, checksum="d" * 64)
    keys = {
        features.reference_shards(*pair).directory
        for pair in ((context, network), (other_data, network), (context, other_weights))
    }
    assert len(keys) == 3
    measure_quality(context, network, ["is"], OPTIONS)
    with pytest.raises(UsageError, match="holds images with features"):
        measure_quality(context, other_weights, ["is"], OPTIONS)


def test_an_interrupted_run_is_finished(network: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = values(measure_quality(subject_in(tmp_path / "whole"), network, QUALITY_METRICS, OPTIONS))
    put, written = features.FeatureShards.put, []

    def stops(self: Any, index: int, found: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(index)
        put(self, index, found)

    context = subject_in(tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(features.FeatureShards, "put", stops)
        measure_quality(context, network, QUALITY_METRICS, OPTIONS)
    left = files(tmp_path / "out")
    assert len(left) == 3
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "out" / "features" / "corners" / f".shard-00005.npz.{host()}.{dead.pid}.tmp").write_bytes(b"half")
    assert quality_cost(context, network, ["is"], OPTIONS, 0.0).images == 50 - 21
    found = values(measure_quality(context, network, QUALITY_METRICS, OPTIONS))
    assert found == expected and left.items() <= files(tmp_path / "out").items()
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_draw_the_features_of_one(network: Pretrained, tmp_path: Path) -> None:
    """Each its own shards; whatever the number, the union is the same to the bit."""
    measure_quality(subject_in(tmp_path / "one"), network, ["fid"], OPTIONS)
    for rank in (0, 1):
        context = subject_in(tmp_path / "two", group=ProcessGroup(rank, 2))
        shards = quality.sample_shards(context, network, OPTIONS)
        quality._fill_samples(context, network, shards)
        assert len(arrays(tmp_path / "two")) == (4, 8)[rank]
    one, two = arrays(tmp_path / "one"), arrays(tmp_path / "two")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_the_batch_moves_no_more_than_rounding(network: Pretrained, tmp_path: Path) -> None:
    found = [
        values(measure_quality(dataclasses.replace(subject_in(tmp_path / str(n)), batch=n), network, ["fid"], OPTIONS))
        for n in (1, 50)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("where", ["sample", "reference"])
@pytest.mark.parametrize("damage", ["short", "other shape", "no logits"])
def test_a_damaged_shard_is_made_again(
    where: str, damage: str, network: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = subject_in(tmp_path / "out")
    expected = values(measure_quality(context, network, QUALITY_METRICS, OPTIONS))
    folder = tmp_path / ("out" if where == "sample" else "cache")
    path = sorted(folder.rglob("shard-*.npz"))[1]
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        content = dict(np.load(path))
        content["features"] = content["features"][:, : 4 if damage == "other shape" else 5]
        content.pop("logits" if damage == "no logits" else "none", None)
        np.savez(path, **content)
    capsys.readouterr()
    assert values(measure_quality(context, network, QUALITY_METRICS, OPTIONS)) == expected
    assert f"{path} " in capsys.readouterr().err


def test_damaged_moments_are_gathered_again(
    network: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = subject_in(tmp_path / "out")
    expected = values(measure_quality(context, network, ["fid"], OPTIONS))
    (path,) = (tmp_path / "cache").rglob("moments.npz")
    path.write_bytes(path.read_bytes()[:-30])
    assert values(measure_quality(context, network, ["fid"], OPTIONS)) == expected
    assert "computing it again" in capsys.readouterr().err


def test_where_there_is_no_cache_the_reference_goes_beside_the_samples(
    network: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measure_quality(subject_in(tmp_path / "out"), network, ["fid"], OPTIONS)
    assert len(list((tmp_path / "out" / "reference").rglob("shard-*.npz"))) == 6


def test_a_full_disk_is_one_message(network: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*shard-00000.npz: No space left.*run the same command"):
        measure_quality(subject_in(tmp_path / "out"), network, ["is"], OPTIONS)
    assert not list((tmp_path / "out").rglob("*.tmp")) and not files(tmp_path / "out")


def test_the_cost_counts_what_is_left(network: Pretrained, tmp_path: Path) -> None:
    """50 samples of 3 steps and 40 images to look at; guidance would evaluate twice."""
    context = subject_in(tmp_path / "out", group=ProcessGroup(0, 2))
    cost = quality_cost(context, network, ["fid"], OPTIONS, per_evaluation=2.0)
    assert (cost.images, cost.features, cost.evaluations) == (50, 90, 150)
    assert cost.seconds == pytest.approx(150.0, abs=5)  # 150 x 2 s by two processes, and the features
    assert quality_cost(context, network, ["is"], OPTIONS, 2.0).features == 50
    assert 0 < seconds_per_evaluation(context) < math.inf


@pytest.mark.parametrize(
    ("metrics", "options", "classes", "message"),
    [
        (["fvd"], {}, 3, "metrics of samples are fid, is, kid, pr; got 'fvd'"),
        (["is"], {}, 0, "metric is needs a network with classes; .* has none"),
        (["is"], {"samples": 2}, 3, "--samples 2 cannot be split into --splits 3 parts"),
        (
            ["pr"],
            {"samples": 2},
            3,
            "--neighbours 2 needs 3 samples and images at least; got --samples 2 and 40 images",
        ),
    ],
)
def test_mistakes(
    metrics: list[str], options: dict[str, int], classes: int, message: str, network: Pretrained, tmp_path: Path
) -> None:
    context = subject_in(tmp_path / "out")
    with pytest.raises(UsageError, match=message):
        measure_quality(
            context, dataclasses.replace(network, classes=classes), metrics, dataclasses.replace(OPTIONS, **options)
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("option", ["samples", "splits", "kid_subsets", "neighbours", "kid_subset_size"])
def test_options_are_positive(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} must be"):
        QualityOptions(**{option: 0})
