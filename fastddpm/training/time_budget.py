"""How many steps a run can take in a number of minutes, from the time of its first steps."""

import gc
import time
from collections.abc import Callable

import torch

from fastddpm.config import Preset
from fastddpm.data import Dataset
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup, on_main
from fastddpm.runtime.progress import announced, counted, duration

from .trainer import Trainer

WARM_UP = 3  # steps that are not timed: the first ones allocate memory, and compile
MEASURED_S = 10.0
FEW_STEPS = 500
_MOST_MEASURED = 200  # steps
_PREVIEWS, _PREVIEW_IMAGES = 4, 16
_EVALUATION = 1 / 4  # of a training step, for as many images: no backward pass, which costs twice as much, and no step
_MOST_SAMPLING = 0.5  # of the time


def steps_within(
    minutes: float,
    preset: Preset,
    dataset: Dataset,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    data_workers: int | None = None,
    report: Callable[[str], None],
) -> int:
    """Return the steps of `preset` that `minutes` allow, with the samples at the end, and report how they were found.

    Takes steps for about ten seconds with a trainer of its own, which is thrown away: a run of the returned steps
    begins as any other. Every process calls this and gets the number that rank 0 has measured.
    """
    with announced("timing the first steps", report):
        seconds = seconds_per_step(preset, dataset, device, group, data_workers=data_workers)
    samples = sampling_seconds(preset, seconds)
    sampling = min(samples, _MOST_SAMPLING * 60 * minutes)
    steps = on_main(lambda: two_digits((60 * minutes - sampling) / seconds), group)
    time_given = counted(minutes, "minutes")
    report(
        f"{counted(steps, 'steps')}: {time_given} at {seconds:.2g} s a step, with {duration(sampling)} for samples; "
        "--steps or --minutes changes it"
    )
    if samples > sampling:
        report(
            f"note: the samples take {duration(samples)}, so the run takes longer than {time_given}; fewer "
            "--sample.count, --sample.steps or more --preview-every shorten it"
        )
    if steps < FEW_STEPS:
        report(
            f"note: {counted(steps, 'steps')} give blurred colours at best; it takes {FEW_STEPS:,} and more to see "
            "shapes: give more --minutes, or a smaller --image-size or --network"
        )
    return steps


def seconds_per_step(
    preset: Preset,
    dataset: Dataset,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    data_workers: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds that a training step takes, by `mean_step` of a new trainer."""
    trainer = Trainer(preset, dataset, device, group, data_workers=data_workers)
    try:
        _timed(trainer, WARM_UP, clock)
        return mean_step(trainer, MEASURED_S, clock)
    finally:
        trainer.batches.close()
        del trainer
        gc.collect()  # a network and its optimizer refer to each other; the run needs the memory
        if device.type == "cuda":
            torch.cuda.empty_cache()


def mean_step(trainer: Trainer, seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Take steps with `trainer` for about so many seconds, at least 2; return the mean seconds of one, on all ranks."""
    guess = _timed(trainer, 1, clock)
    steps = on_main(lambda: max(1, min(_MOST_MEASURED, int(seconds / max(guess, 1e-6)))), trainer.group)
    taken = _timed(trainer, steps, clock)
    return on_main(lambda: taken / steps, trainer.group)


def _timed(trainer: Trainer, steps: int, clock: Callable[[], float]) -> float:
    """Take so many steps and return their seconds."""
    started = clock()
    for _ in range(steps):
        loss, _, _ = trainer.train_step()
    loss.item()  # waits for the device
    return clock() - started


def sampling_seconds(preset: Preset, seconds_per_step: float) -> float:
    """Return about how many seconds the samples at the end and the previews take, without the compiled engine."""
    steps = preset.sample.steps or preset.diffusion.timesteps
    guided = 2 if preset.sample.guidance != 1.0 else 1
    images = preset.sample.count * steps
    if preset.train.preview_every:
        images += _PREVIEWS * _PREVIEW_IMAGES * preset.train.preview_steps
    return images * guided * _EVALUATION * seconds_per_step / preset.train.batch


def two_digits(number: float) -> int:
    """Return `number` rounded down to two significant digits; at least 1."""
    whole = max(1, int(number))
    unit = 10 ** max(0, len(str(whole)) - 2)
    return whole // unit * unit
