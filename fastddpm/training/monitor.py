"""Everything that a training loop reports: progress, log, loggers, previews, plots, profile."""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fastddpm.config import Preset
from fastddpm.diffusion import Diffusion
from fastddpm.runtime import progress
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup

from .loggers import Loggers
from .profiling import Profile
from .run_log import JsonLines, read_log
from .samples import Previews
from .statistics import Clock, Lap, LossByTimestep, memory_mib

# Fields of a log line that depend on the machine: two equal runs may differ in these.
MEASURED = ("images_per_s", "data_wait", "memory_mib")


class Monitor:
    """Progress, log, loggers, previews and profile of one run; `attach` adds all but the first two.

    Every process calls every method; only rank 0 shows and writes. The training step feeds `clock` and `losses_by_t`.
    Training reads nothing from here, and only `log` with numbers and the previews wait for the device.
    """

    def __init__(self, preset: Preset, device: torch.device, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self._preset, self._device, self._group = preset, device, group
        self.clock = Clock()
        self.losses_by_t = LossByTimestep(preset.diffusion.timesteps, device)
        self._log: JsonLines | None = None
        self._meter: progress.Meter | None = None
        self._loggers: Loggers | None = None
        self._previews: Previews | None = None
        self._profile: Profile | None = None

    def attach(
        self, *, loggers: Loggers | None = None, previews: Previews | None = None, profile: Profile | None = None
    ) -> None:
        """Add loggers and a profile (in rank 0 only), and previews (in all ranks or none)."""
        self._loggers, self._previews, self._profile = loggers, previews, profile

    @contextmanager
    def running(self, step: int, log: JsonLines | None) -> Iterator[None]:
        """Show progress from `step` on, and write to `log`, inside the block. `log` is None in other ranks than 0."""
        self._log = log
        self.clock.restart(step)
        if self._profile is not None:
            self._profile.begin()
        try:
            if not self._group.is_main:
                yield
                return
            total = self._preset.train.steps
            with progress.Meter("training", total, "steps", done=step, seconds_between_lines=None) as self._meter:
                yield
        finally:
            self._meter = None
            if self._profile is not None:
                self._profile.end()

    def log(self, step: int, measured: Callable[[], Mapping[str, float | None]] | None) -> None:
        """Note that a step is done, and write a line to the log if `measured` is given.

        `measured` returns the line's numbers: at least loss, gradient_norm and lr.
        """
        if self._profile is not None:
            self._profile.step()
        shown = None
        if measured is not None:
            numbers = {name: _finite(value) for name, value in measured().items()}
            # `measured` waited for the device, so the lap ends here.
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
        """Return whether to call `preview` after `step` steps; the same in all processes."""
        return self._previews is not None and self._previews.due(step)

    def preview(self, step: int, network: nn.Module, diffusion: Diffusion) -> None:
        """Draw the previews with `network`, plot the loss by t if matplotlib is installed, and write the page."""
        assert self._previews is not None
        picture = self._previews.draw(step, network, diffusion)
        if not self._group.is_main:
            return
        if picture is not None and self._loggers is not None:
            self._loggers.image(step, "preview", picture)
        if self._log is not None and importlib.util.find_spec("matplotlib") is not None:
            self._plot(step, self._log.path)
        from .page import try_write_page

        try_write_page(self._previews.run, training=True)

    def _plot(self, step: int, log: Path) -> None:
        from .plots import loss_by_t

        path = log.parent / "loss-by-t.png"
        try:
            drawn = loss_by_t(read_log(log), self._preset.diffusion.timesteps, path, self._preset.name)
        except (OSError, ImportError) as error:  # a full disk, or a library that does not load
            progress.log(f"no plot at step {step}: {error}")
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
