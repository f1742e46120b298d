"""Images whose pixels are independent Gaussians, with the network that knows their reverse process exactly.

For such a source everything is known in closed form: the exact reverse conditionals are Gaussian, the bound is the
source's entropy, and the model's progressive code lies on Shannon's rate-distortion function.
"""

import numpy as np
import torch
from helpers.networks import Formula
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.sampling.sampler import Sampler

MEAN, DEVIATION, SIZE = 0.05, 0.18, 8
# 60 steps, of which the last knows nothing of x_0.
PROCESS = {"timesteps": 60, "beta_start": 2e-4, "beta_end": 0.35}


def images(num: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (num, 1, 8, 8); no pixel is clipped."""
    levels = np.round((rng.normal(MEAN, DEVIATION, (num, 1, SIZE, SIZE)) + 1) * 127.5)
    assert levels.min() > 0 and levels.max() < 255
    return levels.astype(np.uint8)


def diffusion(**options: object) -> Diffusion:
    return Diffusion(DiffusionConfig(**(PROCESS | options)))  # type: ignore[arg-type]


def least_error(alpha_bar: np.ndarray) -> np.ndarray:
    """The variance of x_0 given x_t: 1 / (1/s^2 + SNR)."""
    return 1 / (DEVIATION**-2 + alpha_bar / (1 - alpha_bar))


def sampler(process: Diffusion) -> Sampler:
    """Predicts E[x_0 | x_t], as eps, and for a learned variance the log-variance of x_{t-1} given x_t."""
    bar = process.alpha_bar
    error = least_error(bar)
    prev = np.append(1.0, bar[:-1])
    beta = 1 - bar / prev
    variance = (1 - prev) / (1 - bar) * beta + prev * (beta / (1 - bar)) ** 2 * error
    table = torch.tensor(np.stack([bar, error, np.log(variance)]))

    def exact(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        alpha_bar, least, log_variance = table[:, t].double()
        x_t = x_t.double()
        x0 = least * (MEAN / DEVIATION**2 + alpha_bar.sqrt() / (1 - alpha_bar) * x_t)
        eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        parts = [eps, log_variance.expand_as(eps)] if process.config.learned_variance else [eps]
        return torch.cat(parts, dim=1).float()

    learned = process.config.learned_variance
    return Sampler(Formula(exact, image_size=SIZE, learned_variance=learned), process)  # type: ignore[arg-type]
