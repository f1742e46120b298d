"""The arrays behind the pictures, against chains, latents and mixtures computed a second time in NumPy, float64."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.networks import Formula
from torch import Tensor

from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.evaluation.figures.chains import (
    class_grid,
    forward_trajectory,
    interpolate,
    progressive,
    reverse_trajectory,
    shared_latents,
)
from fastddpm.sampling import trajectories
from fastddpm.sampling.chain import StartState
from fastddpm.sampling.sampler import Sampler

SHAPE = (1, 2, 2)
STEPS = 8
SEED = -3


def sampler(**options: Any) -> Sampler:
    network = Formula(lambda x, t, label: torch.sin(2 * x + 0.01 * t))
    return Sampler(network, Diffusion(), **({"steps": STEPS, "seed": SEED} | options))


def labelled_sampler(**options: Any) -> Sampler:
    def formula(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        return 0.9 * x + 0.1 * label.reshape(-1, 1, 1, 1)

    return Sampler(Formula(formula, num_classes=3, label_dropout=0.1), Diffusion(), **({"steps": STEPS} | options))


def wave(x: np.ndarray, t: int) -> np.ndarray:
    return np.sin(2 * x + 0.01 * t)


def chain(
    x: np.ndarray, first: int, timesteps: np.ndarray, numbers: Sequence[int], network: Callable = wave
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Algorithm 2 from the state x before step `first`: (x_0 prediction, next state) of every step."""
    process = oracle.Process.respaced(timesteps)
    found = []
    for i in range(first, len(timesteps)):
        bar, t = process.alpha_bar[i], int(timesteps[i])
        x0 = np.clip((x - np.sqrt(1 - bar) * network(x, t)) / np.sqrt(bar), -1, 1)
        x = process.posterior_mean(np.full(len(x), i), x0, x)
        if i < len(timesteps) - 1:
            x = x + np.sqrt(process.beta[i]) * oracle.normals(SHAPE, np.array(numbers), SEED, t, stream=1)
        found.append((x0, x))
    return found


def beginning(numbers: Sequence[int]) -> np.ndarray:
    return oracle.normals(SHAPE, np.array(numbers), SEED, step=0, stream=0)


def assert_images(ours: np.ndarray, expected: np.ndarray) -> None:
    """uint8 against floats in [-1, 1]: half a level, and what float32 adds to it."""
    assert ours.dtype == np.uint8 and ours.shape == expected.shape
    inside = (ours > 0) & (ours < 255)
    assert inside.mean() > 0.2, "images of extremes alone show little"
    difference = np.abs(ours - (np.clip(expected, -1, 1) + 1) * 127.5)
    assert difference.max() < 0.52


# Where a chain is


@pytest.mark.parametrize("steps", [1000, 8])
def test_depths_and_steps(steps: int) -> None:
    ours = sampler(steps=steps)
    assert trajectories.step_at(ours, 1000) == 0 and trajectories.step_at(ours, 1) == steps - 1
    for depth in (1, 130, 500, 999):
        step = trajectories.step_at(ours, depth)
        away = [abs(t - (depth - 1)) for t in ours.timesteps.tolist()]
        assert away[step] == min(away) and trajectories.depth_of(ours, step) == ours.timesteps[step] + 1
    assert trajectories.depth_of(ours, steps) == 0
    for depth in (0, 1001):
        with pytest.raises(UsageError, match=rf"a depth counts steps of the forward process, 1..1000; got {depth}"):
            trajectories.step_at(ours, depth)


def test_evenly() -> None:
    assert trajectories.evenly(3, 7) == [0, 4, 7] and trajectories.evenly(1, 7) == [0]
    assert trajectories.evenly(100, 3) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="at least one step must be shown; got 0"):
        trajectories.evenly(0, 7)


def test_relatives_are_strangers() -> None:
    """Image numbers of other noise: none meets a small seed, nor another's relative."""
    numbers = [trajectories.relative(seed, k) for seed in range(2000) for k in range(1, 6)]
    assert len(set(numbers)) == len(numbers) and min(numbers) > 2000 and max(numbers) < 2**32
    assert trajectories.relative(7, 0) == 7


def test_latents_are_the_states_of_the_chain() -> None:
    kept = trajectories.latents(sampler(), [3, 5, 4], None, [0, 3, STEPS], batch=2)
    expected = chain(beginning([3, 5, 4]), 0, sampler().timesteps, [3, 5, 4])
    for ours, state in zip(kept, (beginning([3, 5, 4]), expected[2][1], expected[-1][1]), strict=True):
        np.testing.assert_allclose(ours.numpy(), state, atol=2e-5)
    assert torch.equal(kept[2].clamp(-1, 1), sampler().sample([3, 5, 4]))


# Figure 6


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_progressive(batch: int) -> None:
    found = progressive(sampler(), [3, 5, 4], steps=[0, 4, 7], batch=batch)
    expected = chain(beginning([3, 5, 4]), 0, sampler().timesteps, [3, 5, 4])
    assert_images(found.x0, np.stack([expected[i][0] for i in (0, 4, 7)], axis=1))
    assert found.depths.tolist() == [sampler().timesteps[i] + 1 for i in (0, 4, 7)]


def test_progressive_shows_ten_steps_unless_told() -> None:
    found = progressive(sampler(steps=19), [1])
    assert found.depths.tolist() == (sampler(steps=19).timesteps[::2] + 1).tolist()
    with pytest.raises(UsageError, match=r"watch must name steps in 0\.\.7; got 8"):
        progressive(sampler(), [1], steps=[8])


# Figure 7


@pytest.mark.parametrize("batch", [2, 64])
def test_shared_latents(batch: int) -> None:
    """The prefix is the chain's own, bit for bit; each continuation goes on from it with noise of its own."""
    ours, seeds = sampler(), [3, 5]
    found = shared_latents(ours, seeds, [1000, 600, 10], continuations=2, batch=batch)
    steps = [trajectories.step_at(ours, depth) for depth in (1000, 600, 10)]
    assert found.depths.tolist() == [1000, int(ours.timesteps[steps[1]]) + 1, int(ours.timesteps[steps[2]]) + 1]
    states = [state.x.clone() for state in ours.trajectory(seeds)]
    for i, step in enumerate(steps):
        if step:
            assert np.array_equal(found.latents[:, i], states[step - 1].numpy())
        for n, seed in enumerate(seeds):
            for k in range(2):
                number = [(seed + (k + 1) * 2654435769) % 2**32]
                end = chain(found.latents[n : n + 1, i].astype(float), step, ours.timesteps, number)[-1][1]
                assert np.abs(found.images[n, i, k] - (np.clip(end[0], -1, 1) + 1) * 127.5).max() < 0.52
    np.testing.assert_allclose(found.latents[:, 0], beginning(seeds), atol=1e-6)
    spread = np.abs(found.images[:, :, 0].astype(int) - found.images[:, :, 1]).mean(axis=(0, 2, 3, 4))
    assert spread[1] > 20  # they do differ


def test_the_same_noise_would_give_the_same_image() -> None:
    ours = sampler()
    kept = trajectories.latents(ours, [3, 5], None, [4])[0]
    assert np.array_equal(
        trajectories.draw(ours, [3, 5], start=StartState(kept, 4), batch=1), trajectories.draw(ours, [3, 5])
    )


def test_shared_latents_refuses() -> None:
    with pytest.raises(UsageError, match="need a depth and a continuation or more; got 0 and 3"):
        shared_latents(sampler(), [1], [])
    with pytest.raises(UsageError, match="need a depth and a continuation or more; got 1 and 0"):
        shared_latents(sampler(), [1], [10], 0)
    with pytest.raises(UsageError, match=r"1\.\.1000; got 0"):
        shared_latents(sampler(), [1], [0])


# Figures 8 and 9


def some_pairs(num: int = 3) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (num, 2, *SHAPE), dtype=np.uint8)


@pytest.mark.parametrize("one_noise", [False, True])
@pytest.mark.parametrize("batch", [4, 64])
def test_interpolation(batch: int, one_noise: bool) -> None:
    """q-sampled at t, mixed, and denoised from t on, t included; the noise does not know lambda."""
    ours, seeds, lambdas = sampler(), [7, 8, 2], [0, 0.3, 1]
    found = interpolate(ours, some_pairs(), [1000, 400], lambdas, seeds, one_noise=one_noise, batch=batch)
    bar = np.cumprod(1 - oracle.betas("linear", 1000))
    x0 = some_pairs() / 127.5 - 1
    others = seeds if one_noise else [seed + 2654435769 for seed in seeds]
    eps = [oracle.normals(SHAPE, np.array(numbers), SEED, step=0, stream=2) for numbers in (seeds, others)]
    for i, depth in enumerate(found.depths):
        step = ours.timesteps.tolist().index(depth - 1)
        first, second = (np.sqrt(bar[depth - 1]) * x0[:, k] + np.sqrt(1 - bar[depth - 1]) * eps[k] for k in (0, 1))
        ends = [chain((1 - a) * first + a * second, step, ours.timesteps, seeds)[-1][1] for a in lambdas]
        assert_images(found.images[:, i], np.stack(ends, axis=1))
    assert found.depths[0] == 1000 and abs(found.depths[1] - 400) < 75 and found.lambdas.tolist() == lambdas


def test_interpolation_of_depth_0_mixes_pixels() -> None:
    pairs = some_pairs()
    found = interpolate(sampler(), pairs, [0], [0, 0.25, 1], [1, 2, 3])
    assert found.depths.tolist() == [0]
    assert np.array_equal(found.images[:, 0, 0], pairs[:, 0]) and np.array_equal(found.images[:, 0, 2], pairs[:, 1])
    exact = 0.75 * pairs[:, 0].astype(float) + 0.25 * pairs[:, 1]
    assert np.abs(found.images[:, 0, 1] - exact).max() <= 0.5 + 1e-3


def test_an_end_does_not_know_the_other() -> None:
    pairs = some_pairs(2)
    pairs[1, 0], pairs[1, 1] = pairs[0, 0], 0
    found = interpolate(sampler(), pairs, [500], [0, 1], [4, 4]).images[:, 0]
    assert np.array_equal(found[0, 0], found[1, 0]) and not np.array_equal(found[0, 1], found[1, 1])


def test_interpolation_takes_a_label_for_each_pair() -> None:
    ours = labelled_sampler(guidance=2.0)
    found = interpolate(ours, some_pairs(2), [300], [0, 0.5], [1, 2], [2, 0]).images
    apart = [
        interpolate(ours, some_pairs(2)[n : n + 1], [300], [0.5], [n + 1], [label]) for n, label in ((0, 2), (1, 0))
    ]
    for n, alone in enumerate(apart):
        assert np.array_equal(found[n, 0, 1], alone.images[0, 0, 0])
    assert not np.array_equal(found, interpolate(ours, some_pairs(2), [300], [0, 0.5], [1, 2], [1, 1]).images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": some_pairs()[:2]}, r"pairs must be uint8 \(3, 2, 1, 2, 2\), one per seed; got uint8 \(2, 2,"),
        ({"pairs": some_pairs().astype(float)}, r"got float64 \(3, 2, 1, 2, 2\)"),
        ({"lambdas": [0.5, 1.5]}, r"lambdas must be in \[0, 1\]; got 0.5, 1.5"),
        ({"depths": [1001]}, r"1\.\.1000; got 1001"),
        ({"depths": [-1]}, r"1\.\.1000; got -1"),
    ],
)
def test_interpolation_refuses(change: dict[str, Any], message: str) -> None:
    given = {"pairs": some_pairs(), "depths": [10], "lambdas": [0.5], "seeds": [1, 2, 3]} | change
    with pytest.raises(UsageError, match=message):
        interpolate(sampler(), **given)


# Strips


def test_forward_strip() -> None:
    """One noise for all t: a path, and the right distribution at each t."""
    ours, images = sampler(), some_pairs()[:, 0]
    found = forward_trajectory(ours, images, [8, 6, 0], [5, 6, 9])
    bar = np.cumprod(1 - oracle.betas("linear", 1000))
    eps = oracle.normals(SHAPE, np.array([5, 6, 9]), SEED, step=0, stream=2)
    x0 = images / 127.5 - 1
    expected = [x0] + [np.sqrt(bar[d - 1]) * x0 + np.sqrt(1 - bar[d - 1]) * eps for d in found.depths[1:]]
    np.testing.assert_allclose(found.x, np.stack(expected, axis=1), atol=2e-6)
    assert found.depths.tolist() == [0, int(ours.timesteps[6]) + 1, 1000]


def test_reverse_strip() -> None:
    ours = sampler()
    found = reverse_trajectory(ours, [3, 5], [0, 5, 8], batch=1)
    states = chain(beginning([3, 5]), 0, ours.timesteps, [3, 5])
    np.testing.assert_allclose(found.x, np.stack([beginning([3, 5]), states[4][1], states[-1][1]], axis=1), atol=2e-5)
    assert found.depths.tolist() == [1000, int(ours.timesteps[5]) + 1, 0]


# Classes


def test_class_grid() -> None:
    """Every cell is what the sampler draws of that class, from that seed, at that scale (Ho and Salimans 2022)."""
    found = class_grid(labelled_sampler(), [5, 9], [1.0, 3.0], batch=4)
    assert found.shape == (2, 3, 2, *SHAPE)
    for i, scale in enumerate((1.0, 3.0)):
        for label in range(3):
            end = oracle.reverse_chain(
                lambda x, t, label=label, scale=scale: 0.9 * x + 0.1 * (3 + scale * (label - 3)),
                labelled_sampler().timesteps, np.array([5, 9]), 0,
            )  # fmt: skip
            assert np.abs(found[i, label] - (end + 1) * 127.5).max() < 0.52


def test_class_grid_takes_the_scale_of_the_sampler_by_itself() -> None:
    assert np.array_equal(class_grid(labelled_sampler(guidance=3.0), [5]), class_grid(labelled_sampler(), [5], [3.0]))


def test_class_grid_refuses() -> None:
    with pytest.raises(UsageError, match="trained without classes: there is no grid of classes to draw"):
        class_grid(sampler(), [1])
    never = Formula(lambda x, t, label: x, num_classes=3)
    with pytest.raises(UsageError, match="guidance needs a network trained with label_dropout > 0"):
        class_grid(Sampler(never, Diffusion(), 2), [1], [1.0, 2.0])


# Progress


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_progress_adds_up_to_what_the_network_is_asked(guidance: float) -> None:
    ours, told, asked = labelled_sampler(guidance=guidance), [], []
    inner = ours.network.formula
    ours.network.formula = lambda x, *rest: asked.append(len(x)) or inner(x, *rest)
    progressive(ours, [1, 2, 3], batch=2, progress=told.append)
    shared_latents(ours, [1, 2, 3], [700, 20], batch=2, progress=told.append)
    interpolate(ours, some_pairs(), [0, 500], [0.5, 1], [1, 2, 3], batch=4, progress=told.append)
    assert sum(told) == sum(asked)
