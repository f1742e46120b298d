"""The noise schedules: beta_t of each. Imports no torch."""

import math

import numpy as np

from .run import DiffusionConfig

_COSINE_OFFSET = 0.008  # s of Nichol and Dhariwal 2021, equation 17
_COSINE_MAX_BETA = 0.999


def betas(config: DiffusionConfig) -> np.ndarray:
    """Return beta_t for t = 0..T-1 (the paper's t = 1..T): float64 (T,), each in (0, 1].

    linear: equally spaced from beta_start to beta_end. quad: with equally spaced square roots. const: beta_end.
    jsd: 1/T, 1/(T-1), .., 1. These four are the released code's, which does not rescale them with T.
    cosine: alpha_bar(t) = cos^2((t/T + s)/(1 + s) pi/2), beta at most 0.999 (Nichol and Dhariwal 2021).
    Where `betas` gives them, they are these.
    With `zero_terminal_snr`, sqrt(alpha_bar) is then shifted and scaled to end at 0 and begin as before (algorithm 1 of
    Lin et al. 2023).
    """
    num, start, end = config.timesteps, config.beta_start, config.beta_end
    if config.betas is not None:
        scheduled = np.array(config.betas, dtype=np.float64)
    elif config.schedule == "linear":
        scheduled = np.linspace(start, end, num)
    elif config.schedule == "quad":
        scheduled = np.linspace(start**0.5, end**0.5, num) ** 2
    elif config.schedule == "const":
        scheduled = np.full(num, end)
    elif config.schedule == "jsd":
        scheduled = 1.0 / np.linspace(num, 1, num)
    else:
        fraction = (np.arange(num + 1) / num + _COSINE_OFFSET) / (1 + _COSINE_OFFSET)
        alpha_bar = np.cos(fraction * math.pi / 2) ** 2
        scheduled = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], _COSINE_MAX_BETA)
    if config.zero_terminal_snr:
        root = np.sqrt(np.cumprod(1 - scheduled))
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        scheduled = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return scheduled
