"""The trace that --profile writes."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from fastddpm.training.profiling import Profile

CPU = torch.device("cpu")


def profiled(run: Path, asked: int, taken: int) -> list[str]:
    """What is said of a run of `taken` steps, each a product of matrices."""
    said: list[str] = []
    profile = Profile(run, asked, CPU, warm_up=2, report=said.append)
    profile.begin()
    for _ in range(taken):
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
        profile.step()
    profile.end()
    return said


@pytest.mark.parametrize(("taken", "traced"), [(9, 3), (5, 3), (4, 2)])
def test_a_trace_holds_the_steps_after_the_warm_up(tmp_path: Path, taken: int, traced: int) -> None:
    (said,) = profiled(tmp_path, 3, taken)
    assert said.endswith(f"profile of {traced} steps: {tmp_path / 'profile' / 'trace.json.gz'}") and "aten::mm" in said
    with gzip.open(tmp_path / "profile" / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::mm") == traced
    assert "aten::mm" in (tmp_path / "profile" / "operations.txt").read_text()
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_a_run_that_is_too_short_is_told(tmp_path: Path) -> None:
    assert profiled(tmp_path, 3, 1) == ["no profile: the run took 1 steps, and a trace begins after 2"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the directory belongs")
    (said,) = profiled(tmp_path, 2, 6)
    assert said.startswith("no profile in") and "File exists" in said
