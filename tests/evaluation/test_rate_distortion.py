"""The progressive code against Shannon's function for a Gaussian source, its definition, and the paper's table."""

import csv
import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gaussian_source as source
from helpers.networks import Formula
from PIL import Image

import fastddpm.training
from fastddpm.config import DiffusionConfig
from fastddpm.data import Dataset
from fastddpm.diffusion import Diffusion
from fastddpm.evaluation import likelihood
from fastddpm.evaluation.bits_per_dim import BitsPerDim, bits_per_dim
from fastddpm.evaluation.context import EvaluationContext
from fastddpm.evaluation.options import BitsOptions
from fastddpm.evaluation.rate_distortion import measure_rate_distortion, rate_distortion, table
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.sampler import Sampler


def made_up(timesteps: int, rng: np.random.Generator) -> BitsPerDim:
    terms, term_errors, mse, mse_errors = rng.random((4, timesteps))
    return BitsPerDim(
        total=float(0.25 + terms.sum()), standard_error=0.1, prior=0.25, terms=terms, term_errors=term_errors, mse=mse,
        mse_errors=mse_errors, counts=np.full(timesteps, 4), indices=np.arange(4), per_image=np.zeros(4),
        conditioning="unconditional",
    )  # fmt: skip


def test_definition(rng: np.random.Generator) -> None:
    result = made_up(1000, rng)
    curve = rate_distortion(result)
    for t in (0, 1, 500, 998, 999):
        steps = 1000 - t
        at = steps - 1
        assert curve.steps[at] == steps
        assert curve.rate[at] == pytest.approx(
            result.prior + sum(result.terms[s] for s in range(t + 1, 1000)), rel=1e-12
        )
        assert curve.rmse[at] == pytest.approx(127.5 * result.mse[t] ** 0.5)
        # d sqrt(x) = dx / (2 sqrt(x))
        assert curve.rmse_errors[at] == pytest.approx(127.5 * result.mse_errors[t] / (2 * result.mse[t] ** 0.5))
    assert curve.rate[-1] + result.decoder == pytest.approx(result.total)


def test_an_exact_model_reaches_shannons_bound(rng: np.random.Generator) -> None:
    """R(D) = log2(s^2 / D) / 2 of a Gaussian source: at every step the rate is that of the distortion reached."""
    process = source.diffusion(variance="learned", loss="vlb")
    result = bits_per_dim(source.sampler(process), source.images(256, rng), None, BitsOptions(), batch=512)
    curve = rate_distortion(result)
    snr = (process.alpha_bar / (1 - process.alpha_bar))[::-1]
    information = 0.5 * np.log2(1 + source.DEVIATION**2 * snr)
    shannon = np.log2(source.DEVIATION * 127.5 / curve.rmse)
    np.testing.assert_allclose(curve.rate, information, atol=0.005, rtol=0.01)
    np.testing.assert_allclose(curve.rate, shannon, atol=0.02, rtol=0.01)
    assert curve.rate[-1] > 3 and curve.rate[0] < 1e-3


def test_table_beside_the_papers(rng: np.random.Generator) -> None:
    curve = rate_distortion(made_up(1000, rng))
    rows = table(curve)
    assert [row["steps"] for row in rows] == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert (rows[0]["paper_rate"], rows[0]["paper_rmse"]) == (1.77581, 0.95136)
    assert (rows[5]["paper_rate"], rows[5]["paper_rmse"]) == (0.00716, 38.03)
    assert rows[3]["rate"] == curve.rate[699] and rows[3]["rmse"] == curve.rmse[699]
    short = table(rate_distortion(made_up(7, rng)))
    assert [row["steps"] for row in short] == [7, 6, 5, 4, 3, 2, 1]
    assert all(row["paper_rate"] is None and row["paper_rmse"] is None for row in short)


def context_of(out: Path, timesteps: int = 1000) -> EvaluationContext:
    network = Formula(lambda x, t, label: 0.4 * x)
    sampler = Sampler(network, Diffusion(DiffusionConfig(timesteps=timesteps)))  # type: ignore[arg-type]
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 2, 2)).astype(np.uint8)
    return EvaluationContext(
        "mnist", sampler, Dataset.of(images, None, "noise"), 64, torch.device("cpu"), out, ProcessGroup()
    )


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path)
    found = measure_rate_distortion(context, BitsOptions())
    curve = rate_distortion(bits_per_dim(context.sampler, context.dataset.images, None, BitsOptions(), batch=64))
    with open(tmp_path / found["per_step"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["bits_per_dim"]) for row in rows], curve.rate, rtol=1e-8)
    np.testing.assert_allclose([float(row["rmse"]) for row in rows], curve.rmse, rtol=1e-8)
    assert [(row["t"], row["paper_rmse"]) for row in rows if row["paper_rmse"]][-2:] == [
        ("100", "12.02"),
        ("0", "0.95136"),
    ]
    assert (found["rate"], found["rmse"]) == (curve.rate[-1], curve.rmse[-1])
    assert len(found["pictures"]) == 3
    for name in found["pictures"]:
        with Image.open(tmp_path / name) as picture:
            levels = np.asarray(picture)
        assert levels.shape == (600, 810, 3)
        blue, red = (np.abs(levels.astype(int) - colour).max(-1) < 8 for colour in ((31, 119, 180), (214, 39, 40)))
        assert blue.sum() > 500 and red.sum() > 50  # our curve, and the paper's points

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("evaluated twice")

    monkeypatch.setattr(likelihood, "bits_per_dim", never)
    assert measure_rate_distortion(context, BitsOptions()) == found
    assert likelihood.measure_bits(context, BitsOptions())["terms_sum"] == pytest.approx(found["rate"], rel=1e-4)


def test_without_matplotlib_the_numbers_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastddpm.training.plots", raising=False)
    monkeypatch.delattr(fastddpm.training, "plots", raising=False)
    found = measure_rate_distortion(context_of(tmp_path, timesteps=10), BitsOptions())
    assert found["pictures"] == [] and not list(tmp_path.glob("*.png"))
    assert len((tmp_path / "rate-distortion.csv").read_text().splitlines()) == 11
    assert "no plots: they need matplotlib, pip install 'fastddpm[report]'" in capsys.readouterr().err


@pytest.mark.slow
def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is given everything by the first: here, what the first has kept."""
    context = context_of(tmp_path, timesteps=10)
    found = measure_rate_distortion(context, BitsOptions())
    kept = likelihood._kept(context, likelihood._settings(context, BitsOptions()))
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(likelihood, "all_gather_object", lambda value, group: [kept, value])
    second = dataclasses.replace(context, group=ProcessGroup(1, 2))
    assert {**measure_rate_distortion(second, BitsOptions()), "pictures": found["pictures"]} == found
    assert not list(tmp_path.iterdir())
