"""Checks of values that configurations and calls share: each names what came and what is expected. Imports no torch."""

import math
import numbers
import operator
import typing
from collections.abc import Iterator
from typing import Any

from fastddpm.errors import UsageError, refuse

SIGMA_REL = (0.001, 0.28)  # lengths of power-function averages; 1 / sqrt(12) = 0.2887 is the mean of all steps
MOST_BETAS = 10_000  # given one by one: more would make every document of a run that large
MAX_GUIDANCE = 1e6  # far above any useful scale, far below an overflow of float32


def integer(value: Any, name: str) -> int:
    """Return `value` as an int. Raises `UsageError`, with the value's `name`, for anything but an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be an integer; got {value!r:.100}") from None


def check_seed(seed: int) -> None:
    """Raise `UsageError` for a seed that is no integer of 64 bits."""
    refuse([] if -(2**63) <= integer(seed, "seed") < 2**63 else [f"seed must be in -2^63..2^63-1; got {seed}"])


def check_chain(method: str, eta: float, guidance: float) -> None:
    """Raise `UsageError` for a positive `eta` without DDIM, and for a guidance scale out of range."""
    refuse(chain_problems(method, eta, guidance))


def chain_problems(method: str, eta: float, guidance: float) -> Iterator[str]:
    for name, value in (("eta", eta), ("guidance", guidance)):
        if not isinstance(value, numbers.Real):
            yield f"{name} must be a number; got {value!r:.100}"
            return
    if eta and method != "ddim":
        yield f"eta is of method ddim, {method} has none; got {eta}"
    if not 0 <= guidance <= MAX_GUIDANCE:
        yield f"guidance must be in 0..{MAX_GUIDANCE:g}; got {guidance}"


def guidance_problems(
    interval: Any,
    rescale: Any,
    threshold: Any,
    threshold_max: Any = None,
    *,
    timesteps: int | None = None,
    prediction: str = "eps",
    method: str = "ddim",
) -> Iterator[str]:
    """Yield what is wrong with the interval and the rescaling of guidance, the dynamic threshold and its largest value.

    `timesteps`, T, `prediction` and `method`: what they shall be used with. Default: only their own ranges are checked.
    """
    ends = interval if isinstance(interval, tuple | list) else ()
    if interval is not None and not (
        len(ends) == 2 and all(isinstance(end, numbers.Integral) for end in ends) and 0 <= ends[0] <= ends[1]
    ):
        yield f"guidance_interval must be two timesteps, 0 <= low <= high; got {interval!r:.100}"
    elif interval is not None and timesteps is not None and ends[1] >= timesteps:
        yield f"guidance_interval must be within timesteps 0..{timesteps - 1}; got {interval!r:.100}"
    if not isinstance(rescale, numbers.Real) or not 0 <= float(rescale) <= 1:
        yield f"guidance_rescale must be in [0, 1]; got {rescale!r:.100}"
    if threshold is not None and (not isinstance(threshold, numbers.Real) or not 0 < float(threshold) < 1):
        yield f"dynamic_threshold must be in (0, 1); got {threshold!r:.100}"
    limited = threshold_max is not None
    if limited and (not isinstance(threshold_max, numbers.Real) or not 1 <= float(threshold_max) < math.inf):
        yield f"dynamic_threshold_max must be 1 or more, and finite; got {threshold_max!r:.100}"
    if prediction == "xprev":
        if rescale:
            yield "guidance_rescale is for networks that predict eps, x0 or v; this one predicts xprev"
        if threshold is not None and method == "ancestral":
            yield (
                "dynamic_threshold is of the x_0 prediction, which ancestral steps do not use if the network predicts "
                "xprev; take another method"
            )


def beta_problems(betas: tuple[float, ...], timesteps: int) -> Iterator[str]:
    """Yield what is wrong with the betas that stand in place of a schedule of `timesteps`."""
    if len(betas) != timesteps:
        yield f"betas must be one for each of {timesteps} timesteps; got {len(betas)}"
    elif timesteps > MOST_BETAS:
        yield f"betas are given for up to {MOST_BETAS:,} timesteps; got {timesteps:,}"
    # 1 - beta must be below 1, and above 0 but for the last: otherwise x_t has no noise, or no signal from there on.
    wrong = [beta for i, beta in enumerate(betas) if not (0 < 1 - beta < 1 or (beta == 1 and i == len(betas) - 1))]
    if wrong:
        yield f"betas must be in (0, 1), the last may be 1; got {wrong[0]}"


def snapshot_problems(every: int, lengths: tuple[float, ...]) -> Iterator[str]:
    """Yield what is wrong with the options of snapshots of power-function averages."""
    if every < 0:
        yield f"ema_snapshots must be 0 (for none) or more steps; got {every}"
    if not lengths or len(set(lengths)) < len(lengths):
        yield f"ema_snapshot_lengths must be one length, or several that differ; got {lengths}"
    for length in lengths:
        yield from sigma_rel_problems(length, "ema_snapshot_lengths")


def sigma_rel_problems(sigma_rel: float, name: str) -> Iterator[str]:
    """Yield a problem for a length of a power-function average that is out of range. `name`: of the option."""
    low, high = SIGMA_REL
    if not low <= sigma_rel <= high:
        yield f"{name} must be in {low:g}..{high:g} (the plain mean of all steps has 0.2887); got {sigma_rel:g}"


def positive(config: Any, *names: str) -> Iterator[str]:
    """Yield a problem for each of the fields `names` that is not above 0."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            yield f"{name} must be positive; got {value}"


def range_problems(config: Any, name: str, low: float, high: float, *, closed: bool = False) -> Iterator[str]:
    value = getattr(config, name)
    if not (low <= value < high or (closed and value == high)):
        yield f"{name} must be in [{low}, {high}{']' if closed else ')'}; got {value}"


def choice_problems(config: Any, name: str) -> Iterator[str]:
    choices = typing.get_args(typing.get_type_hints(type(config))[name])
    value = getattr(config, name)
    if value not in choices:
        yield f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}"
