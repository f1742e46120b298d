"""What the pytest benchmarks share: kernels timed in a CUDA graph, on a pretended GPU."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
import report
import torch


class Graph:
    """Replays what was called while it was captured."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs into which a call is being recorded."""
    now: list[Graph] = []

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        now.append(graph)
        yield
        now.clear()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": Graph, "graph": capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(harness, "ON_GPU", True)
    return now


def test_on_a_gpu_several_calls_are_one_graph(capturing: list[Graph]) -> None:
    launched: list[str] = []

    def run() -> None:
        if capturing:
            capturing[-1].calls.append(lambda: launched.append("replayed"))
        else:
            launched.append("called")

    replay, calls = harness.in_graph(run)
    assert launched == ["called"] * 3 and calls == harness.CALLS_IN_GRAPH > 1
    replay()
    assert launched[3:] == ["replayed"] * calls


def test_what_cannot_be_captured_is_timed_as_it_is(capturing: list[Graph]) -> None:
    def run() -> None:
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    assert harness.in_graph(run) == (run, 1)


def test_without_a_gpu_there_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ON_GPU", False)

    def run() -> None:
        raise AssertionError

    assert harness.in_graph(run) == (run, 1)


def test_the_report_tells_the_time_of_one_call(tmp_path: Path) -> None:
    one = {"fullname": "b::one", "group": None, "stats": {"median": 0.5}}
    (tmp_path / "r.json").write_text(json.dumps({"benchmarks": [one | {"extra_info": {"calls": 20}}]}))
    assert report.read(tmp_path / "r.json")[0].median == 0.025
