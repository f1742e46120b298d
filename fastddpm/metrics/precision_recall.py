"""Improved precision and recall: the share of each set of images that lies within the other set's manifold."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastddpm.errors import UsageError

NEIGHBOURS = 3
_BLOCK_BYTES = 64 * 2**20

Progress = Callable[[int, int], None]


def precision_recall(
    real: Tensor, fake: Tensor, k: int = NEIGHBOURS, progress: Progress | None = None
) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2) of features (N, d) and (M, d).

    Precision: the share of `fake` points that are no further from some real point than that point's k-th nearest other
    real point. Recall: the same with the roles swapped. Computed in float64, a block of rows at a time, with about
    256 MiB beside the features. `progress(done, total)` counts rows. Raises `UsageError` for k or fewer images.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise UsageError(f"features must be (N, d) and (M, d); got {tuple(real.shape)} and {tuple(fake.shape)}")
    if not 1 <= k < min(len(real), len(fake)):
        raise UsageError(
            f"{k} neighbours need more images of each set, at least {k + 1}; got {len(real)} and {len(fake)}"
        )
    centre = real.to(torch.float64).mean(0)  # centred points lose less precision in the differences of squares
    x, y = (z.to(torch.float64) - centre for z in (real, fake))
    total, done = 2 * len(x) + len(y), 0

    def report(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    def radii(points: Tensor) -> Tensor:
        """Return the squared distance of each point to its k-th nearest other point."""
        found = []
        for rows in _squared_distances(points, points):
            found.append(rows.kthvalue(k + 1, dim=1).values)  # the nearest is the point itself
            report(len(rows))
        return torch.cat(found)

    radius_x, radius_y = radii(x), radii(y)
    covered_y = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    covered_x = []
    for start, rows in zip(_starts(len(x), len(y)), _squared_distances(x, y), strict=True):
        covered_y |= (rows <= radius_x[start : start + len(rows), None]).any(0)
        covered_x.append((rows <= radius_y).any(1))
        report(len(rows))
    return float(covered_y.double().mean()), float(torch.cat(covered_x).double().mean())


def _starts(rows: int, columns: int) -> range:
    return range(0, rows, max(1, _BLOCK_BYTES // (8 * columns)))


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield |x_i - y_j|², float64, for some rows i at a time.

    Computed as |x|² + |y|² - 2 x·y, a matrix product. Values within rounding error of 0 are set to 0, so that a point
    is at distance 0 from its copies.
    """
    squares_y = y.square().sum(1)
    noise = x.shape[1] * torch.finfo(torch.float64).eps
    starts = _starts(len(x), len(y))
    for start in starts:
        part = x[start : start + starts.step]
        squares = part.square().sum(1, keepdim=True) + squares_y
        distances = torch.addmm(squares, part, y.T, alpha=-2)
        yield torch.where(distances <= noise * squares, 0.0, distances)
