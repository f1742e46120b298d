"""The gradient of a classifier against its formulas in float64, and a Gaussian whose guided form is known."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.guided_chains import (
    DEVIATION,
    LABELS,
    MEAN,
    METHODS,
    SEEDS,
    SHAPE,
    TILT,
    assert_close,
    expected_chain,
    gaussian,
    limited,
    name_of,
    numpy_softmax_gradient,
    of_class,
    plain,
    plain_network,
    rescaled,
    sampler,
    softmax_gradient,
    tilt,
    uneven,
    uneven_network,
)
from helpers.networks import Formula
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.sampling.inpainting import inpaint
from fastddpm.sampling.trajectories import latents

# The gradient of a classifier


@pytest.mark.parametrize("options", METHODS, ids=name_of)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_classifier_guidance(prediction: Any, options: dict[str, Any]) -> None:
    ours = sampler(plain_network(), DiffusionConfig(prediction=prediction), cond_fn=softmax_gradient, **options)
    images = ours.sample(SEEDS.tolist(), LABELS)
    given: dict[str, Any] = {"prediction": prediction, **options}
    expected = expected_chain(plain, ours.timesteps, gradient=numpy_softmax_gradient, **given)
    assert_close(images, expected)
    assert np.abs(expected - expected_chain(plain, ours.timesteps, **given)).max() > 0.05
    alone = torch.cat([ours.sample([seed], [label]) for seed, label in zip(SEEDS.tolist(), LABELS, strict=True)])
    torch.testing.assert_close(alone, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall", "learned", "learned_range"])
def test_ancestral_steps_move_by_their_own_variance(variance: Any) -> None:
    learned = variance.startswith("learned")
    config = DiffusionConfig(variance=variance, loss="vlb" if learned else "simple")
    second = -0.3 if learned else None
    ours = sampler(plain_network(second, learned_variance=learned), config, cond_fn=softmax_gradient)
    expected = expected_chain(
        plain, ours.timesteps, gradient=numpy_softmax_gradient, variance=variance,
        log_variance=(lambda x, t: -0.3 * x) if learned else None,
    )  # fmt: skip
    assert_close(ours.sample(SEEDS.tolist(), LABELS), expected)


def test_other_methods_leave_a_learned_variance_unread() -> None:
    config = DiffusionConfig(variance="learned_range", loss="vlb")
    ours = sampler(plain_network(-0.3, learned_variance=True), config, method="ddim", cond_fn=softmax_gradient)
    expected = expected_chain(plain, ours.timesteps, gradient=numpy_softmax_gradient, method="ddim")
    assert_close(ours.sample(SEEDS.tolist(), LABELS), expected)


def test_a_network_that_predicts_the_step_before() -> None:
    """Ancestral steps of it do not go through x_0."""
    ours = sampler(
        Formula(lambda x, t, label: 0.95 * x, image_size=4, num_classes=3), DiffusionConfig(prediction="xprev"),
        cond_fn=softmax_gradient, steps=None, timesteps=range(19, -1, -1),
    )  # fmt: skip
    given: dict[str, Any] = {"prediction": "xprev", "gradient": numpy_softmax_gradient}
    expected = expected_chain(lambda x, t: 0.95 * x, ours.timesteps, **given)
    assert_close(ours.sample(SEEDS.tolist(), LABELS), expected)


@pytest.mark.parametrize("options", METHODS, ids=name_of)
def test_all_at_once(options: dict[str, Any]) -> None:
    ours = sampler(
        uneven_network(), guidance=3.0, guidance_interval=(300, 700), guidance_rescale=0.5, dynamic_threshold=0.9,
        cond_fn=softmax_gradient, **options,
    )  # fmt: skip
    inside, outside = rescaled(0.5, 3.0), of_class(lambda t: 1.0, uneven)
    expected = expected_chain(
        lambda x, t: (inside if 300 <= t <= 700 else outside)(x, t), ours.timesteps, limit=limited(0.9),
        gradient=numpy_softmax_gradient, **options,
    )  # fmt: skip
    assert_close(ours.sample(SEEDS.tolist(), LABELS), expected, atol=3e-4)


@pytest.mark.parametrize("options", METHODS[1:], ids=name_of)
def test_a_tilted_gaussian_is_a_gaussian(options: dict[str, Any]) -> None:
    """N(m, s^2) exp(a x_0) is N(m + a s^2, s^2): guided chains of the one are the chains of the other."""
    guided, other = gaussian(MEAN, cond_fn=tilt, **options), gaussian(MEAN + TILT * DEVIATION**2, **options)
    torch.testing.assert_close(guided.sample(range(4)), other.sample(range(4)), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_ancestral_steps_of_a_tilted_gaussian() -> None:
    """To first order in the step: of all 1000 steps, the images of a seed move by a s^2."""
    guided, before = (gaussian(MEAN, steps=1000, cond_fn=fn).sample(range(16)) for fn in (tilt, None))
    inside = (guided.abs() < 1) & (before.abs() < 1)
    moved = (guided - before)[inside]
    assert inside.float().mean() > 0.9 and (moved - TILT * DEVIATION**2).abs().max() < 0.01


def test_a_classifier_of_a_network_without_classes() -> None:
    """Labels are then the classifier's alone, and may be left out."""
    ours = sampler(plain_network(num_classes=0), cond_fn=softmax_gradient)
    expected = expected_chain(plain, ours.timesteps, gradient=numpy_softmax_gradient)
    assert_close(ours.sample(SEEDS.tolist(), LABELS), expected)
    without = sampler(plain_network(num_classes=0), cond_fn=lambda x, t, label: 0 * x if label is None else x)
    plainly = sampler(plain_network(num_classes=0)).sample([5])
    for labels in (None, [7], None):  # in turn, also where a chain was kept
        assert torch.equal(without.sample([5], labels), plainly) == (labels is None)


def test_the_classifier_gets_copies_in_any_mode() -> None:
    def careless(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        gradient = softmax_gradient(x, t, label)
        x.detach().zero_()
        t.zero_()
        label.zero_()
        return gradient

    ours, other = (sampler(plain_network(), method="ddim", cond_fn=fn) for fn in (careless, softmax_gradient))
    expected = other.sample(SEEDS.tolist(), LABELS)
    assert torch.equal(ours.sample(SEEDS.tolist(), LABELS), expected) and not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(other.sample(SEEDS.tolist(), LABELS), expected)
        latents(other, SEEDS.tolist(), LABELS, [2])
    with torch.autocast("cpu"):
        assert torch.equal(other.sample(SEEDS.tolist(), LABELS), expected)


def test_inpainting_is_guided() -> None:
    """Where nothing is known it is `sample`; known pixels stay."""
    ours = sampler(plain_network(), cond_fn=softmax_gradient, dynamic_threshold=0.9)
    images, known = np.full((2, *SHAPE), 99, np.uint8), np.zeros((4, 4), bool)
    free = inpaint(ours, images, known, SEEDS.tolist(), LABELS).images
    drawn = (ours.sample(SEEDS.tolist(), LABELS).numpy() + 1) * 127.5
    assert np.abs(free - drawn).max() <= 0.51
    known[:2] = True
    half = inpaint(ours, images, known, SEEDS.tolist(), LABELS, jump_length=2, resamplings=2).images
    assert (half[:, :, :2] == 99).all() and (half[:, :, 2:] != 99).any()
