"""Loss by timestep, clock, memory, and what a step leaves in the log and on the screen."""

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fastddpm.config import DiffusionConfig, Preset, TrainConfig
from fastddpm.errors import StorageError
from fastddpm.runtime import bar
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.runtime.progress import Meter
from fastddpm.training import statistics
from fastddpm.training.loggers import Loggers
from fastddpm.training.monitor import Monitor
from fastddpm.training.run_log import JsonLines, read_log
from fastddpm.training.statistics import Clock, LossByTimestep, memory_mib

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def feed(by_t: LossByTimestep, losses: np.ndarray, t: np.ndarray, applied: torch.Tensor, parts: int = 1) -> None:
    by_t.begin()
    for some, where in zip(np.array_split(losses, parts), np.array_split(t, parts), strict=True):
        by_t.note(torch.tensor(some), torch.tensor(where))
    by_t.commit(applied)


@pytest.mark.parametrize(("timesteps", "bins"), [(1000, 20), (50, 7), (6, 20)])
def test_means_are_those_of_numpy(timesteps: int, bins: int) -> None:
    generator = np.random.default_rng(timesteps)
    by_t = LossByTimestep(timesteps, CPU, bins)
    seen: list[tuple[float, int]] = []
    for parts in (1, 2, 3):
        losses = generator.exponential(size=12).astype(np.float32)
        t = generator.integers(0, timesteps // 2, 12)  # the upper half stays empty
        feed(by_t, losses, t, YES, parts)
        seen += zip(losses.tolist(), t.tolist(), strict=True)
    used = min(bins, timesteps)
    edges = [int(np.ceil(i * timesteps / used)) for i in range(used + 1)]
    found = by_t.read()
    assert len(found) == used
    for i, mean in enumerate(found):
        inside = [loss for loss, t_of in seen if edges[i] <= t_of < edges[i + 1]]
        assert (mean is None) == (not inside)
        if inside:
            assert mean == pytest.approx(np.mean(inside), rel=1e-6)
    assert by_t.read() == [None] * used  # a new window


def test_a_step_that_was_not_applied_leaves_no_trace() -> None:
    by_t = LossByTimestep(10, CPU, 2)
    feed(by_t, np.float32([1, 3]), np.array([0, 9]), YES)
    feed(by_t, np.float32([np.nan, 5]), np.array([0, 9]), NO)
    feed(by_t, np.float32([np.inf, 5]), np.array([9, 0]), NO)
    feed(by_t, np.float32([2, 7]), np.array([4, 5]), YES)
    assert by_t.read() == [1.5, 5.0]


def test_what_is_pending_is_sums_and_counts_of_one_step() -> None:
    """Two processes whose pending tensors are added have what one has."""
    parts = [LossByTimestep(10, CPU, 2) for _ in range(2)]
    for by_t, losses, t in zip(parts, ([1.0, 2.0], [4.0, 8.0]), ([0, 9], [0, 0]), strict=True):
        by_t.begin()
        by_t.note(torch.tensor([100.0]), torch.tensor([3]))
        by_t.begin()  # forgets it
        by_t.note(torch.tensor(losses), torch.tensor(t))
    assert (parts[0].pending + parts[1].pending).tolist() == [[13.0, 2.0], [3.0, 1.0]]


def test_a_checkpoint_carries_half_a_window() -> None:
    generator = np.random.default_rng(1)
    whole, before, after = (LossByTimestep(1000, CPU) for _ in range(3))
    batches = [(generator.exponential(size=8).astype(np.float32), generator.integers(0, 1000, 8)) for _ in range(5)]
    for i, (losses, t) in enumerate(batches):
        feed(whole, losses, t, YES)
        if i < 2:
            feed(before, losses, t, YES)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for losses, t in batches[2:]:
        feed(after, losses, t, YES)
    assert after.read() == whole.read()
    after.load_state_dict(None)
    assert after.read() == [None] * 20
    after.load_state_dict([[1.0], [1.0]])  # of another number of bins
    assert after.read() == [None] * 20


def test_laps_leave_out_what_is_no_step() -> None:
    times = iter([100.0, 101.0, 101.5, 110.0, 150.0, 160.0, 162.0])  # what the clock reads
    clock = Clock(7, now=lambda: next(times))
    with clock.waiting():  # 101 to 101.5
        pass
    with clock.exclude():  # 110 to 150
        pass
    lap = clock.lap(27)  # at 160: 60 s since 100, 40 of them aside
    assert lap.steps_per_s == 1.0 and lap.data_wait == 0.025
    assert clock.lap(33).steps_per_s == 3.0  # from 160 to 162


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_a_process_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert said is not None
    assert memory_mib(CPU) == pytest.approx(int(said[1]) / 1024, rel=0.05)
    monkeypatch.setattr(statistics, "_STATM", tmp_path / "statm")
    (tmp_path / "statm").write_text("9000 512 100 1 0 800 0\n")  # pages; the second is what is resident
    assert memory_mib(CPU) == 512 * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_lines_of_a_meter_go_by_notes_or_by_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("work", 10, "steps", seconds_between_lines=None) as meter:
        for done in range(1, 11):
            meter.update(done, f"note {done}" if done % 4 == 0 else None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["work 4/10 steps", "work 8/10 steps", "work 10/10 steps"]
    assert "note 8" in lines[-1] and lines[-1].endswith("0 s left")
    with Meter("work", 10, "steps", seconds_between_lines=1000) as meter:
        for done in range(1, 11):
            meter.update(done, "note")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_note_made_of_the_rate_counts_what_was_just_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("work", 10, "steps") as meter:
        meter.update(10, lambda rate: "fast" if rate > 0 else "slow")
    assert "fast" in capsys.readouterr().err


def test_a_terminal_of_80_columns_shows_all_of_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    note = "loss 0.0312  16.00 steps/s  2048 images/s  gradient 0.123  data 0%  12.3 GiB"
    screen = io.StringIO()
    monkeypatch.setattr(bar, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=80, height=24))
    with Meter("training", 800_000, "steps", done=10) as meter:
        meter.update(150_001, note)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert note in lines
    assert any(line.startswith("training") and "150001/800000" in line and line.endswith(" left") for line in lines)


def test_a_log_is_read_without_its_half_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2, "loss": 1.5}\n{"step": 4, "loss": null}\n{"step": 6, "lo')
    assert read_log(path) == [{"step": 2, "loss": 1.5}, {"step": 4, "loss": None}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_is_a_storage_error() -> None:
    log = JsonLines(Path("/dev/full"))
    with pytest.raises(StorageError, match="cannot write /dev/full: No space left"):
        log.write({"step": 1})


class Kept:
    """A logger that keeps what it is given."""

    name = "kept"

    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.written.append((step, dict(numbers)))

    def image(self, step: int, name: str, path: Path) -> None:
        raise AssertionError

    def close(self) -> None:
        pass


@pytest.fixture
def preset() -> Preset:
    return Preset("x", diffusion=DiffusionConfig(timesteps=10), train=TrainConfig(steps=6, batch=4))


def told(monitor: Monitor, log: JsonLines | None) -> Iterator[int]:
    """Steps 1 to 6; numbers are taken at 3 and 6 only."""
    norms = {3: 0.5, 6: float("nan")}
    taken = []
    with monitor.running(0, log):
        for step in range(1, 7):
            feed(monitor.losses_by_t, np.float32([step]), np.array([step]), YES)

            def measured(step: int = step) -> dict[str, float | None]:
                taken.append(step)
                return {"loss": float(step), "gradient_norm": norms[step], "lr": 0.1}

            monitor.log(step, measured if step in norms else None)
    yield from taken


def test_a_line_goes_to_log_sinks_and_screen(
    tmp_path: Path, preset: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    log, logger = JsonLines(tmp_path / "log.jsonl"), Kept()
    monitor = Monitor(preset, CPU)
    monitor.attach(loggers=Loggers([logger], print))
    assert list(told(monitor, log)) == [3, 6]
    log.close()
    first, second = read_log(log.path)
    assert (first["step"], first["loss"], first["gradient_norm"], first["lr"]) == (3, 3.0, 0.5, 0.1)
    assert second["gradient_norm"] is None  # not finite
    assert first["loss_by_t"] == [None, 1.0, 2.0, 3.0, *[None] * 6]
    assert second["loss_by_t"] == [*[None] * 4, 4.0, 5.0, 6.0, *[None] * 3]
    assert first["images_per_s"] > 0 and 0 <= first["data_wait"] <= 1 and first["memory_mib"] > 10
    numbers = {name: value for name, value in first.items() if name not in ("step", "loss_by_t")}
    assert logger.written[0] == (3, numbers)
    assert "gradient_norm" not in logger.written[1][1] and logger.written[1][1]["loss"] == 6.0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("training 3/6 steps  loss 3.0000") and " left" in lines[0]
    assert "gradient 0.5 " in lines[0] and "data 0%" in lines[0] and "GiB" in lines[0]
    assert "gradient not finite" in lines[1]


def test_other_processes_than_the_first_say_nothing(preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(told(Monitor(preset, CPU, ProcessGroup(1, 2)), None)) == [3, 6]
    assert capsys.readouterr() == ("", "")
