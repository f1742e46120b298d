"""Guidance against its formulas in float64: interval, rescaling, dynamic thresholding; settings and refusals."""

import functools
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.guided_chains import (
    CLASSES,
    LABELS,
    METHODS,
    SEEDS,
    SHAPE,
    STEPS,
    assert_close,
    by_label,
    expected_chain,
    limited,
    name_of,
    of_class,
    plain_network,
    rescaled,
    sampler,
    softmax_gradient,
    tilt,
    uneven,
    uneven_network,
)
from helpers.networks import Formula
from helpers.own_networks import MLP
from torch import Tensor

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.runtime.checks import guidance_problems
from fastddpm.sampling import chain as chains
from fastddpm.sampling.guidance import thresholded
from fastddpm.sampling.inpainting import cost, inpaint
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.trajectories import evaluations, latents
from fastddpm.storage.documents import from_dict, to_dict

# An interval of timesteps


def counted(asked: list[int], **options: Any) -> Formula:
    def formula(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        asked.append(len(x))
        return by_label(x, t, label.reshape(-1, 1, 1, 1))

    return Formula(formula, image_size=4, **CLASSES, **options)


@pytest.mark.parametrize("options", METHODS, ids=name_of)
def test_an_interval(options: dict[str, Any]) -> None:
    """Timesteps 999, 888, .., 0: 333, 444 and 555 are inside, ends included, and are evaluated twice."""
    asked: list[int] = []
    ours = sampler(counted(asked), guidance=4.0, guidance_interval=(333, 600), **options)
    inside = [t for t in ours.timesteps.tolist() if 333 <= t <= 600]
    assert inside == [555, 444, 333]
    images = ours.sample(SEEDS.tolist(), LABELS)
    assert asked == 4 * [2] + 3 * [4] + 3 * [2]
    assert sum(asked) == evaluations(ours, 2, range(STEPS)) == 26
    assert evaluations(ours, 5, [0, 4, 4, 9]) == 5 * 6
    assert_close(images, expected_chain(of_class(lambda t: 4.0 if t in inside else 1.0), ours.timesteps, **options))
    assert torch.equal(ours.sample(SEEDS.tolist(), LABELS), images)  # in the chain that was kept


def test_an_interval_of_everything_and_of_nothing() -> None:
    full, plain = (sampler(counted([]), guidance=scale) for scale in (4.0, 1.0))
    everything = sampler(counted([]), guidance=4.0, guidance_interval=(0, 999))
    nothing = sampler(counted([]), guidance=4.0, guidance_interval=(1, 2))
    assert torch.equal(everything.sample([1]), full.sample([1])) and torch.equal(nothing.sample([1]), plain.sample([1]))
    assert not torch.equal(full.sample([1]), plain.sample([1]))


def test_every_way_through_a_chain_knows_its_row() -> None:
    """From a given state, watched, by the batch, and when steps are repeated."""
    asked: list[int] = []
    ours = sampler(counted(asked), guidance=4.0, guidance_interval=(333, 600))
    images = ours.sample(SEEDS.tolist(), LABELS)
    state = latents(ours, SEEDS.tolist(), LABELS, [5])[0]
    asked.clear()
    again = ours.sample(SEEDS.tolist(), LABELS, start=chains.StartState(state, 5), callback=lambda *_: None)
    assert torch.equal(again, images) and asked == [4, 4, 2, 2, 2]
    asked.clear()
    half, told = np.zeros((4, 4), bool), []
    half[:2] = True
    inpaint(
        ours, np.full((2, *SHAPE), 99, np.uint8), half, SEEDS.tolist(), LABELS, jump_length=2, resamplings=3,
        progress=told.append,
    )  # fmt: skip
    assert sum(asked) == sum(told) == cost(ours, half, 2, 2, 3) == 2 * (26 + 9)


def test_one_graph_with_guidance_and_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each captured when it is first needed; the host chooses by the row."""
    ours = sampler(counted([]), guidance=4.0, guidance_interval=(333, 600), method="dpm2m")
    expected, replays = ours.sample(SEEDS.tolist(), LABELS), []

    def capture(step: chains.Replay, restore: chains.Replay, device: torch.device) -> chains.Replay:
        for _ in range(3):
            step()
            restore()
        number = len(replays)
        replays.append(0)

        def replay() -> None:
            replays[number] += 1
            step()

        return replay

    monkeypatch.setattr(chains, "capture", capture)
    with ours.chain(SEEDS.tolist(), LABELS) as chain, torch.no_grad():
        chain._graph = True
        chain._steps.clear()
        for i in range(STEPS):
            chain.advance(keep_x0=i == 5)
        assert torch.equal(chain.x.clamp(-1, 1), expected)
    assert replays == [7, 3]


def test_denoise_and_probe_know_the_interval() -> None:
    asked: list[int] = []
    ours = sampler(counted(asked), guidance=4.0, guidance_interval=(333, 600))
    x, label = torch.ones(3, *SHAPE), torch.tensor([2, 2, 2])
    for t, value in ((332, 0.94), (333, 0.9 + 0.02 * (3 - 4)), (600, 0.88), (601, 0.94)):
        torch.testing.assert_close(ours.denoise(x, t, label), torch.full_like(x, value))
    mixed = ours.denoise(x, torch.tensor([332, 500, 601]), label)
    torch.testing.assert_close(mixed[:, 0, 0, 0], torch.tensor([0.94, 0.88, 0.94]))
    asked.clear()
    ours.probe(x)  # what memory and time are estimated from: a costly step
    assert asked == [6]


# Rescaling


@pytest.mark.parametrize("options", [METHODS[0], METHODS[1], METHODS[3]], ids=name_of)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_rescaling(prediction: Any, options: dict[str, Any]) -> None:
    ours = sampler(
        uneven_network(), DiffusionConfig(prediction=prediction), guidance=3.0, guidance_rescale=0.7, **options
    )
    images = ours.sample(SEEDS.tolist(), LABELS)
    assert_close(images, expected_chain(rescaled(0.7, 3.0), ours.timesteps, prediction=prediction, **options))


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_rescaling_of_a_prediction(phi: float) -> None:
    ours = sampler(uneven_network(), guidance=3.0, guidance_rescale=phi)
    x = np.random.default_rng(0).standard_normal((2, *SHAPE))
    given = ours.denoise(torch.tensor(x, dtype=torch.float32), 300, torch.tensor(LABELS)).double().numpy()
    np.testing.assert_allclose(given, rescaled(phi, 3.0)(x, 300), rtol=0, atol=2e-6)
    if phi == 1:
        deviation = uneven(x, 300, np.array(LABELS).reshape(-1, 1, 1, 1)).std((1, 2, 3))
        np.testing.assert_allclose(given.std((1, 2, 3)), deviation, rtol=1e-6)


def test_rescaling_leaves_a_learned_variance_and_a_constant_alone() -> None:
    config = DiffusionConfig(variance="learned", loss="vlb")
    ours = sampler(uneven_network(learned_variance=True), config, guidance=3.0, guidance_rescale=0.7)
    out = ours.denoise(torch.randn(2, *SHAPE), 300, torch.tensor(LABELS))
    assert torch.equal(out[:, 1:], torch.full((2, *SHAPE), -0.25))
    constant = Formula(lambda x, t, label: 0 * x, image_size=4, **CLASSES)
    flat = sampler(constant, guidance=3.0, guidance_rescale=1.0)
    assert torch.equal(flat.denoise(torch.randn(2, *SHAPE), 300, torch.tensor(LABELS)), torch.zeros(2, *SHAPE))


# Dynamic thresholding


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.9, 0.995, 0.999999])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (3, 4, 5), (3, 32, 32)])
def test_the_threshold(shape: tuple[int, int, int], fraction: float) -> None:
    rng = np.random.default_rng(0)
    x0 = (rng.standard_normal((3, *shape)) * np.array([0.2, 1.0, 20.0]).reshape(-1, 1, 1, 1)).astype(np.float32)
    ours = thresholded(torch.tensor(x0), fraction)
    np.testing.assert_allclose(ours.numpy(), limited(fraction)(x0.astype(np.float64)), rtol=1e-6, atol=1e-7)
    assert ours.abs().max() <= 1


@pytest.mark.parametrize("options", METHODS, ids=name_of)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_dynamic_thresholding(prediction: Any, options: dict[str, Any]) -> None:
    """In place of the clip; with predictions that drive x_0 far out, in a chain that ends where that shows."""
    factor = {"eps": 1.0, "x0": 3.0, "v": -3.0}[prediction]
    ours = sampler(
        uneven_network(factor), DiffusionConfig(prediction=prediction), guidance=6.0, dynamic_threshold=0.8, steps=None,
        timesteps=range(999, 200, -80), **options,
    )  # fmt: skip
    images = ours.sample(SEEDS.tolist(), LABELS)
    out = of_class(lambda t: 6.0, lambda x, t, label: factor * uneven(x, t, label))
    assert_close(
        images, expected_chain(out, ours.timesteps, prediction=prediction, limit=limited(0.8), **options), atol=3e-4
    )
    other = expected_chain(out, ours.timesteps, prediction=prediction, **options)
    assert np.abs(images.numpy() - other).max() > 0.05


def test_a_threshold_beside_a_learned_variance_and_without_the_clip() -> None:
    for clip in (True, False):
        config = DiffusionConfig(variance="learned_range", loss="vlb", clip_x0=clip)
        network = uneven_network(learned_variance=True)
        ours = sampler(network, config, guidance=6.0, dynamic_threshold=0.8)
        expected = expected_chain(
            of_class(lambda t: 6.0, uneven), ours.timesteps, limit=limited(0.8), variance="learned_range",
            log_variance=lambda x, t: np.full_like(x, -0.25),
        )  # fmt: skip
        assert_close(ours.sample(SEEDS.tolist(), LABELS), expected)


# What a sampler says of itself


def test_settings() -> None:
    """Files that were begun before there was any of this can be continued; and what changes an image is named."""
    ours = sampler(counted([]), guidance=2.0)
    before = [
        "network", "timesteps", "diffusion", "method", "coefficients", "steps", "guidance", "noise_seed", "precision",
        "fp8", "device",
    ]  # fmt: skip
    assert list(ours.settings()) == before
    same = sampler(
        ours.network, guidance=2.0, guidance_interval=None, guidance_rescale=0, dynamic_threshold=None, cond_fn=None
    )
    assert same.settings() == ours.settings()
    unread = sampler(ours.network, guidance_interval=(1, 2), guidance_rescale=0.5)
    assert unread.settings() == sampler(ours.network).settings()  # they are of a guidance that there is not
    options: dict[str, Any] = {
        "guidance_interval": (np.int64(5), 700), "guidance_rescale": 0.5, "dynamic_threshold": 0.99,
        "cond_fn": softmax_gradient,
    }  # fmt: skip
    said = json.loads(json.dumps(sampler(ours.network, guidance=2.0, **options).settings()))
    assert {name: said.pop(name) for name in options} == {
        "guidance_interval": [5, 700], "guidance_rescale": 0.5, "dynamic_threshold": 0.99,
        "cond_fn": "helpers.guided_chains.softmax_gradient",
    }  # fmt: skip
    assert said == ours.settings()


def test_a_classifier_that_is_an_object_is_named_by_its_class_also_in_a_partial() -> None:
    class Classifier:
        def __call__(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            return x

    for cond_fn in (Classifier(), functools.partial(Classifier(), label=None)):
        assert sampler(plain_network(), cond_fn=cond_fn).settings()["cond_fn"].endswith("<locals>.Classifier")


def test_copies_are_guided_alike() -> None:
    options: dict[str, Any] = {
        "guidance_interval": (300, 700), "guidance_rescale": 0.5, "dynamic_threshold": 0.9, "cond_fn": softmax_gradient,
    }  # fmt: skip
    ours, other = (sampler(uneven_network(), guidance=scale, **options) for scale in (2.0, 3.0))
    assert ours.guided(3.0).guide == other.guide and ours.guided(3.0).settings() == other.settings()
    trained = ours.unguided()
    assert trained.guide == sampler(uneven_network()).guide and trained.settings()["guidance"] == 1


def test_a_sampler_with_a_classifier_is_pickled() -> None:
    ours = Sampler(MLP(16), Diffusion(), 3, shape=SHAPE, cond_fn=tilt)
    ours.sample([1])
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again.sample([1]), ours.sample([1])) and again.settings() == ours.settings()


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_interval": (5, 3)}, r"guidance_interval must be two timesteps, 0 <= low <= high; got \(5, 3\)"),
        ({"guidance_interval": (-1, 3)}, r"two timesteps, 0 <= low <= high; got \(-1, 3\)"),
        ({"guidance_interval": (1, 2, 3)}, r"two timesteps, 0 <= low <= high; got \(1, 2, 3\)"),
        ({"guidance_interval": (0.5, 3)}, r"two timesteps, 0 <= low <= high; got \(0\.5, 3\)"),
        ({"guidance_interval": "ab"}, "two timesteps, 0 <= low <= high; got 'ab'"),
        ({"guidance_interval": (0, 1000)}, r"guidance_interval must be within timesteps 0\.\.999; got \(0, 1000\)"),
        ({"guidance_rescale": 1.1}, r"guidance_rescale must be in \[0, 1\]; got 1\.1"),
        ({"guidance_rescale": float("nan")}, r"guidance_rescale must be in \[0, 1\]; got nan"),
        ({"guidance_rescale": "1"}, r"guidance_rescale must be in \[0, 1\]; got '1'"),
        ({"dynamic_threshold": 0.0}, r"dynamic_threshold must be in \(0, 1\); got 0\.0"),
        ({"dynamic_threshold": 1.0}, r"dynamic_threshold must be in \(0, 1\); got 1\.0"),
        ({"dynamic_threshold": 99.5}, r"dynamic_threshold must be in \(0, 1\); got 99\.5"),
        ({"guidance_rescale": -1, "dynamic_threshold": 2}, r"(?s)2 options .*guidance_rescale.*dynamic_threshold"),
        ({"cond_fn": 3}, r"cond_fn must be a function of \(x, t, label\); got 3"),
    ],
)
def test_a_sampler_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler(counted([]), guidance=2.0, **options)
    if "cond_fn" not in options:
        with pytest.raises(UsageError, match=message):
            Preset("x", sample=SampleConfig(**options))


def test_a_prediction_of_the_step_before_is_refused_where_it_makes_no_sense() -> None:
    config, network = DiffusionConfig(prediction="xprev"), counted([])
    with pytest.raises(UsageError, match="guidance_rescale is for networks that predict eps, x0 or v; this one"):
        sampler(network, config, guidance=2.0, guidance_rescale=0.5)
    with pytest.raises(UsageError, match="which ancestral steps do not use if the network predicts xprev; take"):
        sampler(network, config, dynamic_threshold=0.9)
    with pytest.raises(UsageError, match="which ancestral steps do not use"):
        Preset("x", diffusion=config, sample=SampleConfig(dynamic_threshold=0.9))
    sampler(network, config, method="ddim", dynamic_threshold=0.9)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: x / 0, r"cond_fn returned NaN or infinity at t = "),
        (lambda x: None, r"cond_fn must return a tensor \(1, 1, 4, 4\); got a NoneType"),
        (lambda x: x.sum(), r"floating \(1, 1, 4, 4\) on cpu; got torch.float32 \(\) on cpu"),
        (lambda x: x.long(), r"floating \(1, 1, 4, 4\) on cpu; got torch.int64"),
    ],
)
def test_what_is_no_gradient_is_refused(result: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler(plain_network(), cond_fn=lambda x, t, label: result(x)).sample([1])


def test_a_timestep_without_signal_is_refused_where_it_divides() -> None:
    config = DiffusionConfig(timesteps=50, schedule="jsd", prediction="v")
    for options in METHODS[1:]:
        with pytest.raises(UsageError, match=r"divides by sqrt\(alpha_bar\), which is 0 at timestep 49; begin at"):
            sampler(plain_network(), config, cond_fn=softmax_gradient, **options)
    for steps in (None, [48, 20, 3]):
        method = "ancestral" if steps is None else "dpm2m"
        ours = sampler(plain_network(), config, steps=None, method=method, timesteps=steps, cond_fn=softmax_gradient)
        assert ours.sample([1, 2]).isfinite().all()


# Configurations


def test_configurations_of_before_are_read() -> None:
    old = {"method": "ddim", "steps": 50, "spacing": "even", "eta": 0.0, "guidance": 2.0, "count": 36}
    assert from_dict(SampleConfig, old) == SampleConfig("ddim", 50, guidance=2.0, count=36)
    new = SampleConfig(guidance_interval=(5, 700), guidance_rescale=0.5, dynamic_threshold=0.995)
    back = from_dict(SampleConfig, json.loads(json.dumps(to_dict(new))))
    assert back == new and type(back.guidance_interval) is tuple


def test_all_problems_are_named_at_once() -> None:
    problems = list(guidance_problems((3,), 2, 2, timesteps=10, prediction="xprev", method="ancestral"))
    assert len(problems) == 5 == len({problem.split()[0] + problem[-9:] for problem in problems})
    unet = UNetConfig(num_classes=3, label_dropout=0.1)
    with pytest.raises(UsageError, match=r"within timesteps 0\.\.9; got \(0, 10\)"):
        Preset("x", unet, DiffusionConfig(timesteps=10), sample=SampleConfig(guidance=2.0, guidance_interval=(0, 10)))
