"""Choose the timesteps with the smallest variational bound for the given images (Watson et al. 2021)."""

import numpy as np
import torch

from fastddpm.diffusion import Diffusion, Posterior
from fastddpm.kernels.philox import STREAM_PAD
from fastddpm.kernels.philox.reference import normals, philox
from fastddpm.sampling.sampler import Sampler

_CANDIDATES = 1024
_EVALUATED = 80  # timesteps at which the error is measured; its logarithm is interpolated linearly between them
_IMAGES = 32  # images on which it is measured


def best_timesteps(
    sampler: Sampler, images: np.ndarray, labels: np.ndarray | None, steps: int | None, last: int
) -> list[int]:
    """Return `steps` timesteps, descending from T - 1 to `last`; all of that range if `steps` is None or too large.

    The mean squared error of the x_0 prediction is measured on up to 32 of `images`, uint8 (N, C, H, W); the path with
    the smallest sum of KL divergences is found by dynamic programming. Evenly spread timesteps can cost several times
    the bits, because nearly all bits are spent at small t.
    """
    diffusion = sampler.diffusion
    if steps is None or steps >= diffusion.timesteps - last:
        return list(range(diffusion.timesteps - 1, last - 1, -1))
    candidates = _squared(last, diffusion.timesteps - 1, _CANDIDATES)
    measured = _squared(last, diffusion.timesteps - 1, _EVALUATED)
    chosen = _some(images)
    errors = _errors(sampler, images[chosen], None if labels is None else labels[chosen], measured)
    errors = np.exp(np.interp(candidates, measured, np.log(errors)))
    path = shortest_path(divergences(diffusion, candidates, errors), min(steps, len(candidates)))
    return candidates[path][::-1].tolist()


def divergences(diffusion: Diffusion, timesteps: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats per dimension, float64 (n, n): row s, column t.

    `timesteps` (n,): ascending. `errors` (n,): mean squared error of the x_0 prediction at each. Entries with s >= t
    are infinite. A learned variance is approximated by the posterior's.
    """
    s, t = diffusion.alpha_bar[timesteps][:, None], diffusion.alpha_bar[timesteps][None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        posterior = Posterior.between(t, s)
        variance = posterior.beta if diffusion.config.variance == "fixedlarge" else posterior.variance
        ratio = posterior.variance / variance
        mean = posterior.from_x0**2 * errors / variance
        found = 0.5 * (ratio - 1 - np.log(ratio) + mean)
    return np.where(np.triu(np.ones_like(found), 1) > 0, found, np.inf)


def mean_squared_error(sampler: Sampler, images: np.ndarray, labels: np.ndarray | None, t: int) -> float:
    """Return the mean squared error of the clipped x_0 prediction from x_t, in units of [-1, 1] squared.

    It is measured on up to 32 of `images`, uint8 (N, C, H, W).
    """
    chosen = _some(images)
    return float(_errors(sampler, images[chosen], None if labels is None else labels[chosen], np.array([t]))[0])


def shortest_path(costs: np.ndarray, points: int) -> np.ndarray:
    """Return `points` ascending indices, first and last included, with the smallest sum of costs[i, j] on the path."""
    total = np.full(len(costs), np.inf)
    total[0] = 0.0
    came_from = []
    for _ in range(points - 1):
        sums = total[:, None] + costs
        came_from.append(sums.argmin(axis=0))
        total = sums.min(axis=0)
    path = [len(costs) - 1]
    for back in reversed(came_from):
        path.append(int(back[path[-1]]))
    return np.array(path[::-1])


def _some(images: np.ndarray) -> np.ndarray:
    """Return the indices of up to 32 evenly spread images."""
    return np.linspace(0, len(images) - 1, min(len(images), _IMAGES)).round().astype(int)


def _squared(first: int, last: int, count: int) -> np.ndarray:
    """Return up to `count` integers from `first` to `last`, denser near `first`. All of them if there are fewer."""
    if last - first < count:
        return np.arange(first, last + 1)
    return np.unique(np.round(first + (last - first) * np.linspace(0, 1, count) ** 2).astype(np.int64))


def _errors(sampler: Sampler, images: np.ndarray, labels: np.ndarray | None, timesteps: np.ndarray) -> np.ndarray:
    """Return the mean squared error of the clipped x_0 prediction at each timestep, from one noise draw per image."""
    device = sampler.device
    x0 = images.astype(np.float64) / 127.5 - 1
    label = None if labels is None else torch.from_numpy(labels).to(device)
    blocks = np.arange(-(-x0.size // 4))
    errors = []
    with sampler.unchanging():
        for t in timesteps.tolist():
            words = philox(blocks, np.zeros(1), np.array(t), np.array(STREAM_PAD), 1)
            eps = normals(words).reshape(-1)[: x0.size].reshape(x0.shape)
            alpha_bar = sampler.diffusion.alpha_bar[t]
            x_t = torch.from_numpy((np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * eps).astype(np.float32)).to(
                device
            )
            out = sampler.denoise(x_t, t, label)
            at = torch.full((len(x0),), t, dtype=torch.int64, device=device)
            prediction = sampler.diffusion.predict_x0(out, x_t, at).clamp(-1, 1).double().cpu().numpy()
            errors.append(float(np.square(prediction - x0).mean()))
    return np.maximum(errors, 1e-12)
