"""What the package computes, written a second time in float64 NumPy and straight from the papers.

Nothing here imports fastddpm, so an error there cannot hide itself here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UINT32 = np.uint64(0xFFFFFFFF)


# Philox4x32-10: Salmon et al. 2011, section 3.3


def philox(counter: tuple[np.ndarray | int, ...], key: int) -> np.ndarray:
    """(.., 4) uint32 for four counter words that broadcast and a 64-bit key (negative: modulo 2^64)."""
    words = np.stack(np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter)), axis=-1)
    key %= 2**64
    key_words = [key % 2**32, key // 2**32]
    for _ in range(10):
        product_a, product_b = words[..., 0] * np.uint64(0xD2511F53), words[..., 2] * np.uint64(0xCD9E8D57)
        words = np.stack(
            [
                (product_b >> np.uint64(32)) ^ words[..., 1] ^ np.uint64(key_words[0]),
                product_b & UINT32,
                (product_a >> np.uint64(32)) ^ words[..., 3] ^ np.uint64(key_words[1]),
                product_a & UINT32,
            ],
            axis=-1,
        )
        key_words = [(key_words[0] + 0x9E3779B9) % 2**32, (key_words[1] + 0xBB67AE85) % 2**32]
    return words.astype(np.uint32)


def image_words(num: int, images: np.ndarray, seed: int, step: int, stream: int) -> np.ndarray:
    """The first `num` uint32 words of each image, (N, num): counter (block, image, step, stream)."""
    blocks = np.arange(-(-num // 4))
    words = philox((blocks[None, :], np.asarray(images)[:, None], step, stream), seed)
    return words.reshape(len(images), -1)[:, :num]


def normals(shape: tuple[int, ...], images: np.ndarray, seed: int, step: int, stream: int) -> np.ndarray:
    """Standard normals (N, *shape): Box-Muller, radius from words 0 and 2, angle from words 1 and 3."""
    num = int(np.prod(shape))
    words = image_words(-(-num // 4) * 4, images, seed, step, stream).reshape(len(images), -1, 2).astype(np.float64)
    radius = np.sqrt(-2 * np.log(words[..., 0] / 2**32 + 2.0**-33))
    angle = 2 * np.pi * words[..., 1] / 2**32
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(len(images), -1)[:, :num].reshape(len(images), *shape)


def dropout_factor(
    shape: tuple[int, int, int, int], p: float, images: np.ndarray, seed: int, step: int, layer: int
) -> np.ndarray:
    """0 or 1/(1-p) for (N, C, H, W): 16-bit halves, low one first, in (H, W, C) order; p in multiples of 2^-16."""
    n, c, h, w = shape
    words = image_words(-(-c * h * w // 8) * 4, images, seed, step, 8 + 256 * layer)
    halves = np.stack([words % 2**16, words // 2**16], axis=-1).reshape(n, -1)[:, : c * h * w]
    threshold = round(p * 2**16)
    factor = np.where(halves >= threshold, 1 / (1 - threshold / 2**16), 0.0)
    return factor.reshape(n, h, w, c).transpose(0, 3, 1, 2)


# The network's operations


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def group_norm(x: np.ndarray, groups: int, eps: float = 1e-6) -> np.ndarray:
    """Wu and He 2018, without the affine map; the variance is the biased one."""
    grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    centred = grouped - grouped.mean((2, 3), keepdims=True)
    return (centred / np.sqrt((centred**2).mean((2, 3), keepdims=True) + eps)).reshape(x.shape)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None) -> np.ndarray:
    """softmax(q k^T scale) v for (N, L, C)."""
    scores = np.einsum("nic,njc->nij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nij,njc->nic", weights / weights.sum(-1, keepdims=True), v)


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int = 1) -> np.ndarray:
    """Cross-correlation of (N, C, H, W) with (O, C, k, k), no padding."""
    kernel = weight.shape[-1]
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, weight) + bias[None, :, None, None]


def same_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3 with one pixel of zeros all round."""
    return conv(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), weight, bias)


# The diffusion process: Ho et al. 2020


def betas(schedule: str, num: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    i = np.arange(num)
    if schedule == "linear":
        return start + (end - start) * i / (num - 1)
    if schedule == "quad":
        return (np.sqrt(start) + (np.sqrt(end) - np.sqrt(start)) * i / (num - 1)) ** 2
    if schedule == "const":
        return np.full(num, end)
    if schedule == "jsd":
        return 1 / (num - i)
    bar = cosine_alpha_bar(np.arange(num + 1) / num)
    return np.minimum(0.999, 1 - bar[1:] / bar[:-1])


def cosine_alpha_bar(fraction: np.ndarray) -> np.ndarray:
    """Nichol and Dhariwal 2021, equation 17: f(t) / f(0) with s = 0.008."""
    return np.cos((fraction + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2


@dataclass
class Process:
    """alpha_bar and beta at a descending list of timesteps; between two of them beta is 1 - their ratio."""

    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray

    @classmethod
    def respaced(cls, timesteps: np.ndarray | None = None, beta: np.ndarray | None = None) -> "Process":
        """The linear process, or one with `beta`, at `timesteps` (all T ascending when None)."""
        bar = np.cumprod(1 - (betas("linear", 1000) if beta is None else beta))
        if timesteps is None:
            return cls(bar, np.concatenate([[1.0], bar[:-1]]))
        return cls(bar[timesteps], np.concatenate([bar[timesteps[1:]], [1.0]]))

    @property
    def beta(self) -> np.ndarray:
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @property
    def posterior_variance(self) -> np.ndarray:
        return (1 - self.alpha_bar_prev) / (1 - self.alpha_bar) * self.beta

    def forward(self, i: np.ndarray, x0: np.ndarray, eps: np.ndarray) -> np.ndarray:
        """Equation 4."""
        return column(np.sqrt(self.alpha_bar[i])) * x0 + column(np.sqrt(1 - self.alpha_bar[i])) * eps

    def dpm_solver(
        self, i: int, x: np.ndarray, x0: np.ndarray, previous: np.ndarray | None, noisy: bool
    ) -> tuple[np.ndarray, float]:
        """Mean and deviation of a step of DPM-Solver++(2M): Lu et al. 2022b, algorithm 2 and, if noisy, equation 19.

        `previous`: the x_0 prediction of the step before, or None for a first-order step.
        """
        if i == len(self.alpha_bar) - 1:
            return x0, 0.0
        signal, sigma = np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar)
        h = np.diff(np.log(signal / sigma))
        estimate = x0
        if previous is not None:
            r = h[i - 1] / h[i]
            estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        if noisy:
            mean = sigma[i + 1] / sigma[i] * np.exp(-h[i]) * x - signal[i + 1] * np.expm1(-2 * h[i]) * estimate
            return mean, float(sigma[i + 1] * np.sqrt(-np.expm1(-2 * h[i])))
        return sigma[i + 1] / sigma[i] * x - signal[i + 1] * np.expm1(-h[i]) * estimate, 0.0

    def posterior_mean(self, i: np.ndarray, x0: np.ndarray, x_t: np.ndarray) -> np.ndarray:
        """Equation 7."""
        bar, prev, beta = (column(table[i]) for table in (self.alpha_bar, self.alpha_bar_prev, self.beta))
        return np.sqrt(prev) * beta / (1 - bar) * x0 + np.sqrt(1 - beta) * (1 - prev) / (1 - bar) * x_t

    def target(self, i: np.ndarray, prediction: str, x0: np.ndarray, x_t: np.ndarray, eps: np.ndarray) -> np.ndarray:
        """What a perfect network puts out."""
        if prediction == "eps":
            return eps
        if prediction == "x0":
            return x0
        if prediction == "v":  # Salimans and Ho 2022
            return column(np.sqrt(self.alpha_bar[i])) * eps - column(np.sqrt(1 - self.alpha_bar[i])) * x0
        return self.posterior_mean(i, x0, x_t)

    def predict_x0(self, i: np.ndarray, prediction: str, out: np.ndarray, x_t: np.ndarray) -> np.ndarray:
        """Each definition solved for x_0."""
        bar = column(self.alpha_bar[i])
        if prediction == "eps":
            return (x_t - np.sqrt(1 - bar) * out) / np.sqrt(bar)
        if prediction == "x0":
            return out
        if prediction == "v":
            return np.sqrt(bar) * x_t - np.sqrt(1 - bar) * out
        prev, beta = column(self.alpha_bar_prev[i]), column(self.beta[i])
        return (out - np.sqrt(1 - beta) * (1 - prev) / (1 - bar) * x_t) * (1 - bar) / (np.sqrt(prev) * beta)


def column(values: np.ndarray) -> np.ndarray:
    """Per-image values against (N, C, H, W)."""
    return np.asarray(values).reshape(-1, 1, 1, 1)


def reverse_chain(
    network: Callable[[np.ndarray, int], np.ndarray], timesteps: np.ndarray, seeds: np.ndarray, seed: int, *,
    shape: tuple[int, int, int] = (1, 2, 2), variance: str = "fixedlarge", eta: float | None = None,
    method: str = "ancestral",
) -> np.ndarray:  # fmt: skip
    """Algorithm 2, DDIM where eta is given, or dpm2m or dpm2m-sde, for a network that predicts eps: (N, *shape)."""
    process, previous = Process.respaced(timesteps), None
    x = normals(shape, seeds, seed, step=0, stream=0)
    for i, t in enumerate(timesteps.tolist()):
        bar, prev, beta = process.alpha_bar[i], process.alpha_bar_prev[i], process.beta[i]
        x0 = np.clip((x - np.sqrt(1 - bar) * network(x, t)) / np.sqrt(bar), -1, 1)
        if method.startswith("dpm2m"):
            x, sigma = process.dpm_solver(i, x, x0, previous, method == "dpm2m-sde")
            previous = x0
        elif eta is None:
            x = process.posterior_mean(np.full(len(x), i), x0, x)
            sigma = np.sqrt(process.posterior_variance[i] if variance == "fixedsmall" else beta)
        else:
            sigma = eta * np.sqrt((1 - prev) / (1 - bar) * beta)
            eps = (x - np.sqrt(bar) * x0) / np.sqrt(1 - bar)
            x = np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps
        if i < len(timesteps) - 1:
            x = x + sigma * normals(shape, seeds, seed, t, stream=1)
    return np.clip(x, -1, 1)


# The bound: section 3 of the paper, its code's tanh for the normal CDF


def gaussian_kl(mean1: np.ndarray, log_var1: np.ndarray, mean2: np.ndarray, log_var2: np.ndarray) -> np.ndarray:
    ratio = log_var1 - log_var2
    return 0.5 * (np.expm1(ratio) - ratio + (mean1 - mean2) ** 2 / np.exp(log_var2))


def normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def bin_mass(x0: np.ndarray, mean: np.ndarray, log_var: np.ndarray) -> np.ndarray:
    """Equation 13."""
    deviation = np.exp(0.5 * log_var)
    upper = np.where(x0 > 0.999, 1.0, normal_cdf((x0 - mean + 1 / 255) / deviation))
    lower = np.where(x0 < -0.999, 0.0, normal_cdf((x0 - mean - 1 / 255) / deviation))
    return upper - lower
