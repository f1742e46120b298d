"""The timesteps of a chain that takes fewer than T steps."""

import typing
import warnings
from collections.abc import Sequence

import numpy as np

from fastddpm.config import Method, Spacing
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.runtime.checks import integer

from .step_table import MULTISTEP

FEW = 8  # steps below which log-SNR spacing leaves none where shapes are decided
MANY = 50  # steps up to which DPM-Solver++ with noise gives the better images
_KARRAS_RHO = 7.0  # Karras et al. 2022, equation 5


def method_for(steps: int, *, multistep: bool = True) -> tuple[Method, Spacing]:
    """Return the method and the spacing that suit a chain of `steps` steps (docs/measurements/few_steps.md).

    `multistep` False: without DPM-Solver++, for chains whose states are changed between the steps.
    """
    if steps > MANY or not multistep:
        return "ancestral", "even"
    return ("dpm2m", "even") if steps < FEW else ("dpm2m-sde", "logsnr")


def choose_timesteps(
    diffusion: Diffusion,
    method: str,
    steps: int | None,
    spacing: str,
    timesteps: Sequence[int] | None,
    steps_offset: int = 0,
) -> np.ndarray:
    """Return the timesteps of a chain, int64 (S,): `timesteps` if given, otherwise `steps` of them, by default all T.

    Raises `UsageError` unless `timesteps` are integers in 0..T-1, descending, and for what `spaced_timesteps` refuses.
    """
    if timesteps is None:
        steps = diffusion.timesteps if steps is None else steps
        return spaced_timesteps(diffusion, method, steps, spacing, steps_offset)
    if steps is not None:
        raise UsageError(f"give steps or timesteps, not both; got {steps} and {list(timesteps)}")
    if spacing != "even" or steps_offset:
        raise UsageError(f"give spacing or timesteps, not both; got {spacing} and {list(timesteps)}")
    given = np.asarray(timesteps)
    if given.size and given.dtype.kind not in "iu":
        raise UsageError(f"timesteps must be integers; got {given.tolist()}")
    given = given.astype(np.int64)
    if len(given) == 0 or (np.diff(given) >= 0).any():
        raise UsageError(f"timesteps must be one or more, descending; got {given.tolist()}")
    if given[0] >= diffusion.timesteps or given[-1] < 0:
        raise UsageError(f"timesteps must be in 0..{diffusion.timesteps - 1}; got {given[0]}..{given[-1]}")
    return given


def spaced_timesteps(diffusion: Diffusion, method: str, steps: int, spacing: str, steps_offset: int = 0) -> np.ndarray:
    """Return the timesteps of a chain of `steps` steps, int64, descending, each in 0..T-1. T steps take all of them.

    `spacing` of N < T steps:
    even: evenly spread over the timesteps, both ends included; a single step is T - 1.
    logsnr: those nearest to an even spread of log(alpha_bar / (1 - alpha_bar)), both ends included.
    karras: those nearest to an even spread of sigma^(1/7), where sigma^2 = (1 - alpha_bar) / alpha_bar (equation 5 of
    Karras et al. 2022), both ends included.
    linspace, leading, trailing: those of diffusers' scheduler of the same `method`. For ancestral and ddim these are
    linspace(0, T - 1, N); k (T // N) + `steps_offset`; and T - 1 - k T / N; rounded, for k = 0..N-1. For dpm2m and
    dpm2m-sde, linspace and leading are those of N + 1 steps without the last.

    Timesteps that come up twice are taken once, and a warning says how many are left. Raises `UsageError` for `steps`
    outside 1..T, for an unknown spacing, for one that would begin at timestep 0, where hardly any noise is left, and
    unless `steps_offset` is 0, or with leading below the distance of two timesteps.
    """
    total = diffusion.timesteps
    timesteps = spread_timesteps(total, steps)
    if spacing not in typing.get_args(Spacing):
        raise UsageError(f"spacing must be one of {', '.join(typing.get_args(Spacing))}; got {spacing!r}")
    if integer(steps_offset, "steps_offset") and spacing != "leading":
        raise UsageError(f"steps_offset is of spacing leading, {spacing} has none; got {steps_offset}")
    if spacing == "even" or steps == total:
        return timesteps
    left_out = 1 if method in MULTISTEP else 0
    points = steps + left_out
    if not 0 <= steps_offset < total // points:  # up to it the first timestep is below T, and the last one before 0
        raise UsageError(
            f"steps_offset must be in 0..{total // points - 1}, below the distance of the timesteps of {steps} steps; "
            f"got {steps_offset}; take fewer steps, or another spacing"
        )
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, points).round()[left_out:]
    elif spacing == "leading":
        timesteps = (np.arange(points) * (total // points))[left_out:] + steps_offset
    elif spacing == "trailing":
        timesteps = np.arange(total, 0, -total / steps)[:steps].round() - 1  # rounded as theirs: 48 of 1000 has a tie
    else:
        timesteps = _nearest_in_noise(diffusion, steps, spacing)
    distinct = np.flip(np.unique(timesteps.astype(np.int64))).copy()
    if distinct[0] == 0:
        raise UsageError(
            f"spacing {spacing} of 1 step takes timestep 0, which removes no noise; take another, or 2 steps"
        )
    if len(distinct) < steps:
        warnings.warn(
            f"spacing {spacing} gives {len(distinct)} different timesteps for {steps} steps; the chain takes these",
            stacklevel=4,  # the caller of Sampler
        )
    return distinct


def spread_timesteps(timesteps: int, steps: int) -> np.ndarray:
    """Return `steps` of the timesteps 0..timesteps-1, int64 (steps,), descending and evenly spread, both ends included.

    A single step is timestep timesteps - 1. Raises `UsageError` unless 1 <= `steps` <= `timesteps`.
    """
    if not 1 <= integer(steps, "steps") <= timesteps:
        raise UsageError(f"steps must be in 1..{timesteps}; got {steps}")
    return np.round(np.linspace(timesteps - 1, 0, steps)).astype(np.int64)


def _nearest_in_noise(diffusion: Diffusion, steps: int, spacing: str) -> np.ndarray:
    """Return `steps` timesteps, int64 and descending: those whose log(alpha / sigma) is nearest to the wanted ones."""
    ascending = diffusion.log_signal_to_noise[::-1]
    # The last timestep of schedule jsd has no signal. It counts as one with a little less than the one before.
    ascending = np.maximum(ascending, ascending[np.isfinite(ascending)].min() - 1)
    first, last = ascending[0], ascending[-1]
    if spacing == "logsnr":
        wanted = np.linspace(first, last, steps)
    else:
        wanted = -_KARRAS_RHO * np.log(np.linspace(np.exp(-first / _KARRAS_RHO), np.exp(-last / _KARRAS_RHO), steps))
    above = np.searchsorted(ascending, wanted).clip(1, len(ascending) - 1)
    below_is_nearer = wanted - ascending[above - 1] < ascending[above] - wanted
    return len(ascending) - 1 - (above - below_is_nearer)
