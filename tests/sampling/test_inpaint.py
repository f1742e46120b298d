"""Inpainting against the same walk in NumPy and against a Gaussian's known conditionals."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.networks import Formula
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.sampling.images import to_uint8
from fastddpm.sampling.inpainting import cost, inpaint, walk
from fastddpm.sampling.sampler import Sampler

SHAPE = (1, 2, 2)
SEED = 5
LEFT = np.array([[True, False], [True, False]])


def wave(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """An x_0 prediction that depends on both and stays inside [-1, 1], so that every level shows a difference."""
    return 0.9 * torch.sin(2 * x_t + 0.01 * t)


def sampler(formula: Any = wave, steps: int = 6, **options: Any) -> Sampler:
    network = {name: options.pop(name) for name in ("num_classes", "label_dropout") if name in options}
    diffusion = Diffusion(DiffusionConfig(prediction="x0"))
    return Sampler(Formula(formula, **network), diffusion, steps, **({"seed": SEED} | options))


def some_images(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *SHAPE), dtype=np.uint8)


# The walk


@pytest.mark.parametrize(
    ("given", "order"),
    [
        ((4, 10, 10), [0, 1, 2, 3]),  # no stretch is so long
        ((4, 1, 1), [0, 1, 2, 3]),
        ((4, 1, 3), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
        ((5, 2, 2), [0, 1, 0, 1, 2, 3, 2, 3, 4]),
        ((8, 3, 2), [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]),
        ((1, 1, 5), [0]),
    ],
)
def test_walk(given: tuple[int, int, int], order: list[int]) -> None:
    assert walk(*given) == order


def test_the_length_of_the_published_walk() -> None:
    """That of 250 timesteps and jumps of 10: 24 stretches are taken 10 times, the 9 steps before them once."""
    order = walk(250, 10, 10)
    assert len(order) == 24 * 10 * 10 + 9 + 1 and np.bincount(order).tolist() == [1] * 9 + [10] * 240 + [1]


@pytest.mark.parametrize(("jump_length", "resamplings"), [(0, 1), (1, 0), (-1, 2)])
def test_walks_that_cannot_be_are_refused(jump_length: int, resamplings: int) -> None:
    with pytest.raises(UsageError, match="jump length and resamplings must be positive"):
        walk(10, jump_length, resamplings)


# Against NumPy


def repainted(
    images: np.ndarray,
    known: np.ndarray,
    order: list[int],
    timesteps: np.ndarray,
    numbers: list[int],
    eta: float | None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The algorithm of Lugmayr et al. 2022 in float64: (x_0 prediction, state) after every step of `order`."""
    process, last = oracle.Process.respaced(timesteps), len(timesteps) - 1
    bar, x0_known, found, times = process.alpha_bar, images / 127.5 - 1, [], 0

    def noise(step: int, stream: int) -> np.ndarray:
        return oracle.normals(SHAPE, np.array(numbers), SEED, step, stream)

    x = noise(0, 0)
    for place, i in enumerate(order):
        t = int(timesteps[i])
        x0 = 0.9 * np.sin(2 * x + 0.01 * t)
        if eta is None:
            x, sigma = process.posterior_mean(np.full(len(x), i), x0, x), np.sqrt(process.beta[i])
        else:
            sigma = eta * np.sqrt(process.posterior_variance[i])
            prev = process.alpha_bar_prev[i]
            eps = (x - np.sqrt(bar[i]) * x0) / np.sqrt(1 - bar[i])
            x = np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps
        if i == last:
            x = np.where(known, x0_known, x)
        else:
            s = int(timesteps[i + 1])
            x_known = np.sqrt(bar[i + 1]) * x0_known + np.sqrt(1 - bar[i + 1]) * noise(s + 1000 * times, 2)
            x = np.where(known, x_known, x + sigma * noise(t + 1000 * times, 1))
        if place + 1 < len(order) and order[place + 1] != i + 1:
            times += 1
            ratio = bar[order[place + 1]] / bar[i + 1]
            x = np.sqrt(ratio) * x + np.sqrt(1 - ratio) * noise(times, 6)
        found.append((x0, x))
    return found


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_the_published_algorithm(batch: int, eta: float | None) -> None:
    ours = sampler() if eta is None else sampler(method="ddim", eta=eta)
    images = some_images(3)
    found = inpaint(ours, images, LEFT, [3, 1, 8], jump_length=2, resamplings=3, frames=3, batch=batch)
    order = [0, 1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4, 5]
    expected = repainted(images, LEFT, order, ours.timesteps, [3, 1, 8], eta)
    assert np.abs(found.images - (expected[-1][1].clip(-1, 1) + 1) * 127.5).max() < 0.53
    assert found.x0.shape == (3, 3, *SHAPE)
    for k, place in enumerate((0, 6, 13)):
        x0 = np.where(LEFT, images / 127.5 - 1, expected[place][0])
        assert np.abs(found.x0[:, k] - (x0 + 1) * 127.5).max() < 0.53
    assert found.images[..., 1].std() > 30


# Properties


def test_known_pixels_are_the_given_ones() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(64, *SHAPE)
    rng = np.random.default_rng(0)
    known = rng.random((64, 2, 2)) < 0.5
    found = inpaint(sampler(), images, known, range(64), jump_length=1, resamplings=2, frames=2).images
    assert np.array_equal(found[known[:, None]], images[known[:, None]])
    assert (found[~known[:, None]] != images[~known[:, None]]).mean() > 0.9


def test_where_nothing_is_known_it_is_sampling_and_where_all_is_known_nothing_is_drawn() -> None:
    """Bit for bit, with every option, beside images of which a part is known."""
    ours, asked = sampler(), []
    images = some_images(3)
    known = np.stack([np.zeros((2, 2), bool), LEFT, np.ones((2, 2), bool)])
    found = inpaint(ours, images, known, [4, 5, 6], jump_length=2, resamplings=3)
    assert np.array_equal(found.images[:1], to_uint8(ours.sample([4])))
    assert np.array_equal(found.images[2], images[2])
    alone = inpaint(ours, images[1:2], LEFT, [5], jump_length=2, resamplings=3).images
    assert np.array_equal(found.images[1:2], alone)
    nothing = sampler(lambda x, t, label: asked.append(0) or x)
    given = inpaint(nothing, images, np.ones((2, 2), bool), [4, 5, 6], frames=2)
    assert np.array_equal(given.images, images) and not asked
    assert np.array_equal(given.x0, np.stack([images, images], axis=1))


def test_completions_differ_by_seed_and_resampling_but_not_by_batch() -> None:
    ours, images = sampler(), np.repeat(some_images(1), 9, axis=0)
    together = inpaint(ours, images, LEFT, range(9), jump_length=2).images
    apart = [inpaint(ours, images[:1], LEFT, [seed], jump_length=2).images[0] for seed in range(9)]
    assert np.array_equal(together, np.stack(apart))
    assert len({image.tobytes() for image in together}) > 4
    assert not np.array_equal(together, inpaint(ours, images, LEFT, range(9), resamplings=1).images)


def test_labels_and_guidance_reach_the_network() -> None:
    def by_label(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        return 0.3 * torch.sin(x) + 0.1 * label.reshape(-1, 1, 1, 1)

    classes: dict[str, Any] = {"num_classes": 3, "label_dropout": 0.1, "guidance": 2.5}
    ours = sampler(by_label, **classes)
    found = inpaint(ours, some_images(3), LEFT, [1, 2, 3], [0, 2, 3], jump_length=2, resamplings=2, batch=2).images
    for n, label in enumerate((0, 2, 3)):
        guided = 3 + 2.5 * (label - 3)
        fixed = sampler(lambda x, t, _, guided=guided: 0.3 * torch.sin(x) + 0.1 * guided)
        alone = inpaint(fixed, some_images(3)[n : n + 1], LEFT, [n + 1], jump_length=2, resamplings=2).images
        assert np.abs(found[n].astype(int) - alone[0]).max() <= 1
    assert np.array_equal(
        inpaint(ours, some_images(3), LEFT, [1, 2, 3]).images,
        inpaint(ours, some_images(3), LEFT, [1, 2, 3], [1, 2, 0]).images,
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_cost_is_what_the_network_is_asked(guidance: float) -> None:
    asked: list[int] = []
    told: list[int] = []
    ours = sampler(lambda x, t, label: asked.append(len(x)) or x, num_classes=3, label_dropout=0.1, guidance=guidance)
    known = np.stack([np.zeros((2, 2), bool), LEFT, LEFT, np.ones((2, 2), bool)])
    inpaint(ours, some_images(4), known, range(4), jump_length=2, resamplings=3, batch=1, progress=told.append)
    assert sum(asked) == sum(told) == cost(ours, known, 4, 2, 3) == (6 + 2 * 14) * (1 if guidance == 1 else 2)
    assert cost(ours, LEFT, 5, 2, 3) == 5 * 14 * (1 if guidance == 1 else 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": some_images(2)},
            r"images must be uint8 \(3, 1, 2, 2\), one for each seed; got uint8 \(2, 1, 2, 2\)",
        ),
        ({"images": some_images(3) / 255}, "got float64"),
        (
            {"known": LEFT.astype(int)},
            r"known must be bool \(2, 2\) or \(3, 2, 2\), True at known pixels; got int64",
        ),
        ({"known": np.ones((2, 2, 2), bool)}, r"got bool \(2, 2, 2\)"),
        ({"labels": [0, 0, 0]}, "trained without classes"),
        ({"seeds": [1, 2, -1]}, r"image seeds must be in 0\.\.4294967295; got -1"),
        ({"batch": 0}, "batch must be positive; got 0"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    given = {"images": some_images(3), "known": LEFT, "seeds": [1, 2, 3]} | change
    with pytest.raises(UsageError, match=message):
        inpaint(sampler(), **given)


# A Gaussian

MEAN = np.array([0.1, -0.1, 0.05, 0.0])
COVARIANCE = 0.04 * np.array([[1, 0.8, 0.5, 0.3], [0.8, 1, 0.4, 0.2], [0.5, 0.4, 1, 0.6], [0.3, 0.2, 0.6, 1]])
UNKNOWN, KNOWN = [0, 3], [1, 2]


def gaussian_sampler(variance: str) -> Sampler:
    """100 steps with E[x_0 | x_t] of N(MEAN, COVARIANCE), exactly."""
    diffusion = Diffusion(DiffusionConfig(prediction="x0", variance=variance, clip_x0=False))  # type: ignore[arg-type]
    bar = np.cumprod(1 - oracle.betas("linear", 1000))[:, None, None]
    gain = torch.tensor(np.sqrt(bar) * COVARIANCE @ np.linalg.inv(bar * COVARIANCE + (1 - bar) * np.eye(4)))
    scale, mean = torch.tensor(np.sqrt(bar[:, 0])), torch.tensor(MEAN)

    def exact(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        k = int(t[0])
        return (mean + (x.reshape(-1, 4).double() - scale[k] * mean) @ gain[k].T).float().reshape(x.shape)

    return Sampler(Formula(exact), diffusion, 100)


@pytest.fixture(scope="module")
def given_pixels() -> np.ndarray:
    """Two known pixels about two deviations off their means; the others say nothing."""
    return np.array([0, 191, 89, 0], np.uint8).reshape(1, *SHAPE)


def unknown_pixels(given: np.ndarray, variance: str, resamplings: int, num: int = 1000) -> np.ndarray:
    known = np.array([[False, True], [True, False]])
    found = inpaint(
        gaussian_sampler(variance), given.repeat(num, 0), known, range(num),
        jump_length=1, resamplings=resamplings, batch=num,
    )  # fmt: skip
    return found.images.reshape(num, 4)[:, UNKNOWN] / 127.5 - 1


@pytest.mark.slow
def test_resampling_brings_the_conditional_mean_and_variance(given_pixels: np.ndarray) -> None:
    """Of a Gaussian: m_u + S_uk S_kk^-1 (x_k - m_k), and S_uu - S_uk S_kk^-1 S_ku.

    Standard errors are 0.004 and 0.005. Replacing alone gets 0.15 and 0.14 off the means of 0.45 and -0.25, ten times
    through each step 0.03 and 0.04; not conditioned at all it would be 0.35 and 0.25. The deviations of the chain,
    fixedsmall and fixedlarge, are a lower and an upper bound (section 3.2 of the paper), and so are the variances.
    """
    gain = COVARIANCE[np.ix_(UNKNOWN, KNOWN)] @ np.linalg.inv(COVARIANCE[np.ix_(KNOWN, KNOWN)])
    mean = MEAN[UNKNOWN] + gain @ (given_pixels.reshape(4)[KNOWN] / 127.5 - 1 - MEAN[KNOWN])
    variance = np.diag(COVARIANCE[np.ix_(UNKNOWN, UNKNOWN)] - gain @ COVARIANCE[np.ix_(KNOWN, UNKNOWN)])
    assert np.abs(MEAN[UNKNOWN] - mean).min() > 0.2 and (variance < 0.65 * 0.04).all()

    found = {times: unknown_pixels(given_pixels, "fixedsmall", times) for times in (1, 3, 10)}
    errors = {times: np.abs(pixels.mean(0) - mean) for times, pixels in found.items()}
    assert (errors[1] < 0.17).all() and (errors[3] < 0.7 * errors[1]).all() and (errors[10] < 0.06).all()
    assert (errors[10] < 0.35 * errors[1]).all()
    large = unknown_pixels(given_pixels, "fixedlarge", 10).var(0)
    assert (found[10].var(0) < variance).all() and (variance < large).all() and (large < 1.2 * variance).all()
