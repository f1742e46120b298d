"""Noise schedules beta_1..beta_T, in float64."""

import math

import numpy as np

from .config import DiffusionConfig

_COSINE_OFFSET = 0.008  # s of Nichol and Dhariwal 2021, equation 17
_COSINE_MAX_BETA = 0.999


def betas(config: DiffusionConfig) -> np.ndarray:
    """beta_t for t = 0..T-1 (the paper's t = 1..T): float64 (T,), each in (0, 1].

    linear: equally spaced from beta_start to beta_end. quad: their square roots are. const: beta_end.
    jsd: 1/T, 1/(T-1), .., 1. These are the released code's, which does not rescale them with T.
    cosine: alpha_bar(t) = cos^2((t/T + s)/(1 + s) pi/2), beta at most 0.999 (Nichol and Dhariwal 2021).
    """
    num = config.timesteps
    if config.schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, num, dtype=np.float64)
    if config.schedule == "quad":
        return np.linspace(config.beta_start**0.5, config.beta_end**0.5, num, dtype=np.float64) ** 2
    if config.schedule == "const":
        return np.full(num, config.beta_end, dtype=np.float64)
    if config.schedule == "jsd":
        return 1.0 / np.linspace(num, 1, num, dtype=np.float64)

    def alpha_bar(fraction: np.ndarray) -> np.ndarray:
        return np.cos((fraction + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2

    steps = np.arange(num, dtype=np.float64)
    return np.minimum(1 - alpha_bar((steps + 1) / num) / alpha_bar(steps / num), _COSINE_MAX_BETA)
