"""The sampler: independence of the batch, labels, guidance, callbacks, errors."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.networks import SMALLEST, Formula, shaken
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.spacing import spread_timesteps
from fastddpm.unet import UNet


def wave(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Something smooth that depends on both."""
    return torch.sin(2 * x_t + 0.01 * t)


# Independence of the batch


def as_bytes(images: Tensor) -> np.ndarray:
    return np.round((images.numpy() + 1) * 127.5).astype(np.int64)


def assert_independent_of_batch(sampler: Sampler, groups: list[list[int]]) -> None:
    """Images of seeds 0..7 sampled in `groups` against all eight at once: equal to a level of 255.

    Convolutions add up in another order for another batch size, so float32 differs by some 1e-6.
    """
    together = as_bytes(sampler.sample(range(8)))
    inside = ((together > 0) & (together < 255)).mean()
    assert inside > 0.3 and np.abs(together - together[0]).max() > 20  # images that could differ
    difference = np.concatenate([np.abs(as_bytes(sampler.sample(group)) - together[group]) for group in groups])
    message = f"{(difference > 0).sum()} of {difference.size} pixels differ, by up to {difference.max()} levels"
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02, message


GROUPS = {
    "one by one": [[seed] for seed in range(8)],
    "by three": [[0, 1, 2], [3, 4, 5], [6, 7]],
    "reversed": [list(range(7, -1, -1))],
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_an_image_does_not_depend_on_its_batch(method: str, groups: str) -> None:
    diffusion = Diffusion(DiffusionConfig(prediction="x0"))  # DDIM of a random eps ends at the clip
    assert_independent_of_batch(Sampler(shaken(UNet(SMALLEST)), diffusion, 25, method), GROUPS[groups])


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch_over_1000_steps() -> None:
    """A batch of three in another order, and one image alone."""
    assert_independent_of_batch(Sampler(shaken(UNet(SMALLEST)), Diffusion()), [[7, 3, 0], [5]])


def test_seed_names_the_image() -> None:
    network = Formula(wave)
    images = Sampler(network, Diffusion(), 10).sample([4, 9, 4])
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    assert torch.equal(images, Sampler(network, Diffusion(), 10).sample([4, 9, 4]))
    assert not torch.equal(images, Sampler(network, Diffusion(), 10, seed=1).sample([4, 9, 4]))


def test_weights_that_change_within_a_trajectory_are_those_of_the_next_images() -> None:
    network = shaken(UNet(SMALLEST))
    sampler = Sampler(network, Diffusion(), 4)
    states = sampler.trajectory([0])
    next(states)
    shaken(network)
    sampler.sample([1])
    list(states)  # the rest of the chain, with the network that it began with
    assert torch.equal(sampler.sample([2]), Sampler(network, Diffusion(), 4).sample([2]))


# Labels, guidance, callbacks, mode


def by_label(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    assert label is not None
    return 0.9 * x_t + 0.02 * label.reshape(-1, 1, 1, 1)


def test_labels_reach_the_network() -> None:
    network = Formula(by_label, num_classes=3, label_dropout=0.1)
    sampler = Sampler(network, Diffusion(), 10)
    given = sampler.sample([5, 6, 7], labels=[2, 0, 1])
    for n, (seed, label) in enumerate(((5, 2), (6, 0), (7, 1))):
        expected = oracle.reverse_chain(
            lambda x, t, label=label: 0.9 * x + 0.02 * label, spread_timesteps(1000, 10), np.array([seed]), 0
        )
        np.testing.assert_allclose(given[n].numpy(), expected[0], atol=1e-4)
    # Without labels an image's class is its seed modulo the classes.
    assert sampler.labels_for([5, 6, 7]) == [2, 0, 1] and sampler.labels_for([5, 6], [0, 0]) == [0, 0]
    assert torch.equal(sampler.sample([5, 6, 7]), given)
    assert Sampler(Formula(wave), Diffusion(), 10).labels_for([5]) is None


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5])
def test_guidance(guidance: float) -> None:
    """Ho and Salimans 2022: unconditional + scale (conditional - unconditional); the null label here is 3."""
    network = Formula(by_label, num_classes=3, label_dropout=0.1)
    ours = Sampler(network, Diffusion(), 10, guidance=guidance).sample([5, 6], labels=[2, 1])
    for n, label in enumerate((2, 1)):
        expected = oracle.reverse_chain(
            lambda x, t, label=label: 0.9 * x + 0.02 * (3 + guidance * (label - 3)), spread_timesteps(1000, 10),
            np.array([5 + n]), 0,
        )  # fmt: skip
        np.testing.assert_allclose(ours[n].numpy(), expected[0], atol=1e-4)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_guidance_leaves_a_learned_variance_alone(variance: str) -> None:
    """Guidance is defined for the prediction; extrapolated, logarithms of variances would leave any range."""

    def both(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        which = label.to(torch.float32).reshape(-1, 1, 1, 1)
        return torch.cat([0.9 * x + 0.02 * which, 0.1 * which - 0.5 + 0 * x], dim=1)

    network = Formula(both, num_classes=3, label_dropout=0.1, learned_variance=True)
    sampler = Sampler(network, Diffusion(DiffusionConfig(variance=variance, loss="vlb")), 10, guidance=3.5)  # type: ignore[arg-type]
    x = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)
    prediction, second = sampler.denoise(x, 500, torch.tensor([2, 1])).chunk(2, dim=1)
    which = np.array([2.0, 1.0]).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(prediction.numpy(), 0.9 * x.numpy() + 0.02 * (3 + 3.5 * (which - 3)), rtol=1e-5)
    np.testing.assert_allclose(second.numpy(), np.broadcast_to(0.1 * which - 0.5, x.shape), rtol=1e-5)


def test_callback_sees_every_state_and_x0_prediction() -> None:
    """The last state is the last prediction, and the images; each prediction is that of the state before."""
    seen: list[tuple[int, int, Tensor, Tensor]] = []
    sampler = Sampler(Formula(wave), Diffusion(), 6)
    images = sampler.sample([1, 2], callback=lambda i, t, x, x0: seen.append((i, t, x.clone(), x0.clone())))
    assert [(i, t) for i, t, _, _ in seen] == list(enumerate(spread_timesteps(1000, 6).tolist()))
    before = oracle.normals((1, 2, 2), np.array([1, 2]), 0, 0, 0)
    bar = np.cumprod(1 - oracle.betas("linear", 1000))
    for _, t, x, x0 in seen:
        expected = np.clip((before - np.sqrt(1 - bar[t]) * np.sin(2 * before + 0.01 * t)) / np.sqrt(bar[t]), -1, 1)
        np.testing.assert_allclose(x0.numpy(), expected, atol=1e-4)
        before = x.double().numpy()
    assert torch.equal(seen[-1][2], seen[-1][3]) and torch.equal(seen[-1][2], images)
    assert torch.equal(images, sampler.sample([1, 2]))


def test_clip_can_be_switched_off() -> None:
    """Then x_0 predictions leave [-1, 1]; the images are still bounded at the end."""
    largest = []
    network = Formula(lambda x, t, label: torch.zeros_like(x))
    sampler = Sampler(network, Diffusion(DiffusionConfig(clip_x0=False)), 3)
    images = sampler.sample([1], callback=lambda i, t, x, x0: largest.append(x0.abs().max().item()))
    assert largest[0] > 10 and images.abs().max() <= 1


def test_network_is_evaluated_in_evaluation_mode_and_left_as_it_was() -> None:
    for training in (True, False):
        network = Formula(wave).train(training)
        Sampler(network, Diffusion(), 3).sample([1])
        assert network.modes == {False} and network.training == training
    failing = Formula(lambda x, t, label: 1 / 0).train()  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        Sampler(failing, Diffusion(), 3).sample([1])
    assert failing.training


def test_learned_variance_drives_the_noise() -> None:
    """A network that says log variance = -40 makes ancestral sampling deterministic but for x_T."""
    config = DiffusionConfig(variance="learned", loss="vlb")
    network = Formula(lambda x, t, label: torch.cat([0.9 * x, torch.full_like(x, -40.0)], 1), learned_variance=True)
    ours = Sampler(network, Diffusion(config), 10).sample([3])
    process, timesteps = oracle.Process.respaced(spread_timesteps(1000, 10)), spread_timesteps(1000, 10)
    x = oracle.normals((1, 2, 2), np.array([3]), 0, 0, 0)
    for i in range(len(timesteps)):
        bar = process.alpha_bar[i]
        x0 = np.clip((x - np.sqrt(1 - bar) * 0.9 * x) / np.sqrt(bar), -1, 1)
        x = process.posterior_mean(np.array([i]), x0, x)
    np.testing.assert_allclose(ours.numpy(), np.clip(x, -1, 1), atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, "method must be one of ancestral, ddim, dpm2m, dpm2m-sde; got 'euler'"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\]; got 1.5"),
        ({"eta": 0.5}, "eta is of method ddim, ancestral has none; got 0.5"),
        ({"eta": -0.1}, r"eta must be in \[0, 1\]; got -0.1"),
        ({"steps": 0}, r"steps must be in 1\.\.1000; got 0"),
        ({"steps": 1001}, r"steps must be in 1\.\.1000; got 1001"),
        ({"timesteps": []}, r"timesteps must be one or more, descending; got \[\]"),
        ({"timesteps": [0, 10]}, r"timesteps must be one or more, descending; got \[0, 10\]"),
        ({"timesteps": [10, 10, 0]}, r"timesteps must be one or more, descending; got \[10, 10, 0\]"),
        ({"timesteps": [1000, 0]}, r"timesteps must be in 0\.\.999; got 1000\.\.0"),
        ({"timesteps": [5, -1]}, r"timesteps must be in 0\.\.999; got 5\.\.-1"),
        ({"steps": 2, "timesteps": [5, 3]}, r"give steps or timesteps, not both; got 2 and \[5, 3\]"),
        ({"guidance": -0.5}, r"guidance must be in 0\.\.1e\+06; got -0.5"),
        ({"guidance": float("nan")}, r"guidance must be in 0\.\.1e\+06; got nan"),
        ({"guidance": 2.0}, "guidance needs a network trained with label_dropout > 0"),
        ({"seed": 2**63}, r"seed must be in -2\^63\.\.2\^63-1; got 9223372036854775808"),
    ],
)
def test_sampler_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampler(Formula(wave), Diffusion(), **options)  # type: ignore[arg-type]


def test_seeds_and_labels_are_not_rounded() -> None:
    sampler = Sampler(Formula(by_label, num_classes=3), Diffusion(), 2)
    for seeds, labels in (([1.5], [0]), ([1], [0.5])):
        with pytest.raises(UsageError, match="must be an integer; got"):
            sampler.sample(seeds, labels)  # type: ignore[arg-type]
    numbers = np.array([2, 1])
    assert torch.equal(sampler.sample(numbers, numbers), sampler.sample([2, 1], [2, 1]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_classes", "seeds", "labels", "message"),
    [
        (0, [], None, "at least one seed is needed"),
        (0, [-1], None, r"image seeds must be in 0\.\.4294967295; got -1"),
        (0, [1], [0], "this network was trained without classes; leave labels out"),
        (3, [1, 2], [0], "one label for each seed: got 1 labels for 2 seeds"),
        (3, [1, 2], [0, 3], r"labels must be in 0\.\.2; got 3"),
        (3, [1], [-1], r"labels must be in 0\.\.2; got -1"),
    ],
)
def test_sample_refuses(num_classes: int, seeds: list[int], labels: list[int] | None, message: str) -> None:
    sampler = Sampler(Formula(by_label if num_classes else wave, num_classes=num_classes), Diffusion(), 2)
    with pytest.raises(UsageError, match=message):
        sampler.sample(seeds, labels)
