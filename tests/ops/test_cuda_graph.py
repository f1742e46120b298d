"""CUDA graphs of the operations: captured once, a replay computes with what lies in the same memory by then."""

from collections.abc import Callable

import pytest
import torch
from helpers import contract
from torch import Tensor

from fastddpm.kernels.reverse_step import COLUMNS
from fastddpm.ops import attention, group_norm_silu, q_sample, random_normal, reverse_step

pytestmark = pytest.mark.gpu
STEPS = 5


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` in a graph, after runs on a stream of their own, in which kernels are compiled and memory is found."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def test_a_sampler_s_steps_are_replays_of_one(device: torch.device) -> None:
    """Index and seed are read where they lie: each replay is the next step, with noise of its own."""
    key = contract.key_tensors([3, 4], 7, STEPS - 1, device)
    table, timesteps = torch.rand(STEPS, COLUMNS, device=device), torch.arange(STEPS, device=device)
    start = random_normal((3, 8, 8), key["images"], key["seed"], key["step"], 0)
    x, index = start.clone(), torch.tensor(STEPS - 1, device=device)
    x0 = torch.zeros_like(x)  # each step reads the one before's

    def step() -> None:
        reverse_step(x, torch.tanh(x), table, timesteps, index, key["images"], key["seed"], x0=x0)
        index.sub_(1)

    def begin(seed: int) -> None:
        key["seed"].fill_(seed)
        x.copy_(start)
        x0.zero_()
        index.fill_(STEPS - 1)

    results = []
    begin(7)
    graph = captured(step)
    for seed in (7, 8):
        begin(seed)
        for _ in range(STEPS):
            graph.replay()
        replayed = x.clone()
        begin(seed)
        for _ in range(STEPS):
            step()
        assert torch.equal(replayed, x)
        results.append(replayed)
    assert not torch.equal(*results)


def test_q_sample_replayed_with_other_images_timesteps_and_step(device: torch.device) -> None:
    key = contract.key_tensors([0, 1], 7, 0, device)
    table = torch.rand(10, 2, device=device)
    x0, t = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    outputs: list[Tensor] = []

    def run() -> None:
        outputs[:] = q_sample(x0, t, table, **key)

    graph = captured(run)
    static = list(outputs)
    for change in range(1, 4):
        x0.fill_(50 * change)
        t.copy_(torch.tensor([change, 9 - change]))
        key["step"].fill_(change)
        graph.replay()
        replayed = [output.clone() for output in static]
        run()
        assert all(torch.equal(a, b) for a, b in zip(replayed, outputs, strict=True))


@pytest.mark.parametrize("size", [(8, 8), (64, 64)], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_of_the_norm(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Forward with dropout and backward; the step that the masks are drawn from moves on between replays."""
    key = contract.key_tensors([0, 1], 7, 0, device)
    x = torch.randn(2, 32, *size, device=device).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(32, device=device, requires_grad=True) for _ in range(2))
    temb, grad = torch.randn(2, 32, device=device).to(dtype), torch.randn_like(x)
    replays_equal_eager(
        lambda: group_norm_silu(x, weight, bias, 8, temb=temb, dropout=0.3, **key), [x, weight, bias], grad, key["step"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_of_attention(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = (torch.randn(2, 64, 64, device=device).to(dtype).requires_grad_() for _ in range(3))
    replays_equal_eager(lambda: attention(q, k, v), [q, k, v], torch.randn_like(q), torch.tensor(0, device=device))


def replays_equal_eager(function: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, step: Tensor) -> None:
    outputs: list[Tensor] = []

    def run() -> None:
        y = function()
        outputs[:] = [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    graph = captured(run)
    static = list(outputs)
    for change in range(3):
        step.fill_(change)
        with torch.no_grad():
            leaves[0].normal_()
        graph.replay()
        replayed = [output.clone() for output in static]
        run()
        assert all(torch.equal(a, b) for a, b in zip(replayed, outputs, strict=True))
