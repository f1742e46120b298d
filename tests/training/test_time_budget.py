"""--minutes: the steps that fit, from the time of the first ones."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fastddpm.config import Preset, SampleConfig
from fastddpm.data import Dataset
from fastddpm.presets import PRESETS
from fastddpm.training import time_budget
from fastddpm.training.from_data import Given, suppose, with_steps
from fastddpm.training.time_budget import sampling_seconds, seconds_per_step, steps_within, two_digits

CPU = torch.device("cpu")


@pytest.fixture
def preset() -> Preset:
    base = suppose(Given(image_size=8, num_classes=0, batch=2), 1)
    unet = dataclasses.replace(base.unet, width=8, groups=4, multipliers=(1,), attention_resolutions=())
    return dataclasses.replace(base, unet=unet, sample=SampleConfig(steps=10, count=6))


@pytest.fixture
def dataset() -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    return Dataset.of(images, None, "x")


@pytest.mark.parametrize(
    ("number", "rounded"), [(0, 1), (0.4, 1), (7.9, 7), (99, 99), (129, 120), (2345.6, 2300), (1e6, 1_000_000)]
)
def test_two_digits(number: float, rounded: int) -> None:
    assert two_digits(number) == rounded


def test_the_time_of_a_step(preset: Preset, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances 0.25 s with every look: two looks enclose each group of steps."""
    taken = []
    train_step = time_budget.Trainer.train_step
    monkeypatch.setattr(time_budget.Trainer, "train_step", lambda self: (taken.append(self.step), train_step(self))[1])
    ticks = itertools.count(0, 0.25)
    monkeypatch.setattr(time_budget, "MEASURED_S", 1.0)
    assert seconds_per_step(preset, dataset, CPU, clock=lambda: next(ticks)) == 0.25 / 4  # 1 s at 0.25 s a step
    assert taken == list(range(3 + 1 + 4))


def test_samples_count_as_a_quarter_of_a_training_step(preset: Preset) -> None:
    plain = dataclasses.replace(preset, train=dataclasses.replace(preset.train, preview_every=0))
    assert sampling_seconds(plain, 1.0) == pytest.approx(6 * 10 / 4 / 2)
    assert sampling_seconds(preset, 1.0) == pytest.approx((6 * 10 + 4 * 16 * 20) / 4 / 2)
    mnist = PRESETS["mnist"]  # with guidance, by which the network is evaluated twice
    assert sampling_seconds(mnist, 0.1) == pytest.approx(2 * (64 * 150 + 4 * 16 * 10) / 4 / 16 * 0.1)


def test_the_steps_that_fit(preset: Preset, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(time_budget, "seconds_per_step", lambda *_, **__: 0.5)
    sampling = sampling_seconds(preset, 0.5)
    assert 80 < sampling < 90
    assert steps_within(30, preset, dataset, CPU, report=lines.append) == 3400  # (1800 - 84) / 0.5 = 3432
    assert lines == [
        "3,400 steps: 30 minutes at 0.5 s a step, with 1 min 24 s for samples; --steps or --minutes changes it"
    ]
    # Samples that would take too long take half of the time, and a run that is too short says so.
    assert steps_within(1, preset, dataset, CPU, report=lines.append) == 60
    assert lines[-2] == (
        "note: the samples take 1 min 24 s, so the run takes longer than 1 minute; fewer --sample.count, "
        "--sample.steps or more --preview-every shorten it"
    )
    assert lines[-1].startswith("note: 60 steps give blurred colours at best; it takes 500 and more")


def test_measuring_changes_nothing(preset: Preset, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_budget, "MEASURED_S", 0.0)
    plain = with_steps(preset, 3)

    def trained() -> list[torch.Tensor]:
        trainer = time_budget.Trainer(plain, dataset, CPU)
        for _ in range(3):
            trainer.train_step()
        return [*trainer.optimizer.state_dict().values(), *trainer.optimizer.average]

    before = trained()
    seconds_per_step(preset, dataset, CPU)
    assert all(map(torch.equal, before, trained()))
