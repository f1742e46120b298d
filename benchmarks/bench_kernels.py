"""The operations of `fastddpm.ops` at the CIFAR-10 network's shapes, against PyTorch's own operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, DTYPE, ON_GPU, in_graph, record, synchronised_timer
from limits import limit
from shapes import Call
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastddpm import ops
from fastddpm.kernels.reverse_step import COLUMNS, FIXED
from fastddpm.ops.selftest import plain_attention, plain_group_norm_silu, plain_q_sample, plain_reverse_step

pytestmark = pytest.mark.benchmark(timer=synchronised_timer, min_rounds=10, max_time=0.5, warmup=True,
                                   warmup_iterations=2)  # fmt: skip
BATCH = 128 if ON_GPU else 8
GROUPS = 32
NORMS = {"128 at 32x32": (128, 0, 32), "256+128 at 32x32": (256, 128, 32), "256 at 16x16": (256, 0, 16),
         "256+256 at 8x8": (256, 256, 8)}  # fmt: skip
TOKENS = {"256 tokens of 256": (256, 256), "64 tokens of 512": (64, 512)}
SDPA = {
    "SDPA math": SDPBackend.MATH,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    x = torch.randn(*shape, device=DEVICE, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def time_call(benchmark: Any, peer: str, run: Callable[[], object], call: Call, shape: str) -> None:
    """Times `run`, with what the operation must move and compute, each tensor once, whoever does it."""
    benchmark.group = f"{call.name} {shape}"
    timed, calls = in_graph(run)
    benchmark(timed)
    bound = limit(call)
    record(benchmark, peer, flop=calls * bound.matrix_flop, num_bytes=calls * bound.num_bytes, operation=call.name,
           shape=shape, batch=BATCH, calls=calls)  # fmt: skip


def meta(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("peer", ["fastddpm", "torch", "apex"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("shape", NORMS)
def test_group_norm_silu(benchmark: Any, shape: str, backward: bool, peer: str) -> None:
    c1, c2, size = NORMS[shape]
    x, skip = randn(BATCH, c1, size, size), randn(BATCH, c2, size, size) if c2 else None
    weight, bias = (randn(c1 + c2, dtype=torch.float32).requires_grad_(backward) for _ in range(2))
    leaves = [tensor.requires_grad_(backward) for tensor in (x, skip, weight, bias) if tensor is not None]
    apex = pytest.importorskip("apex.contrib.group_norm", reason="apex is not installed") if peer == "apex" else None

    def norm() -> Tensor:
        if peer == "fastddpm":
            return ops.group_norm_silu(x, weight, bias, GROUPS, skip=skip)
        if apex is None:
            return plain_group_norm_silu(x, skip, weight, bias, GROUPS)
        both = x if skip is None else torch.cat([x, skip], dim=1)
        return apex.cuda_group_norm_nhwc_one_pass(both, GROUPS, weight, bias, 1e-6, "silu")

    grad = torch.ones_like(norm())
    forward = (x, weight, bias, GROUPS, 1e-6, skip, *[None] * 3, True, 0.0, *[None] * 3, 0)
    call = Call("group_norm_silu", tuple(map(meta, forward)))
    if backward:
        moments = torch.empty(BATCH, GROUPS, device="meta")
        arguments = (grad, x, weight, bias, moments, moments, GROUPS, *forward[5:], None, None)
        call = Call("group_norm_silu_backward", tuple(map(meta, arguments)))
    time_call(benchmark, peer, lambda: torch.autograd.grad(norm(), leaves, grad) if backward else norm(), call, shape)


@pytest.mark.parametrize("peer", ["fastddpm", *SDPA])
@pytest.mark.parametrize("shape", TOKENS)
def test_attention(benchmark: Any, shape: str, peer: str) -> None:
    tokens, channels = TOKENS[shape]
    q, k, v = (randn(BATCH, tokens, channels) for _ in range(3))

    def attend() -> Tensor:
        if peer == "fastddpm":
            return ops.attention(q, k, v)
        with sdpa_kernel(SDPA[peer]):
            return plain_attention(q, k, v)

    try:
        attend()
    except RuntimeError as error:
        pytest.skip(f"{peer} does not take {shape} here: {str(error).splitlines()[0]}")
    time_call(benchmark, peer, attend, Call("attention", tuple(map(meta, (q, k, v, channels**-0.5, False)))), shape)


SIDES = pytest.mark.parametrize("peer", ["fastddpm", "torch"])


def counters() -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(BATCH, device=DEVICE), torch.tensor(1, device=DEVICE), torch.tensor(5, device=DEVICE)


@SIDES
def test_q_sample(benchmark: Any, peer: str) -> None:
    images, seed, step = counters()
    x0 = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    t, table = images * 7 % 1000, torch.rand(1000, 2, device=DEVICE)

    sides = {
        "fastddpm": lambda: ops.q_sample(x0, t, table, images, seed, step),
        "torch": lambda: plain_q_sample(x0, t, table),
    }
    call = Call("q_sample", tuple(map(meta, (x0, t, table, None, None, images, seed, step))))
    time_call(benchmark, peer, sides[peer], call, "3x32x32")


@SIDES
def test_reverse_step(benchmark: Any, peer: str) -> None:
    images, seed, step = counters()
    x, out = torch.randn(BATCH, 3, 32, 32, device=DEVICE), randn(BATCH, 3, 32, 32)
    table, timesteps = torch.rand(1000, COLUMNS, device=DEVICE), torch.arange(1000, device=DEVICE)

    sides = {
        "fastddpm": lambda: ops.reverse_step(x, out, table, timesteps, step, images, seed),
        "torch": lambda: plain_reverse_step(x, out, table[step]),
    }
    call = Call(
        "reverse_step", tuple(map(meta, (x, out, table, timesteps, step, images, seed, 1.0, FIXED, None, None)))
    )
    time_call(benchmark, peer, sides[peer], call, "3x32x32")


@SIDES
def test_random_normal(benchmark: Any, peer: str) -> None:
    images, seed, step = counters()
    sides = {
        "fastddpm": lambda: ops.random_normal((3, 32, 32), images, seed, step, 0),
        "torch": lambda: torch.randn(BATCH, 3, 32, 32, device=DEVICE),
    }
    call = Call("random_normal", ([3, 32, 32], *map(meta, (images, seed, step)), 0))
    time_call(benchmark, peer, sides[peer], call, "3x32x32")


@SIDES
@pytest.mark.skipif(ON_GPU, reason="on a GPU the library's convolution is PyTorch's")
@pytest.mark.parametrize("channels, size", [(128, 32), (256, 16), (256, 8)])
def test_conv3x3(benchmark: Any, channels: int, size: int, peer: str) -> None:
    x, bias = randn(BATCH, channels, size, size), randn(channels)
    weight = randn(channels, channels, 3, 3)
    sides = {
        "fastddpm": lambda: ops.conv3x3(x, weight, bias),
        "torch": lambda: F.conv2d(x, weight, bias, padding=1),
    }
    shape = f"{channels} at {size}x{size}"
    benchmark.group = f"conv3x3 {shape}"
    benchmark(sides[peer])
    moved = 4 * (2 * x.numel() + weight.numel())
    record(benchmark, peer, flop=18 * x.numel() * channels, num_bytes=moved, operation="conv3x3", shape=shape,
           batch=BATCH)  # fmt: skip
