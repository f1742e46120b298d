"""What a training loop tells of itself, in one place."""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from fastddpm.config import Preset
from fastddpm.diffusion import Diffusion
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from fastddpm.runtime.progress import Meter
from fastddpm.unet import UNet

from .loggers import JsonLines, Loggers, read_log
from .profiling import Profile
from .samples import Previews
from .statistics import Clock, Lap, LossByTimestep, memory_mib

# What a line of the log holds of the machine, not of the run: two equal runs may differ in these.
MEASURED = ("images_per_s", "data_wait", "memory_mib")


class Monitor:
    """Progress, log, loggers, previews and profile of one run; `attach` adds all but the first two.

    Of several processes only the first one shows and writes; each calls every method. `clock`, `losses_by_t`: fed by
    the training step. Nothing here is read by training, and nothing waits for the device but `tell` with numbers.
    """

    def __init__(self, preset: Preset, device: torch.device, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self._preset, self._device, self._group = preset, device, group
        self.clock = Clock()
        self.losses_by_t = LossByTimestep(preset.diffusion.timesteps, device)
        self._log: JsonLines | None = None
        self._meter: Meter | None = None
        self._loggers: Loggers | None = None
        self._previews: Previews | None = None
        self._profile: Profile | None = None

    def attach(
        self, *, loggers: Loggers | None = None, previews: Previews | None = None, profile: Profile | None = None
    ) -> None:
        """What else to do; `loggers` and `profile` of the first process only, `previews` of each or none."""
        self._loggers, self._previews, self._profile = loggers, previews, profile

    @contextmanager
    def running(self, step: int, log: JsonLines | None) -> Iterator[None]:
        """The run goes on from `step` inside the block; the first process has its log."""
        self._log = log
        self.clock.restart(step)
        if self._profile is not None:
            self._profile.begin()
        try:
            if not self._group.is_main:
                yield
                return
            total = self._preset.train.steps
            with Meter("training", total, "steps", done=step, seconds_between_lines=None) as self._meter:
                yield
        finally:
            self._meter = None
            if self._profile is not None:
                self._profile.end()

    def log(self, step: int, measured: Callable[[], Mapping[str, float | None]] | None) -> None:
        """A step is done. At a line of the log, `measured` gives its numbers: loss, gradient_norm and lr at least."""
        if self._profile is not None:
            self._profile.step()
        shown = None
        if measured is not None:
            numbers = {name: _finite(value) for name, value in measured().items()}
            # Only now, when the device has been waited for, is the lap over.
            lap, by_t = self.clock.lap(step), self.losses_by_t.read()
            rate = lap.steps_per_s * self._preset.train.batch
            speed = dict(zip(MEASURED, (rate, lap.data_wait, memory_mib(self._device)), strict=True))
            record = {"step": step, **numbers, **speed}
            if self._log is not None:
                self._log.write({**record, "loss_by_t": by_t})
            if self._loggers is not None:
                self._loggers.write(step, record)
            shown = _line(numbers, lap, speed)
        if self._meter is not None:
            self._meter.update(step, shown)

    def preview_due(self, step: int) -> bool:
        """Whether `preview` is to be called after `step` steps; the same in all processes."""
        return self._previews is not None and self._previews.due(step)

    def preview(self, step: int, unet: UNet, diffusion: Diffusion) -> None:
        """Draw the previews from `unet`, and the loss by timestep where matplotlib is installed."""
        assert self._previews is not None
        picture = self._previews.draw(step, unet, diffusion)
        if not self._group.is_main:
            return
        if picture is not None and self._loggers is not None:
            self._loggers.image(step, "preview", picture)
        if self._log is not None and importlib.util.find_spec("matplotlib") is not None:
            self._plot(step, self._log.path)

    def _plot(self, step: int, log: Path) -> None:
        from .plots import loss_by_t

        path = log.parent / "loss-by-t.png"
        try:
            drawn = loss_by_t(read_log(log), self._preset.diffusion.timesteps, path, self._preset.name)
        except (OSError, ImportError) as error:  # a full disk, a library that does not load
            print(f"no plot at step {step}: {error}", file=sys.stderr)
            return
        if drawn and self._loggers is not None:
            self._loggers.image(step, "loss-by-t", path)


def _finite(value: float | None) -> float | None:
    # JSON has neither NaN nor infinity.
    return value if value is None or math.isfinite(value) else None


def _line(numbers: Mapping[str, float | None], lap: Lap, speed: Mapping[str, float | None]) -> str:
    loss, norm, memory = numbers["loss"], numbers["gradient_norm"], speed["memory_mib"]
    parts = [
        "no finite loss" if loss is None else f"loss {loss:.4f}",
        f"{lap.steps_per_s:.2f} steps/s",
        f"{speed['images_per_s']:.0f} images/s",
        "gradient not finite" if norm is None else f"gradient {norm:.3g}",
        f"data {lap.data_wait:.0%}",
        "" if memory is None else f"{memory / 1024:.1f} GiB",
    ]
    return "  ".join(part for part in parts if part)
