"""The kernel distance between two sets of features: unbiased MMD² with a cubic kernel (Bińkowski et al. 2018)."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.data import epoch_order
from fastddpm.errors import UsageError

SUBSETS, SUBSET_SIZE = 100, 1000
_BLOCK = 2048  # features of each set whose kernel matrix is computed at a time

Progress = Callable[[int, int], None]


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (x·y / d + 1)³ for every pair: (N, M) from (N, d) and (M, d)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(a: Tensor, b: Tensor, progress: Progress | None = None) -> float:
    """Return the unbiased estimate of MMD² from all pairs of features (N, d) and (M, d), in float64 and bounded memory.

    Its expectation is 0 for two samples of one distribution, so it may be negative. `progress(done, total)` counts
    blocks of the kernel matrices. Raises `UsageError` for fewer than 2 images.
    """
    x, y = _checked(a, b)
    n, m = len(x), len(y)
    blocks_x, blocks_y = x.split(_BLOCK), y.split(_BLOCK)
    total = len(blocks_x) * (len(blocks_x) + 1) // 2 + len(blocks_y) * (len(blocks_y) + 1) // 2
    total += len(blocks_x) * len(blocks_y)
    done = 0

    def summed(left: Tensor, right: Tensor) -> float:
        nonlocal done
        value = float(polynomial_kernel(left, right).sum())
        done += 1
        if progress is not None:
            progress(done, total)
        return value

    def within(blocks: tuple[Tensor, ...]) -> float:
        """Return the sum over ordered pairs of two different points of one set."""
        whole = 0.0
        for i, block in enumerate(blocks):
            own = ((block.square().sum(1) / block.shape[1] + 1) ** 3).sum()
            whole += summed(block, block) - float(own)
            whole += 2 * sum(summed(block, other) for other in blocks[i + 1 :])
        return whole

    across = sum(summed(left, right) for left in blocks_x for right in blocks_y)
    return within(blocks_x) / (n * (n - 1)) + within(blocks_y) / (m * (m - 1)) - 2 * across / (n * m)


def kernel_distance_of_subsets(
    a: Tensor,
    b: Tensor,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Return KID as usually reported: mean and standard deviation (divisor N) of estimates from pairs of subsets.

    `subsets`: number of pairs. `size`: points in a subset, drawn without replacement by Philox keys of (seed, subset,
    point). `progress(done, total)` counts pairs. Raises `UsageError` if a set has fewer than `size` points.
    """
    x, y = _checked(a, b)
    if subsets < 1 or not 2 <= size <= min(len(x), len(y)):
        raise UsageError(
            f"the kernel distance takes 1 subset or more of 2 to {min(len(x), len(y))} images; got {subsets} of {size}"
        )
    found = []
    for i in range(subsets):
        found.append(kernel_distance(_drawn(x, size, seed, 2 * i), _drawn(y, size, seed, 2 * i + 1)))
        if progress is not None:
            progress(i + 1, subsets)
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def _drawn(points: Tensor, size: int, seed: int, draw: int) -> Tensor:
    chosen = torch.from_numpy(epoch_order(len(points), seed, draw)[:size].copy())
    return points[chosen.to(points.device)]


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UsageError(f"features must be (N, d) and (M, d); got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise UsageError(f"the kernel distance needs 2 images or more of each set; got {len(a)} and {len(b)}")
    return a.to(torch.float64), b.to(torch.float64)
