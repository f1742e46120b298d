"""The runner of the paper's table 2: its rows, what is measured, and that nothing is done twice or hidden."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fastddpm import ablation
from fastddpm.data import Dataset, open_dataset
from fastddpm.errors import DataError, DivergedError, UsageError
from fastddpm.evaluation import ablation as sweeping
from fastddpm.evaluation.bits_per_dim import bits_per_dim
from fastddpm.evaluation.options import BitsOptions
from fastddpm.evaluation.table2 import CELLS, chosen_cells, configuration
from fastddpm.metrics import Activations
from fastddpm.presets import PRESETS
from fastddpm.pretrained import load as load_model
from fastddpm.sampling.sampler import Sampler
from fastddpm.training.trainer import Trainer

SMALL = [
    "--steps",
    "2",
    "--timesteps",
    "8",
    "--samples",
    "12",
    "--bits.images",
    "6",
    "--bits.every",
    "3",
    "--device",
    "cpu",
]


class Quadrants:
    """Features of 16 x 16 digits: the mean of each quarter; two classes, by the upper left one."""

    name, checksum, dimension, classes, is_inception = "quadrants", "0" * 64, 4, 2, False

    def __call__(self, images: Tensor) -> Activations:
        features = torch.nn.functional.avg_pool2d(images.float(), 8).flatten(1)
        return Activations(features, torch.stack([features[:, 0], 20 - features[:, 0]], 1) / 10)


@pytest.fixture
def quadrants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "open_network", lambda name, **options: Quadrants())


def table_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((out / "table.json").read_text())["rows"]}


def test_rows_are_the_papers() -> None:
    """Table 2, and table 1's bits of the two rows that are in both."""
    known = [
        (cell.prediction, cell.loss, cell.variance, cell.paper_fid, cell.paper_score, cell.paper_bits) for cell in CELLS
    ]
    assert known == [
        ("xprev", "vlb", "learned", 23.69, 7.28, None),
        ("xprev", "vlb", "fixedlarge", 13.22, 8.06, None),
        ("xprev", "simple", "fixedlarge", None, None, None),
        ("eps", "vlb", "learned", None, None, None),
        ("eps", "vlb", "fixedlarge", 13.51, 7.67, 3.70),
        ("eps", "simple", "fixedlarge", 3.17, 9.46, 3.75),
    ]
    for cell in CELLS:
        config = configuration(PRESETS["mnist"], cell, 3, steps=None, timesteps=None)
        assert (config.diffusion.schedule, config.diffusion.timesteps) == ("linear", 1000)
        assert (config.unet.num_classes, config.sample.guidance, config.sample.steps) == (0, 1.0, None)
        assert (config.train.seed, config.train.steps) == (3, 1000)
        assert config.unet.learned_variance == (cell.variance == "learned")
    assert [cell.name for cell in chosen_cells("eps-simple, mean-bound")] == ["mean-bound", "eps-simple"]
    with pytest.raises(UsageError, match="no cell is called 'simple'; there are mean-bound-learned, "):
        chosen_cells("simple")


@pytest.mark.slow
def test_the_whole_sweep(
    tmp_path: Path, quadrants: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation.main([*SMALL, "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    rows = table_of(tmp_path)
    assert list(rows) == [cell.name for cell in CELLS]
    digits = open_dataset(None, image_size=16, channels=1)
    held_out = np.arange(5000) % 10 == 0
    for name in ("mean-bound-learned", "eps-simple"):
        run, row = tmp_path / f"{name}-0", rows[name]
        assert row["unstable"] == []
        trained = load_model(run)
        sampler = Sampler(trained.unet, trained.diffusion)
        expected = bits_per_dim(sampler, digits.images[held_out], None, BitsOptions(images=6, every=3), batch=6)
        assert row["bits_per_dim"] == pytest.approx(expected.total, rel=1e-5)
        with np.load(run / "samples.npz") as arrays:
            images = arrays["images"]
        assert len(images) == 12
        assert row["frechet_distance"] == pytest.approx(frechet(images, digits.images[~held_out]), rel=1e-5)
        p = Quadrants()(torch.from_numpy(images)).logits.double().softmax(1).numpy()  # type: ignore[union-attr]
        assert row["score"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-6)

    monkeypatch.setattr(sweeping, "Trainer", None)  # nothing is trained again
    ablation.main([*SMALL, "--out", str(tmp_path)])
    assert table_of(tmp_path) == rows
    with pytest.raises(UsageError, match=r"result.json was measured with other settings; choose another --out"):
        ablation.main([*SMALL, "--samples", "13", "--out", str(tmp_path)])


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    x, y = (Quadrants()(torch.from_numpy(images)).features.double().numpy() for images in (a, b))
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root))


@pytest.mark.slow
def test_several_seeds(tmp_path: Path, quadrants: None) -> None:
    ablation.main([*SMALL, "--out", str(tmp_path), "--cells", "eps-simple", "--seeds", "0-1"])
    document = json.loads((tmp_path / "table.json").read_text())
    values = [run["bits_per_dim"] for run in document["runs"]["eps-simple"]]
    assert len(set(values)) == 2
    row = document["rows"][0]
    assert row["bits_per_dim"] == pytest.approx(np.mean(values)) and row["bits_per_dim_sd"] == pytest.approx(
        np.std(values, ddof=1)
    )
    assert f"{np.mean(values):.4g} ± " in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between training and measuring: what was trained is not trained again."""
    options = [*SMALL, "--cells", "eps-simple", "--network", "none"]
    ablation.main([*options, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stopped(*arguments: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(sweeping.AblationRunner, "_score", stopped)
        ablation.main([*options, "--out", str(tmp_path / "stopped")])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", None)
        ablation.main([*options, "--out", str(tmp_path / "stopped")])
    assert table_of(tmp_path / "stopped") == table_of(tmp_path / "whole")
    row = table_of(tmp_path / "whole")["eps-simple"]
    assert row["frechet_distance"] is None and row["bits_per_dim"] > 0


@pytest.mark.slow
def test_forged_results_are_one_error_or_text(tmp_path: Path) -> None:
    options = [*SMALL, "--cells", "eps-simple", "--network", "none", "--out", str(tmp_path)]
    ablation.main(options)
    path = tmp_path / "eps-simple-0" / "result.json"
    record = json.loads(path.read_text())
    record["result"]["outcome"] = "half of a character: \ud800"
    path.write_text(json.dumps(record))
    ablation.main(options)
    assert "half of a character: \\ud800" in (tmp_path / "table.md").read_text()
    record["result"]["bits_per_dim"] = 10**400
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"result\.json: not valid JSON: an integer of 401 digits; remove it"):
        ablation.main(options)


@pytest.mark.slow
def test_unstable_runs_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One diverges, another's weights are NaN; the third is not disturbed, and all are told of."""
    run = Trainer.run

    def unstable(trainer: Trainer, path: Path, *arguments: Any, **options: Any) -> Path:
        if trainer.preset.train.seed == 0:
            trainer.step = 1
            raise DivergedError("three steps in a row")
        saved = run(trainer, path, *arguments, **options)
        if trainer.preset.train.seed == 1:
            for weights in trainer.optimizer.average:
                weights.fill_(torch.nan)
        return saved

    monkeypatch.setattr(Trainer, "run", unstable)
    ablation.main([*SMALL, "--cells", "eps-bound", "--seeds", "0-2", "--network", "none", "--out", str(tmp_path)])
    row = table_of(tmp_path)["eps-bound"]
    assert row["unstable"] == [
        "diverged at step 1",
        "no samples: images contain NaN: the network's weights are damaged, or training diverged",
    ]
    runs = json.loads((tmp_path / "table.json").read_text())["runs"]["eps-bound"]
    assert runs[1]["bits_per_dim"] is None and row["bits_per_dim"] == runs[2]["bits_per_dim"] > 0
    assert "diverged at step 1; no samples" in (tmp_path / "table.md").read_text()


def test_split() -> None:
    images = np.arange(25, dtype=np.uint8).reshape(25, 1, 1, 1)
    trained_on, held_out = sweeping.split(Dataset.of(images, np.arange(25), "numbers"))
    assert held_out.images.ravel().tolist() == [0, 10, 20] and held_out.labels is not None
    assert held_out.labels.tolist() == [0, 10, 20]
    assert sorted([*trained_on.images.ravel().tolist(), 0, 10, 20]) == list(range(25))
