"""Traces of training steps by torch.profiler, for chrome://tracing or Perfetto."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastddpm.runtime.progress import log
from fastddpm.storage.files import write_text, write_whole

WARM_UP = 5  # steps before the trace; the first ones allocate, choose algorithms and compile
_ROWS = 15  # operations in the table


class Profile:
    """Trace `steps` training steps, after `warm_up` others, into `run`/profile.

    Writes trace.json.gz and operations.txt, a table of the slowest operations, which is also reported. Call `begin`,
    `step` after each training step, then `end`.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        device: torch.device,
        *,
        warm_up: int = WARM_UP,
        report: Callable[[str], None] = log,
    ) -> None:
        self.directory, self.steps, self._report, self._warm_up = run / "profile", steps, report, warm_up
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._sort = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
        self._profiler: profile | None = profile(
            activities=activities,
            # The profiler's own first step is slow: the last warm-up step is recorded and discarded.
            schedule=schedule(wait=warm_up - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._done = 0

    def begin(self) -> None:
        """Start counting steps."""
        if self._profiler is not None:
            self._profiler.start()

    def step(self) -> None:
        """Note that a training step is done; stops after the last step of the trace."""
        if self._profiler is None:
            return
        self._done += 1
        self._profiler.step()
        if self._done >= self._warm_up + self.steps:
            self.end()

    def end(self) -> None:
        """Stop, and write the steps traced so far if the run was shorter than the trace."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._done <= self._warm_up:
            self._report(f"no profile: the run took {self._done} steps, and a trace begins after {self._warm_up}")

    def _write(self, profiler: profile) -> None:
        table = profiler.key_averages().table(sort_by=self._sort, row_limit=_ROWS, max_name_column_width=50)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(self.directory / "trace.json.gz", lambda path: _export(profiler, path))
            write_text(self.directory / "operations.txt", table)
        except OSError as error:  # StorageError is one
            self._report(f"no profile in {self.directory}: {error.strerror or error}")
            return
        steps = min(self.steps, self._done - self._warm_up)
        self._report(f"{table}\nprofile of {steps} steps: {self.directory / 'trace.json.gz'}")


def _export(profiler: profile, path: Path) -> None:
    """Write the trace to `path`; torch compresses it only under a name that ends in .gz."""
    compressed = path.with_name(f"{path.name}.json.gz")
    try:
        profiler.export_chrome_trace(str(compressed))
        compressed.replace(path)
    finally:
        compressed.unlink(missing_ok=True)
