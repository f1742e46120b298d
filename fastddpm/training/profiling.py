"""A trace of some training steps by torch.profiler, for chrome://tracing or Perfetto."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 5  # steps: the first ones allocate, choose algorithms and compile
_ROWS = 15


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Profile:
    """Traces `steps` steps after `warm_up` others into `run`/profile: trace.json.gz, and operations.txt, a table.

    `begin`, then `step` after each training step, then `end`. The table's head is told by `say`.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        device: torch.device,
        *,
        warm_up: int = WARM_UP,
        say: Callable[[str], None] = _to_stderr,
    ) -> None:
        self.directory, self.steps, self._say, self._warm_up = run / "profile", steps, say, warm_up
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._sort = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
        self._profiler: profile | None = profile(
            activities=activities,
            # The first pass of the profiler itself is slow, so its last step of warm-up is recorded and thrown away.
            schedule=schedule(wait=warm_up - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._done = 0

    def begin(self) -> None:
        """Start to count steps."""
        if self._profiler is not None:
            self._profiler.start()

    def step(self) -> None:
        """A step is over."""
        if self._profiler is None:
            return
        self._done += 1
        self._profiler.step()
        if self._done >= self._warm_up + self.steps:
            self.end()

    def end(self) -> None:
        """Stop; of a run that was shorter, what there was of it is written."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._done <= self._warm_up:
            self._say(f"no profile: the run took {self._done} steps, and a trace begins after {self._warm_up}")

    def _write(self, profiler: profile) -> None:
        table = profiler.key_averages().table(sort_by=self._sort, row_limit=_ROWS, max_name_column_width=50)
        temporary = self.directory / f".{os.getpid()}.tmp.json.gz"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                profiler.export_chrome_trace(str(temporary))
                os.replace(temporary, self.directory / "trace.json.gz")
            finally:
                temporary.unlink(missing_ok=True)
            (self.directory / "operations.txt").write_text(table, encoding="utf-8")
        except OSError as error:
            self._say(f"no profile in {self.directory}: {error.strerror or error}")
            return
        steps = min(self.steps, self._done - self._warm_up)
        self._say(f"{table}\nprofile of {steps} steps: {self.directory / 'trace.json.gz'}")
