"""Runs too short for their average or their warm-up: the share of the initial weights, and how many steps it takes."""

import math

import pytest
import torch
from torch import nn

from fastddpm.config import TrainConfig
from fastddpm.presets import PRESETS
from fastddpm.training.length import initial_share, steps_needed, too_short
from fastddpm.training.optimizer import Optimizer


@pytest.mark.parametrize(
    ("config", "steps", "share"),
    [
        (TrainConfig(), 0, 1.0),
        (TrainConfig(), 50, math.exp(50 * math.log1p(-1e-4))),  # 99.5 %
        (TrainConfig(ema=(0.5, 0.9999)), 3, 0.125),  # samples are drawn from the first
        (TrainConfig(ema=0.0), 1, 0.0),
        (TrainConfig(ema_ramp=True), 3, 1 / 10 * 2 / 11 * 3 / 12),
        (TrainConfig(ema=0.15, ema_ramp=True), 3, 1 / 10 * 0.15 * 0.15),
    ],
)
def test_the_share_of_the_initial_weights(config: TrainConfig, steps: int, share: float) -> None:
    assert initial_share(config, steps) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("ramp", [False, True])
def test_the_average_of_the_optimizer_has_that_share(ramp: bool) -> None:
    """Of weights that begin with 1 and are 0 from then on, the average is the share of the beginning."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    config = TrainConfig(ema=0.9, ema_ramp=ramp)
    optimizer = Optimizer(network, config)
    nn.init.zeros_(network.weight)
    for step in range(4):
        network.weight.grad = torch.zeros(1, 1)
        optimizer.step(step, torch.zeros(()))
        assert optimizer.average[0].item() == pytest.approx(initial_share(config, step + 1), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (TrainConfig(), 46_050),  # ln 0.01 / ln 0.9999 = 46,049.4
        (PRESETS["mnist"].train, 459),  # 0.99: 458.2
        (TrainConfig(ema=0.9), 10_000),  # 44 for the average, and twice the warm-up of 5,000
        (TrainConfig(ema=0.9, warmup=10), 44),
        (TrainConfig(ema_ramp=True, warmup=0), 3),
        (TrainConfig(ema=0.0, warmup=0), 1),
    ],
)
def test_the_steps_needed(config: TrainConfig, steps: int) -> None:
    assert steps_needed(config) == steps
    assert too_short(config, steps) is None
    assert too_short(config, steps - 1) is not None


def test_the_reasons_are_told_with_numbers() -> None:
    both = too_short(TrainConfig(), 50)
    assert both == (
        "50 steps are too few to give images: 99.5% of the average that samples are drawn from (--ema 0.9999) are "
        "still random initial weights, and the learning rate warms up for 5,000 steps (--warmup). It takes 46,050 "
        "steps with these options, fewer with a smaller --ema or --ema-ramp and a smaller --warmup"
    )
    average, warmup = too_short(TrainConfig(), 20_000), too_short(TrainConfig(ema=0.9), 9_999)
    assert average is not None and "13.5% of the average" in average and "warms up" not in average
    assert warmup is not None and "9,999 steps" in warmup and "average that" not in warmup and "10,000" in warmup


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_long_enough(name: str) -> None:
    assert too_short(PRESETS[name].train, PRESETS[name].train.steps) is None
