"""The diffusion process: schedules, q, p, training losses and the variational bound. Equation numbers are the paper's.

Timesteps are those of the released code, t = 0..T-1: x_t at t = 0 has been diffused once (the paper's t is
one more). Constants are computed in float64 and rounded once. x_t, predictions and losses are float32 in
any precision of the network, because with a bfloat16 alpha_bar t = 0..9 would add no noise at all.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.config.schedules import betas
from fastddpm.errors import UsageError
from fastddpm.kernels.philox import STREAM_EXAMPLE
from fastddpm.kernels.q_sample.reference import scale_images
from fastddpm.ops import q_sample
from fastddpm.ops.example_words import example_words
from fastddpm.ops.noise import NoiseKey
from fastddpm.ops.q_sample import refuse_levels
from fastddpm.runtime.network import Network, check_examples, evaluate

_LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian over images: mean and log-variance, float32, broadcastable to (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) for pairs of timesteps s < t: equations 6 and 7 with beta = 1 - alpha_bar_t / alpha_bar_s.

    All arrays are float64 and have the same shape. The mean is `from_x0` x_0 + `from_xt` x_t.
    """

    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray
    beta: np.ndarray
    variance: np.ndarray
    from_x0: np.ndarray
    from_xt: np.ndarray

    @staticmethod
    def between(alpha_bar: np.ndarray, alpha_bar_prev: np.ndarray, beta: np.ndarray | None = None) -> "Posterior":
        """Return the posterior from alpha_bar at t and at s. `beta`: default 1 - alpha_bar / alpha_bar_prev."""
        beta = 1 - alpha_bar / alpha_bar_prev if beta is None else beta
        return Posterior(
            alpha_bar,
            alpha_bar_prev,
            beta,
            variance=beta * (1 - alpha_bar_prev) / (1 - alpha_bar),
            from_x0=beta * np.sqrt(alpha_bar_prev) / (1 - alpha_bar),
            from_xt=(1 - alpha_bar_prev) * np.sqrt(1 - beta) / (1 - alpha_bar),
        )


@dataclass(frozen=True)
class ExampleDraws:
    """Random draws of training examples: `t` int64 (N,) in 0..T-1, `flip` bool (N,), `drop_label` bool (N,)."""

    t: Tensor
    flip: Tensor
    drop_label: Tensor


def draw_examples(key: NoiseKey, timesteps: int, label_dropout: float = 0.0) -> ExampleDraws:
    """Draw t uniformly, flip with probability 1/2, and drop_label with probability `label_dropout`, from `key`."""
    for_t, for_flip, for_label, _ = example_words(key.images, key.seed, key.step, STREAM_EXAMPLE)
    return ExampleDraws(
        t=(for_t * timesteps) >> 32,
        flip=for_flip < 2**31,
        drop_label=for_label < int(label_dropout * 2**32),
    )


class Diffusion:
    """The forward process, the parameterization of the reverse process, and the losses of one configuration.

    `config` defaults to `DiffusionConfig()`, the paper's. Tables, float64 (T,), indexed by t: `betas`, `alpha_bar` (the
    product of 1 - beta, eq. 4), `alpha_bar_prev`, `posterior_variance` (eq. 7), `posterior_log_variance` (its entry at
    t = 0, log 0, is replaced by that at t = 1), `posterior_x0` and `posterior_xt` (coefficients of the mean, eq. 7),
    `model_log_variance` (of p with a fixed variance; for learned_range the upper end, log beta). Raises `UsageError` if
    a timestep leaves too little signal in x_t to compute x_0 from the prediction in float32.
    """

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        self.config = config or DiffusionConfig()
        self.timesteps = self.config.timesteps
        self.betas = betas(self.config)
        self.alpha_bar = np.cumprod(1.0 - self.betas)
        self.alpha_bar_prev = np.append(1.0, self.alpha_bar[:-1])
        posterior = Posterior.between(self.alpha_bar, self.alpha_bar_prev, self.betas)
        self.posterior_variance = posterior.variance
        self.posterior_x0, self.posterior_xt = posterior.from_x0, posterior.from_xt
        self.posterior_log_variance = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        if self.config.variance == "fixedsmall":
            self.model_log_variance = self.posterior_log_variance
        elif self.config.variance == "learned_range":
            self.model_log_variance = np.log(self.betas)  # equation 15 of Nichol and Dhariwal 2021, also at t = 0
        else:
            # At t = 0 the posterior's value at t = 1, because beta_0 would cost bits in the decoder's likelihood.
            self.model_log_variance = np.log(np.append(self.posterior_variance[1], self.betas[1:]))
        self._tables: dict[tuple[str, torch.device], Tensor] = {}
        self._range_seen = False
        self._check_signal()

    def _check_signal(self) -> None:
        """Raise `UsageError` if a coefficient of x_0 overflows float32 at some t, where a chain would become NaN."""
        with np.errstate(all="ignore"):
            largest = np.abs(self.x0_coefficients()).max(0)
        lost = np.flatnonzero(~(largest <= np.finfo(np.float32).max))
        if len(lost):
            schedule = f"schedule {self.config.schedule}" if self.config.betas is None else "the schedule of betas"
            raise UsageError(
                f"{schedule} with {self.timesteps} timesteps leaves no signal in x_t at t = "
                f"{lost[0]}, from which prediction {self.config.prediction} cannot give x_0; predict v or x0, or "
                "choose another schedule, fewer timesteps or smaller betas"
            )

    @cached_property
    def snr(self) -> np.ndarray:
        """The signal-to-noise ratio alpha_bar / (1 - alpha_bar), float64 (T,)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def log_signal_to_noise(self) -> np.ndarray:
        """log(alpha / sigma) = log(SNR) / 2, the lambda of Lu et al. 2022, float64 (T,); -inf where beta is 1."""
        with np.errstate(divide="ignore"):
            log_alpha_bar = np.cumsum(np.log1p(-self.betas))  # does not underflow, as alpha_bar may
            return (log_alpha_bar - np.log(-np.expm1(log_alpha_bar))) / 2

    def respaced(self, timesteps: np.ndarray) -> Posterior:
        """Return the posterior of the process that visits only `timesteps`, int (S,) descending: float64 (S,) each.

        Between t and the next timestep s it is the original process with beta = 1 - alpha_bar_t / alpha_bar_s;
        after the last timestep alpha_bar_s is 1.
        """
        return Posterior.between(self.alpha_bar[timesteps], np.append(self.alpha_bar[timesteps[1:]], 1.0))

    # q: the forward process

    def q_sample(
        self,
        x0: Tensor,
        t: Tensor,
        key: NoiseKey | None = None,
        *,
        flip: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return x_t and eps (eq. 4), float32 (N, C, H, W), by `fastddpm.ops.q_sample` with this process's table.

        `x0`: uint8 or floats in [-1, 1], (N, C, H, W). `t`: int64 (N,). `flip`: bool (N,), images to mirror; default
        none. eps is `noise` if given, otherwise drawn from `key`. Default key: drawn from torch's default generator.
        Raises ValueError for floats that are no images in [-1, 1], such as levels of 0..255 (on a GPU looked for in the
        first call only, because it waits for them).
        """
        if x0.is_floating_point() and not torch.compiler.is_compiling():
            self._range_seen = refuse_levels(x0, self._range_seen)
        if key is None:
            key = NoiseKey.draw(len(x0), x0.device)
        table = self._table("forward", np.stack([np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar)], 1), x0.device)
        return q_sample(x0, t, table, key.images, key.seed, key.step, flip=flip, noise=noise)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Return q(x_{t-1} | x_t, x_0), equations 6 and 7."""
        mean = self.at("posterior_x0", t) * x0 + self.at("posterior_xt", t) * x_t
        return Gaussian(mean, self.at("posterior_log_variance", t))

    # p: the reverse process

    def predict_x0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the x_0 that the network's first C output channels predict, float32 (N, C, H, W), not clipped."""
        from_x, from_out = self.x0_coefficients()
        a = self._table("x0_from_x", from_x, x_t.device)[t].reshape(-1, 1, 1, 1)
        b = self._table("x0_from_out", from_out, x_t.device)[t].reshape(-1, 1, 1, 1)
        return a * x_t + b * self._prediction(out, x_t)

    def x0_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (a, b), float64 (T,) each, with x_0 = a x_t + b out for the configured prediction."""
        signal, sigma = np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar)
        if self.config.prediction == "eps":
            return 1 / signal, -sigma / signal
        if self.config.prediction == "v":
            return signal, -sigma
        if self.config.prediction == "xprev":
            return -self.posterior_xt / self.posterior_x0, 1 / self.posterior_x0
        return np.zeros_like(signal), np.ones_like(signal)

    def p(self, out: Tensor, x_t: Tensor, t: Tensor, *, clip: bool | None = None) -> tuple[Gaussian, Tensor]:
        """Return p(x_{t-1} | x_t) from the network's output, and the prediction of x_0 that it is made from.

        `clip`: clamp the prediction of x_0 to [-1, 1] first. Default: the configuration's clip_x0. The output of
        a network that predicts x_{t-1} is the mean itself, not affected by `clip`, as in the released code.
        """
        x0 = self.predict_x0(out, x_t, t)
        if self.config.clip_x0 if clip is None else clip:
            x0 = x0.clamp(-1, 1)
        if self.config.prediction == "xprev":
            mean = self._prediction(out, x_t)
        else:
            mean = self.q_posterior(x0, x_t, t).mean
        return Gaussian(mean, self._log_variance(out, x_t, t)), x0

    def _log_variance(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if not self.config.learned_variance:
            return self.at("model_log_variance", t)
        raw = out[:, x_t.shape[1] :].to(torch.float32)
        if self.config.variance == "learned":
            return raw
        low, high = self.at("posterior_log_variance", t), self.at("model_log_variance", t)
        return low + (high - low) * (raw + 1) / 2

    # losses

    def loss(
        self,
        network: Network,
        images: Tensor,
        key: NoiseKey,
        *,
        label: Tensor | None = None,
        flip: bool = False,
        null_label: int | None = None,
        label_dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the training loss of each image, float32 (N,), and its t, int64 (N,). All is drawn from `key`.

        `network`: called as network(x_t, t), or network(x_t, t, label) with a label. `images`: uint8 or floats in
        [-1, 1], (N, C, H, W). `flip`: mirror half of them. `label`: int64 (N,); a fraction `label_dropout` of them is
        replaced by `null_label`. Raises `UsageError` as `evaluate` in runtime/network.py does. Losses:
        simple: equation 14, a mean over C, H, W.
        vlb: the bound's term at t in bits per dimension, not multiplied by T (the released code's scale).
        hybrid: simple + hybrid_weight T vlb, with the mean detached in vlb (Nichol and Dhariwal 2021).
        min_snr: simple, weighted so that the error of x_0 has weight min(SNR, gamma) (Hang et al. 2023).
        """
        check_examples(images, key, label, null_label, label_dropout)
        draws = draw_examples(key, self.timesteps, label_dropout)
        flips = draws.flip if flip else None
        if self.config.prediction == "eps" and self.config.loss in ("simple", "min_snr"):
            x0 = None
            x_t, eps = self.q_sample(images, draws.t, key, flip=flips)
        else:
            x0 = scale_images(images, flips)
            x_t, eps = self.q_sample(x0, draws.t, key)
        if label is not None and null_label is not None:
            label = torch.where(draws.drop_label, torch.full_like(label, null_label), label)
        out = evaluate(network, x_t, draws.t, label, key=key, learned_variance=self.config.learned_variance)
        return self.loss_terms(out, x_t, draws.t, eps, x0), draws.t

    def loss_terms(self, out: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, x0: Tensor | None) -> Tensor:
        """Return the configured loss of each image, (N,), for a network output. `x0` may be None if eps suffices."""
        config = self.config
        if config.loss == "vlb":
            assert x0 is not None
            return self.bound_term(out, x0, x_t, t, clip=False)
        target = self._target(x_t, t, eps, x0)
        simple = (self._prediction(out, x_t) - target).square().mean((1, 2, 3))
        if config.loss == "min_snr":
            return simple * self.at("min_snr_weight", t).flatten()
        if config.loss == "hybrid":
            assert x0 is not None
            channels = x_t.shape[1]
            frozen_mean = torch.cat([out[:, :channels].detach(), out[:, channels:]], dim=1)
            bound = self.bound_term(frozen_mean, x0, x_t, t, clip=False)
            return simple + config.hybrid_weight * self.timesteps * bound
        return simple

    def _target(self, x_t: Tensor, t: Tensor, eps: Tensor, x0: Tensor | None) -> Tensor:
        if self.config.prediction == "eps":
            return eps
        assert x0 is not None
        if self.config.prediction == "x0":
            return x0
        if self.config.prediction == "xprev":
            return self.q_posterior(x0, x_t, t).mean
        return self.at("sqrt_alpha_bar", t) * eps - self.at("sqrt_one_minus_alpha_bar", t) * x0

    @cached_property
    def sqrt_alpha_bar(self) -> np.ndarray:
        """The scale of the signal in x_t, float64 (T,)."""
        return np.sqrt(self.alpha_bar)

    @cached_property
    def sqrt_one_minus_alpha_bar(self) -> np.ndarray:
        """The scale of the noise in x_t, float64 (T,)."""
        return np.sqrt(1 - self.alpha_bar)

    @cached_property
    def min_snr_weight(self) -> np.ndarray:
        """The weight of the prediction's squared error that gives the x_0 error the weight min(SNR, gamma), (T,)."""
        weight = np.minimum(self.snr, self.config.min_snr_gamma)
        return {"eps": weight / self.snr, "x0": weight, "v": weight / (self.snr + 1)}[self.config.prediction]

    # the bound

    def bound_term(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, *, clip: bool = True) -> Tensor:
        """Return the bound's term at t (eq. 5) for each image, float32 (N,), in bits per dimension.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and the decoder's -log p(x_0 | x_1) at t = 0.
        `clip`: clamp the prediction of x_0 to [-1, 1]; true in evaluation, false in training.
        """
        posterior = self.q_posterior(x0, x_t, t)
        model, _ = self.p(out, x_t, t, clip=clip)
        return torch.where(t == 0, decoder_bits(x0, model), kl_bits(posterior, model))

    def prior_term(self, x0: Tensor) -> Tensor:
        """Return L_T = KL(q(x_T | x_0) || N(0, I)) for each image, float32 (N,), in bits per dimension."""
        alpha_bar = float(self.alpha_bar[-1])
        log_variance = torch.full_like(x0, math.log1p(-alpha_bar))
        kl = gaussian_kl(math.sqrt(alpha_bar) * x0, log_variance, torch.zeros_like(x0), torch.zeros_like(x0))
        return kl.mean((1, 2, 3)) / _LOG_2

    # tables on the device

    def at(self, name: str, t: Tensor) -> Tensor:
        """Return the table `name` at each t, rounded to float32, (N, 1, 1, 1), on the device of `t`."""
        return self._table(name, getattr(self, name), t.device)[t].reshape(-1, 1, 1, 1)

    def _table(self, name: str, values: np.ndarray, device: torch.device) -> Tensor:
        slot = (name, device)
        if slot not in self._tables:
            self._tables[slot] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._tables[slot]

    @staticmethod
    def _prediction(out: Tensor, x_t: Tensor) -> Tensor:
        return out[:, : x_t.shape[1]].to(torch.float32)


# The bound's terms (sections 3.2 to 3.4 of the paper)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats."""
    # exp(d) - 1 - d is at most 1e-10 at late t, where exp(d) - 1 in float32 would have an error of 1e-7.
    difference = log_variance1 - log_variance2
    mean_term = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (torch.expm1(difference) - difference + mean_term)


def discretized_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log of the mass that N(mean, var) puts on each pixel's bin of width 2/255 (eq. 13), in nats.

    `x0`: floats on the grid v / 127.5 - 1. The outer bins extend to infinity. The normal CDF is the released code's
    approximation 0.5 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), with which the published bits/dim were computed.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    inverse_deviation = torch.exp(-0.5 * log_variance)
    upper = cdf(inverse_deviation * (x0 - mean + 1.0 / 255.0))
    lower = cdf(inverse_deviation * (x0 - mean - 1.0 / 255.0))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1.0 - lower, upper - lower))
    return torch.log(mass.clamp(min=1e-12))


def kl_bits(posterior: Gaussian, model: Gaussian) -> Tensor:
    """Return KL(posterior || model), (N,), in bits per dimension: the bound's term at t > 0."""
    kl = gaussian_kl(posterior.mean, posterior.log_variance, model.mean, model.log_variance)
    return kl.mean((1, 2, 3)) / _LOG_2


def decoder_bits(x0: Tensor, model: Gaussian) -> Tensor:
    """Return -log2 of the mass that p(x_0 | x_1) puts on the pixels' bins, (N,), per dimension: the term at t = 0."""
    return -discretized_log_likelihood(x0, model.mean, model.log_variance).mean((1, 2, 3)) / _LOG_2
