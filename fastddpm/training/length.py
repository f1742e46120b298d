"""Is a run long enough to give images? Its average (EMA) must have left the random initial weights behind."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastddpm.config import TrainConfig
from fastddpm.ops.backend import report_obstacles

from .initial import Origin
from .optimizer import decay_at

if TYPE_CHECKING:
    from fastddpm.pretrained.model import Model

MOST_INITIAL = 0.01  # of the initial weights in the average; they are random, and what they add to an image is noise
MOST_WARMUP = 0.5  # of the steps that warm the learning rate up


def initial_share(config: TrainConfig, steps: int) -> float:
    """Return the share of the initial weights in the average that samples are drawn from, after `steps` steps.

    With w_n the weights after step n the average is a_n = d_n a_{n-1} + (1 - d_n) w_n from a_0 = w_0, so the share of
    w_0 is the product d_1 d_2 .. d_steps: ema^steps, or less with ema_ramp.
    """
    decay = config.decays[0]
    return math.prod(decay_at(config, decay, n) for n in range(steps)) if config.ema_ramp else decay**steps


def steps_needed(config: TrainConfig) -> int:
    """Return the least number of steps that give images.

    After them `initial_share` is at most 1 %, which takes log(0.01) / log(ema) steps without ema_ramp, and at most half
    of the steps were warm-up.
    """
    decay = config.decays[0]
    if config.ema_ramp:
        averaged = next(n for n in range(1, 4) if initial_share(config, n) <= MOST_INITIAL)
    else:
        averaged = math.ceil(math.log(MOST_INITIAL) / math.log(decay)) if decay else 1
    return max(averaged, math.ceil(config.warmup / MOST_WARMUP))


def too_short(config: TrainConfig, steps: int, origin: Origin | None = None) -> str | None:
    """Return why `steps` steps of training give no images and how many do; None if they are enough.

    `origin`: the model that training begins with. Its weights are no noise, so only their share is told. Default:
    random weights.
    """
    needed = steps_needed(config)
    if steps >= needed:
        return None
    first = "random initial weights" if origin is None else f"those of {origin.source}"
    reasons = []
    if initial_share(config, steps) > MOST_INITIAL:
        reasons.append(
            f"{100 * initial_share(config, steps):.3g}% of the average that samples are drawn from (--ema "
            f"{config.decays[0]:g}) are still {first}"
        )
    if steps < config.warmup / MOST_WARMUP:
        reasons.append(f"the learning rate warms up for {config.warmup:,} steps (--warmup)")
    purpose = "give images" if origin is None else "leave that model behind"
    return (
        f"{steps:,} steps are too few to {purpose}: {', and '.join(reasons)}. It takes {needed:,} steps with these "
        "options, fewer with a smaller --ema or --ema-ramp and a smaller --warmup"
    )


def report_notes(model: "Model", report: Callable[[str], None]) -> None:
    """Report, before work with `model` begins, what makes it slow, and a training too short to give images."""
    report_obstacles(next(model.unet.parameters()).device.type, report)
    if model.steps is not None and model.average is None:
        report_too_short(model.preset.train, model.steps, report)


def report_too_short(
    config: TrainConfig, steps: int, report: Callable[[str], None], origin: Origin | None = None
) -> None:
    """Report it if `steps` steps of training are too few; `origin` as for `too_short`."""
    reason = too_short(config, steps, origin)
    if reason is not None:
        report(f"note: {reason}")
