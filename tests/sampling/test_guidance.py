"""Guidance against its formulas in float64: interval, rescaling, dynamic thresholding, the gradient of a classifier."""

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
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

SEEDS, SEED, STEPS, SHAPE = np.array([5, 6]), 3, 10, (1, 4, 4)
METHODS: list[dict[str, Any]] = [
    {"method": "ancestral"},
    {"method": "ddim"},
    {"method": "ddim", "eta": 0.5},
    {"method": "dpm2m"},
    {"method": "dpm2m-sde"},
]
CLASSES: dict[str, Any] = {"num_classes": 3, "label_dropout": 0.1}
LABELS = [2, 1]
Limit = Callable[[np.ndarray], np.ndarray]
Of = Callable[[np.ndarray, int], np.ndarray]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


def sampler(network: torch.nn.Module, diffusion: DiffusionConfig | None = None, **options: Any) -> Sampler:
    return Sampler(network, Diffusion(diffusion), **({"steps": STEPS, "seed": SEED} | options))


# The chains a second time, in float64


def clipped(x0: np.ndarray) -> np.ndarray:
    return x0.clip(-1, 1)


def expected_chain(
    out_of: Of, timesteps: np.ndarray, *, prediction: str = "eps", method: str = "ancestral", eta: float = 0.0,
    limit: Limit = clipped, gradient: Of | None = None, variance: str = "fixedlarge", log_variance: Of | None = None,
) -> np.ndarray:  # fmt: skip
    """The images of SEEDS: Algorithms 1 and 2 of Dhariwal and Nichol 2021 around the steps of the other papers."""
    process, previous = oracle.Process.respaced(timesteps), None
    x = oracle.normals(SHAPE, SEEDS, SEED, 0, 0)
    for i, t in enumerate(timesteps.tolist()):
        bar, prev, beta = process.alpha_bar[i], process.alpha_bar_prev[i], process.beta[i]
        out = out_of(x, t)
        x0 = process.predict_x0(np.array([i]), prediction, out, x)
        slope = np.zeros_like(x) if gradient is None else gradient(x, t)
        if method != "ancestral":
            eps = (x - np.sqrt(bar) * x0) / np.sqrt(1 - bar) - np.sqrt(1 - bar) * slope
            x0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
        x0 = limit(x0)
        if method.startswith("dpm2m"):
            x, sigma = process.dpm_solver(i, x, x0, previous, method == "dpm2m-sde")
            previous = x0
        elif method == "ddim":
            sigma = eta * np.sqrt((1 - prev) / (1 - bar) * beta)
            eps = (x - np.sqrt(bar) * x0) / np.sqrt(1 - bar)
            x = np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps
        else:
            of_step: Any = {"fixedlarge": beta, "fixedsmall": process.posterior_variance[i]}.get(variance)
            if log_variance is not None:
                low, high = np.log(max(process.posterior_variance[i], 1e-20)), np.log(beta)
                v = log_variance(x, t)
                of_step = np.exp(v if variance == "learned" else low + (high - low) * (v + 1) / 2)
            mean = out if prediction == "xprev" else process.posterior_mean(np.array([i]), x0, x)
            x, sigma = mean + of_step * slope, np.sqrt(of_step)
        if i < len(timesteps) - 1:
            x = x + sigma * oracle.normals(SHAPE, SEEDS, SEED, t, 1)
    return x.clip(-1, 1)


def assert_close(images: Tensor, expected: np.ndarray, atol: float = 1e-4) -> None:
    assert np.abs(expected).min() < 0.9 and np.abs(expected[0] - expected[1]).max() > 0.05
    np.testing.assert_allclose(images.double().numpy(), expected, rtol=0, atol=atol)


# An interval of timesteps


def by_label(x: Any, t: Any, label: Any) -> Any:
    return 0.9 * x + 0.02 * label


def of_class(scale: Callable[[int], float], network: Callable[[Any, Any, Any], Any] = by_label) -> Of:
    """Guided predictions of LABELS; the null label is 3."""
    labels = np.array(LABELS).reshape(-1, 1, 1, 1)

    def out(x: np.ndarray, t: int) -> np.ndarray:
        unconditional = network(x, t, 3)
        return unconditional + scale(t) * (network(x, t, labels) - unconditional)

    return out


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


def uneven(x: Any, t: Any, label: Any) -> Any:
    """Predictions whose deviation depends on the label, not by a factor."""
    sine = torch.sin if isinstance(x, Tensor) else np.sin
    return 0.5 * x + 0.1 * label * sine(3 * x + 0.01 * t) + 0.02 * label


def uneven_network(factor: float = 1.0, **options: Any) -> Formula:
    def formula(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        out = factor * uneven(x, t, label.reshape(-1, 1, 1, 1))
        return torch.cat([out, 0 * out - 0.25], 1) if options.get("learned_variance") else out

    return Formula(formula, image_size=4, **CLASSES, **options)


def rescaled(phi: float, scale: float) -> Of:
    """Lin et al. 2023, equations 15 and 16, of the network's output."""
    labels = np.array(LABELS).reshape(-1, 1, 1, 1)

    def out(x: np.ndarray, t: int) -> np.ndarray:
        conditional, guided = uneven(x, t, labels), of_class(lambda _: scale, uneven)(x, t)
        factors = conditional.std((1, 2, 3), keepdims=True) / guided.std((1, 2, 3), keepdims=True)
        return phi * guided * factors + (1 - phi) * guided

    return out


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


def limited(fraction: float) -> Limit:
    """Saharia et al. 2022, section 2.3."""

    def limit(x0: np.ndarray) -> np.ndarray:
        s = np.quantile(np.abs(x0).reshape(len(x0), -1), fraction, axis=1).clip(1).reshape(-1, 1, 1, 1)
        return x0.clip(-s, s) / s

    return limit


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


# The gradient of a classifier


WEIGHTS = np.random.default_rng(1).standard_normal((3, *SHAPE))
SCALE = 1.5


def softmax_gradient(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """A linear classifier of three classes that is surer where there is less noise, by autograd."""
    assert label is not None and x.requires_grad and x.is_leaf and torch.is_grad_enabled()
    assert x.dtype == torch.float32 and t.dtype == label.dtype == torch.int64 and t.shape == label.shape == (len(x),)
    sharpness = 1 / (1 + 0.01 * t)
    logits = torch.einsum("nchw,kchw->nk", x, torch.tensor(WEIGHTS, dtype=torch.float32)) * sharpness[:, None]
    chosen = logits.log_softmax(1).gather(1, label[:, None]).sum()
    return SCALE * torch.autograd.grad(chosen, x)[0]


def numpy_softmax_gradient(x: np.ndarray, t: int) -> np.ndarray:
    sharpness = 1 / (1 + 0.01 * t)
    logits = np.einsum("nchw,kchw->nk", x, WEIGHTS) * sharpness
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return SCALE * sharpness * (WEIGHTS[LABELS] - np.einsum("nk,kchw->nchw", share, WEIGHTS))


def plain(x: Any, t: Any) -> Any:
    cosine = torch.cos if isinstance(x, Tensor) else np.cos
    return 0.6 * x + 0.2 * cosine(2 * x + 0.01 * t)


def plain_network(second: float | None = None, **options: Any) -> Formula:
    def formula(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        out = plain(x, t)
        return out if second is None else torch.cat([out, second * x], 1)

    return Formula(formula, image_size=4, **({"num_classes": 3} | options))


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


MEAN, DEVIATION, TILT = 0.1, 0.3, 2.0


def gaussian(mean: float, **options: Any) -> Sampler:
    """The exact network of data from N(mean, DEVIATION^2)."""
    bar = torch.tensor(np.cumprod(1 - oracle.betas("linear", 1000)))

    def exact_eps(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        signal, noise = bar[t].sqrt(), 1 - bar[t]
        return (noise.sqrt() * (x.double() - signal * mean) / (bar[t] * DEVIATION**2 + noise)).float()

    return sampler(Formula(exact_eps, image_size=4), DiffusionConfig(clip_x0=False), **options)


def tilt(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """The gradient of log p(y | x_t) for log p(y | x_0) = TILT x_0 + constant: TILT dE[x_0 | x_t] / dx_t."""
    bar = torch.tensor(np.cumprod(1 - oracle.betas("linear", 1000)))[t].reshape(-1, 1, 1, 1)
    return (TILT * bar.sqrt() * DEVIATION**2 / (bar * DEVIATION**2 + 1 - bar)).float().expand_as(x)


@pytest.mark.parametrize("options", METHODS[1:], ids=name_of)
def test_a_tilted_gaussian_is_a_gaussian(options: dict[str, Any]) -> None:
    """N(m, s^2) exp(a x_0) is N(m + a s^2, s^2): guided chains of the one are the chains of the other."""
    guided, other = gaussian(MEAN, cond_fn=tilt, **options), gaussian(MEAN + TILT * DEVIATION**2, **options)
    torch.testing.assert_close(guided.sample(range(4)), other.sample(range(4)), rtol=0, atol=1e-4)


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
        "cond_fn": f"{__name__}.softmax_gradient",
    }  # fmt: skip
    assert said == ours.settings()


def test_a_classifier_that_is_an_object_is_named_by_its_class() -> None:
    class Classifier:
        def __call__(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            return x

    assert sampler(plain_network(), cond_fn=Classifier()).settings()["cond_fn"].endswith("<locals>.Classifier")


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
