"""Runs that `python -m fastddpm.evaluate` measures: small, with caches of their own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastddpm import evaluate
from fastddpm.errors import UsageError
from fastddpm.evaluation import quality
from fastddpm.metrics import digits

from .runs import trained

SHORT = ["--steps", "2", "--batch", "16", "--samples", "40", "--kid-subsets", "3", "--bits.images", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches of our own, with one net of one epoch in place of the classifier of digits, and shards of 16 samples."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        patch.setenv("TORCH_HOME", str(path / "torch"))
        patch.setattr(digits, "EPOCHS", 1)
        patch.setattr(digits, "SEEDS", (0,))
        patch.setattr(quality, "SIZE", 16)
        yield path


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A run of a small network on 100 timesteps."""
    return trained(home / "run", "--timesteps", "100", "--sample.steps", "2")


def command(run: Path, out: Path, *more: str) -> list[str]:
    return [str(run), "--out", str(out), "--device", "cpu", *SHORT, *more]


def document(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def refused_before_anything_long(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, *, data_first: bool = False
) -> None:
    """A mistake that ends the command before a net is trained or timed and, unless `data_first`, images are read."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("work began before the mistake was told")

    monkeypatch.setattr(digits, "load", never)
    monkeypatch.setattr(quality, "seconds_per_evaluation", never)
    if not data_first:
        monkeypatch.setattr("fastddpm.data.open_dataset", never)
    with pytest.raises(UsageError, match=message):
        evaluate.main(arguments)
