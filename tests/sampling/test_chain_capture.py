"""Capturing a step: where it happens, on which streams, and what it leaves behind, with a stand-in for torch.cuda."""

import gc
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.chains import STEPS, chain_of, sampler
from helpers.networks import TINY

from fastddpm.config import EngineConfig
from fastddpm.sampling import chain as chains
from fastddpm.sampling import cuda_graph

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)


class Stream:
    """One of a device: the current one unless named."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        assert other.device == self.device
        self.waited_for.append(other)


class Cuda:
    """What `capture` takes of torch.cuda, with a GPU's rules; a replay does what was captured."""

    Stream = Stream

    def __init__(self) -> None:
        self.current = torch.device("cuda", 0)
        self.streams = defaultdict(list, {self.current: [Stream(self.current)], SECOND: [Stream(SECOND)]})
        self.captured_on: list[Stream] = []
        self.warmed_on: list[Stream] = []
        self.modes: list[str] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    def current_stream(self) -> Stream:
        return self.streams[self.current][-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        assert stream.device == self.current
        depth = len(self.streams[self.current])
        self.streams[self.current].append(stream)
        self.warmed_on.append(stream)
        try:
            yield
        finally:
            del self.streams[stream.device][depth:]

    class CUDAGraph:
        work: Callable[[], None]

        def replay(self) -> None:
            self.work()

    @contextmanager
    def graph(self, graph: CUDAGraph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As torch's: where the step fails, ending fails as well, and the capture's stream stays the current one."""
        assert stream.device == self.current
        self.captured_on.append(stream)
        self.modes.append(capture_error_mode)
        self.streams[self.current].append(stream)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        self.streams[self.current].pop()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    fake = Cuda()
    stand_in: Any = types.SimpleNamespace(device=torch.device, cuda=fake)
    cuda_graph._warming_stream.cache_clear()
    monkeypatch.setattr(cuda_graph, "torch", stand_in)
    monkeypatch.setattr(cuda_graph, "_streams_without_graph", defaultdict(list))
    yield fake
    cuda_graph._warming_stream.cache_clear()


def nothing() -> None:
    pass


def test_it_happens_on_the_chains_own_device(cuda: Cuda) -> None:
    """Streams belong to a device: on another's the graph would be empty, and its replay would do nothing."""
    devices = []
    cuda_graph.capture(lambda: devices.append(cuda.current_stream().device), nothing, SECOND)
    assert devices == 4 * [SECOND] and cuda.captured_on[0].device == SECOND
    assert cuda.current == torch.device("cuda", 0) and cuda.modes == ["thread_local"]


def test_graphs_that_live_share_no_stream_and_streams_are_used_again(cuda: Cuda) -> None:
    first, second, third = (cuda_graph.capture(nothing, nothing, SECOND) for _ in range(3))
    assert len(set(cuda.captured_on)) == 3
    given_back = cuda.captured_on[1]
    del second
    gc.collect()
    fourth = cuda_graph.capture(nothing, nothing, SECOND)
    assert cuda.captured_on[3] is given_back
    # Not the streams of the captures, and one for all of them.
    warming = {stream for stream in cuda.warmed_on if stream is not cuda.streams[SECOND][0]}
    assert len(warming) == 1 and not warming & set(cuda.captured_on)
    assert first and third and fourth


def test_every_run_but_the_captured_one_is_undone(cuda: Cuda) -> None:
    log: list[str] = []
    cuda_graph.capture(lambda: log.append("step"), lambda: log.append("restore"), SECOND)
    assert log == 3 * ["step", "restore"] + ["step"]


def test_a_capture_that_fails_leaves_the_current_stream_and_its_own_is_not_used_again(cuda: Cuda) -> None:
    runs = 0

    def step() -> None:
        nonlocal runs
        runs += 1
        if runs == 4:
            raise RuntimeError("operation not permitted when stream is capturing")

    before = cuda.streams[SECOND][0]
    with pytest.raises(RuntimeError, match="previous error") as caught:
        cuda_graph.capture(step, nothing, SECOND)
    assert cuda.streams[SECOND] == [before] and cuda.current == torch.device("cuda", 0)
    assert cuda_graph._streams_without_graph[SECOND] == []
    assert str(caught.value.__context__) == "operation not permitted when stream is capturing"


def test_runs_before_a_capture_that_fail_are_waited_for(cuda: Cuda) -> None:
    """What they still write on their own stream is put back behind them."""
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_graph.capture(raising, nothing, SECOND)
    (here,) = cuda.streams[SECOND]
    assert here.waited_for == [cuda_graph._warming_stream(SECOND)] and cuda.captured_on == []


def raising() -> None:
    raise RuntimeError("CUDA out of memory")


# Chains


def pretended(step: chains.Replay, restore: chains.Replay, device: torch.device) -> chains.Replay:
    """On a CPU: the runs before a capture, and a replay that is the step."""
    assert device == CPU
    for _ in range(3):
        step()
        restore()
    return step


@pytest.mark.parametrize("watch", [STEPS - 1, STEPS - 2])
def test_the_last_step_is_captured_when_it_is_the_first_to_be_watched(
    watch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs before the capture must not walk past the table: on a GPU that stops the process."""
    monkeypatch.setattr(chains, "capture", pretended)
    owner = sampler(TINY)
    plain, captured = (chain_of(owner, 2, [1, 2]) for _ in range(2))
    captured._graph = True
    with torch.no_grad():
        for i in range(STEPS):
            captured.advance(keep_x0=i == watch)
            plain.step(keep_x0=True)
            assert torch.equal(captured.x, plain.x)
            assert torch.equal(captured.x0, plain.x0) == (i == watch)


@pytest.mark.parametrize("steps", [1, 2])
def test_chains_shorter_than_the_runs_before_a_capture(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = sampler(TINY, steps=steps)
    expected = owner.sample([1, 2])
    monkeypatch.setattr(chains, "capture", pretended)
    chain = chain_of(owner, 2, [1, 2])
    chain._graph = True
    with torch.no_grad():
        for _ in range(steps):
            chain.advance(keep_x0=False)
    torch.testing.assert_close(chain.x.clamp(-1, 1), expected, rtol=0, atol=1e-5)


def test_the_reason_given_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that ending a capture which has failed fails, too."""

    def failing(step: chains.Replay, restore: chains.Replay, device: torch.device) -> chains.Replay:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(chains, "capture", failing)
    chain = chain_of(sampler(TINY), 1, [1])
    chain._graph = True
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        chain.advance(keep_x0=False)
    assert [str(w.message).partition(": ")[2] for w in caught] == ["operation not permitted when stream is capturing"]


# On a GPU


@pytest.mark.gpu
def test_graphs_of_several_sizes_come_and_go() -> None:
    """More sizes than are kept, so that graphs are deleted beside others; last steps watched; the images all along."""
    captured, launched = (sampler(TINY, engine=EngineConfig(graph=graph)) for graph in (True, False))
    for owner in (captured, launched):
        owner.network.cuda()
    for size in (1, 2, 4, 8, 4, 8, 2, 1):
        seeds = range(size)
        (ours,), (expected,) = (list(owner.trajectory(seeds, watch=[STEPS - 1])) for owner in (captured, launched))
        assert torch.equal(ours.x, expected.x) and torch.equal(ours.x0, expected.x0)
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_of_a_device_that_is_not_the_current_one() -> None:
    first, second = (sampler(TINY) for _ in range(2))
    first.network.cuda(0)
    second.network.cuda(1)
    assert torch.equal(first.sample([1, 2]).cpu(), second.sample([1, 2]).cpu())
