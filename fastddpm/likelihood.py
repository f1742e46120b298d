"""The variational bound's terms, in bits per dimension (sections 3.2 to 3.4 of the paper)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .diffusion import Diffusion, Gaussian

_LOG_2 = math.log(2.0)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats."""
    # exp(d) - 1 - d is 1e-10 and less at late t, where exp(d) - 1 in float32 would be an error of 1e-7.
    difference = log_variance1 - log_variance2
    mean_term = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (torch.expm1(difference) - difference + mean_term)


def discretized_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass N(mean, var) puts on each pixel's bin of width 2/255 (eq. 13), in nats.

    `x0`: floats on the grid v / 127.5 - 1. The outer bins reach to infinity. The normal CDF is the paper's
    code's: 0.5 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))); the published bits/dim are of this decoder.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    inverse_deviation = torch.exp(-0.5 * log_variance)
    upper = cdf(inverse_deviation * (x0 - mean + 1.0 / 255.0))
    lower = cdf(inverse_deviation * (x0 - mean - 1.0 / 255.0))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1.0 - lower, upper - lower))
    return torch.log(mass.clamp(min=1e-12))


def bound_term(diffusion: "Diffusion", out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, *, clip: bool = True) -> Tensor:
    """L_{t} of equation 5 for each image, float32 (N,), bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, the decoder's -log p(x_0 | x_1) at t = 0.
    `clip`: bound the x_0 prediction; evaluation does, training with this loss does not.
    """
    posterior = diffusion.q_posterior(x0, x_t, t)
    model, _ = diffusion.p(out, x_t, t, clip=clip)
    return torch.where(t == 0, decoder_bits(x0, model), kl_bits(posterior, model))


def kl_bits(posterior: "Gaussian", model: "Gaussian") -> Tensor:
    """KL(posterior || model), (N,), bits per dimension: the term of a timestep t > 0."""
    kl = gaussian_kl(posterior.mean, posterior.log_variance, model.mean, model.log_variance)
    return kl.mean((1, 2, 3)) / _LOG_2


def decoder_bits(x0: Tensor, model: "Gaussian") -> Tensor:
    """-log2 of the mass that p(x_0 | x_1) puts on the pixels' bins, (N,), per dimension: the term of t = 0."""
    return -discretized_log_likelihood(x0, model.mean, model.log_variance).mean((1, 2, 3)) / _LOG_2


def prior_term(diffusion: "Diffusion", x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) for each image, float32 (N,), bits per dimension."""
    alpha_bar = float(diffusion.alpha_bar[-1])
    log_variance = torch.full_like(x0, math.log1p(-alpha_bar))
    kl = gaussian_kl(math.sqrt(alpha_bar) * x0, log_variance, torch.zeros_like(x0), torch.zeros_like(x0))
    return kl.mean((1, 2, 3)) / _LOG_2
