"""Networks that are formulas, and their bound in float64, term by term, by the released code's equations."""

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

BOUND_STREAM = 5
SHORT = {"timesteps": 13, "beta_start": 1e-3, "beta_end": 0.3}
SHAPE = (1, 2, 2)


def levels(num: int, rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Pixel values, the two ends among them."""
    images = rng.integers(0, 256, (num, *shape)).astype(np.uint8)
    images[0, 0, 0, :2] = 0, 255
    return images


def out_of(x: Any, t: Any, prediction: str, timesteps: int) -> Any:
    """A network's prediction, wrong in some way, and its output for the variance: the same in NumPy and torch."""
    first = {"eps": 0.4 * x + t / timesteps, "v": 0.3 * x - 0.2, "x0": 0.98 * x, "xprev": 0.97 * x + 0.01}[prediction]
    return first, 0.3 * x - 0.1


def network(prediction: str, variance: str, timesteps: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    def formula(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        first, second = out_of(x, t.to(x.dtype), prediction, timesteps)
        if variance == "learned":
            second = second - 4
        return torch.cat([first, second], 1) if variance.startswith("learned") else first

    return formula


def sampler_of(prediction: str = "eps", variance: str = "fixedlarge", **options: Any) -> Sampler:
    learned = variance.startswith("learned")
    process = SHORT | options
    config = DiffusionConfig(prediction=prediction, variance=variance, loss="vlb" if learned else "simple", **process)  # type: ignore[arg-type]
    formula = network(prediction, variance, config.timesteps)
    return Sampler(Formula(formula, learned_variance=learned), Diffusion(config))  # type: ignore[arg-type]


def reference(images: np.ndarray, sampler: Sampler, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L_T (N,), every term (N, T) and every squared x_0 error (N, T), a timestep after another, as the paper's code."""
    config = sampler.diffusion.config
    beta = oracle.betas("linear", config.timesteps, config.beta_start, config.beta_end)
    process = oracle.Process.respaced(beta=beta)
    posterior = np.append(process.posterior_variance[1], process.posterior_variance[1:])
    large = beta if config.variance == "learned_range" else np.append(posterior[0], beta[1:])
    upper = posterior if config.variance == "fixedsmall" else large
    x0, numbers = images / 127.5 - 1, np.arange(len(images))
    terms, errors = np.empty((2, len(images), config.timesteps))
    for t in range(config.timesteps):
        i = np.full(len(images), t)
        eps = oracle.normals(images.shape[1:], numbers, seed, t, BOUND_STREAM)
        x_t = process.forward(i, x0, eps).astype(np.float32).astype(np.float64)
        out, raw = out_of(x_t, t, config.prediction, config.timesteps)
        prediction = np.clip(process.predict_x0(i, config.prediction, out, x_t), -1, 1)
        mean = out if config.prediction == "xprev" else process.posterior_mean(i, prediction, x_t)
        log_var = np.broadcast_to(np.log(upper[t]), x0.shape)
        if config.variance == "learned":
            log_var = raw - 4
        elif config.variance == "learned_range":
            log_var = np.log(posterior[t]) + (log_var - np.log(posterior[t])) * (raw + 1) / 2
        if t == 0:
            found = -np.log(np.maximum(oracle.bin_mass(x0, mean, log_var), 1e-12))
        else:
            found = oracle.gaussian_kl(process.posterior_mean(i, x0, x_t), np.log(posterior[t]), mean, log_var)
        terms[:, t] = found.mean((1, 2, 3)) / np.log(2)
        errors[:, t] = ((prediction - x0) ** 2).mean((1, 2, 3))
    bar = process.alpha_bar[-1]
    prior = 0.5 * (bar * x0**2 + (1 - bar) - 1 - np.log(1 - bar)).mean((1, 2, 3)) / np.log(2)
    return prior, terms, errors
