"""A training step: data, noise, forward, backward, Adam and the average of the weights, ours and plain PyTorch's.

On a CPU in float32 and in bfloat16, a group each; on a GPU in bfloat16. training_step.py lets the sides take turns.
"""

from typing import Any

import pytest
from harness import ON_GPU, forward_flop, record, synchronised_timer
from peers import is_slow_to_start, version
from training_sides import PEERS, training_step

from fastddpm.sampling.engine import PRECISIONS

pytestmark = pytest.mark.benchmark(timer=synchronised_timer, min_rounds=5, max_time=2.0, warmup=True,
                                   warmup_iterations=1)  # fmt: skip
CASES = [("cifar10", 128), ("celebahq256", 8)] if ON_GPU else [("mnist", 32), ("cifar10", 2), ("cifar10", 8)]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("precision", ["bf16"] if ON_GPU else ["fp32", "bf16"])
@pytest.mark.parametrize(("preset", "batch"), CASES)
def test_training_step(
    benchmark: Any, request: pytest.FixtureRequest, preset: str, batch: int, precision: str, peer: str
) -> None:
    if is_slow_to_start(peer) and not request.config.getoption("--all-peers"):
        pytest.skip(f"{peer} takes minutes to start on a CPU: --all-peers")
    benchmark.group = f"training step {preset} batch {batch} {precision}"
    benchmark(training_step(peer, preset, batch, precision))
    versions = {"diffusers": version("diffusers")} if "diffusers" in peer else {}
    record(
        benchmark, peer, images=batch, flop=3 * forward_flop(preset, batch), dtype=PRECISIONS[precision],
        preset=preset, batch=batch, precision=precision, **versions,
    )  # fmt: skip
