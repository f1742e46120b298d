"""Progressive generation: Figure 6 of the paper."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastddpm.figures import to_uint8
from fastddpm.sampler import Sampler

from .drawing import Progress, evenly, image_shape, part_of, parts, states


@dataclass(frozen=True, eq=False)
class Progressive:
    """x_0 predictions of N chains at K of their steps, from x_t: `x0`, uint8 (N, K, C, H, W).

    `depths`: int64 (K,), steps of the forward process that x_t has behind it, t + 1.
    """

    x0: np.ndarray
    depths: np.ndarray


def progressive(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    steps: Sequence[int] | None = None,
    batch: int = 64,
    progress: Progress | None = None,
) -> Progressive:
    """Figure 6: what a chain takes for x_0 on its way.

    `steps`: of the chain, 0..steps-1; ten evenly spread, unless given, of which the last shows the images themselves.
    Raises `UsageError` for others.
    """
    chosen = evenly(10, sampler.steps - 1) if steps is None else list(steps)
    x0 = np.empty((len(seeds), len(chosen), *image_shape(sampler)), np.uint8)
    for part in parts(len(seeds), batch):
        for state in states(sampler, seeds[part], part_of(labels, part), set(chosen), progress=progress):
            x0[part, [i for i, step in enumerate(chosen) if step == state.step]] = to_uint8(state.x0)[:, None]
    return Progressive(x0, sampler.timesteps[chosen] + 1)
