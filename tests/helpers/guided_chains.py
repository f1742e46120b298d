"""Guided chains a second time, in float64 NumPy, and the networks and gradients that are compared with them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from helpers import oracle
from helpers.networks import Formula
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.sampling.sampler import Sampler

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


def by_label(x: Any, t: Any, label: Any) -> Any:
    return 0.9 * x + 0.02 * label


def of_class(scale: Callable[[int], float], network: Callable[[Any, Any, Any], Any] = by_label) -> Of:
    """Guided predictions of LABELS; the null label is 3."""
    labels = np.array(LABELS).reshape(-1, 1, 1, 1)

    def out(x: np.ndarray, t: int) -> np.ndarray:
        unconditional = network(x, t, 3)
        return unconditional + scale(t) * (network(x, t, labels) - unconditional)

    return out


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


def limited(fraction: float) -> Limit:
    """Saharia et al. 2022, section 2.3."""

    def limit(x0: np.ndarray) -> np.ndarray:
        s = np.quantile(np.abs(x0).reshape(len(x0), -1), fraction, axis=1).clip(1).reshape(-1, 1, 1, 1)
        return x0.clip(-s, s) / s

    return limit


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
