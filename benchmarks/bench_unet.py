"""One evaluation of the network without gradients, ours and every peer's."""

from typing import Any

import peers
import pytest
import torch
from harness import DEVICE, ON_GPU, forward_flop, record, synchronised_timer

import fastddpm

pytestmark = pytest.mark.benchmark(timer=synchronised_timer, min_rounds=5, max_time=2.0, warmup=True,
                                   warmup_iterations=1)  # fmt: skip
CASES = [("cifar10", batch) for batch in (1, 16, 128, 256, 512)] + [("celebahq256", batch) for batch in (1, 8, 64)]
if not ON_GPU:
    CASES = [("cifar10", 1), ("cifar10", 8)]
# On a CPU compiled peers take a minute each to start: these at batch 1 alone, the others with --all-peers.
COMPILED_ON_A_CPU = ("torch.compile", "diffusers, compiled", "onnxruntime")


@pytest.mark.parametrize("peer", peers.FORWARD)
@pytest.mark.parametrize(("preset", "batch"), CASES)
def test_forward(benchmark: Any, request: pytest.FixtureRequest, preset: str, batch: int, peer: str) -> None:
    started_here = peer in COMPILED_ON_A_CPU and batch == 1
    if peers.is_slow_to_start(peer) and not started_here and not request.config.getoption("--all-peers"):
        pytest.skip(f"{peer} takes minutes to start on a CPU: --all-peers")
    if peers.is_slow_to_start(peer) and request.config.getoption("--benchmark-disable"):
        pytest.skip(f"{peer} takes minutes to start on a CPU, and nothing is timed")
    benchmark.group = f"forward {preset} batch {batch}"
    evaluate, versions = peers.evaluation(peer, preset)
    config = fastddpm.preset(preset).unet
    x = torch.randn(batch, config.image_channels, config.image_size, config.image_size, device=DEVICE)
    t = torch.tensor(500, device=DEVICE).expand(batch)
    benchmark(evaluate, x, t)
    record(benchmark, peer, images=batch, flop=forward_flop(preset, batch), preset=preset, batch=batch, **versions)
