"""One evaluation of diffusers' UNet2DModel without gradients on a CPU, before and after `fastddpm.accelerate`."""

from typing import Any

import accelerated
import pytest
import torch
from harness import ON_GPU, forward_flop, record, synchronised_timer

import fastddpm

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = [
    pytest.mark.benchmark(timer=synchronised_timer, min_rounds=5, max_time=2.0, warmup=True, warmup_iterations=1),
    pytest.mark.skipif(ON_GPU, reason="fastddpm.accelerate is compared on a CPU"),
]
PEERS = ("fastddpm", *(f"diffusers, {layout}" for layout in accelerated.LAYOUTS))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("batch", [1, 8])
def test_forward_of_diffusers_network(benchmark: Any, batch: int, peer: str) -> None:
    benchmark.group = f"diffusers' CIFAR-10 network batch {batch}"
    unet = accelerated.network("cifar10")
    layout = accelerated.LAYOUTS.get(peer.removeprefix("diffusers, "), torch.channels_last)
    if peer == PEERS[0]:
        fastddpm.accelerate(unet)
    else:
        unet = unet.to(memory_format=layout)
    benchmark(accelerated.evaluation(unet, accelerated.inputs(unet, batch), layout))
    record(
        benchmark, peer, images=batch, flop=forward_flop("cifar10", batch), preset="cifar10", batch=batch,
        diffusers=diffusers.__version__,
    )  # fmt: skip
