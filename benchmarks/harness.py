"""What the pytest benchmarks share: the device, a timer that waits for it, its limits, what is stored beside a time."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from plain import PlainUNet
from torch.utils.flop_counter import FlopCounterMode

import fastddpm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# The precision that a sampler takes by itself on this device.
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def synchronised_timer() -> float:
    """Seconds, after everything queued on the device is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


CALLS_IN_GRAPH = 20


def in_graph(run: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """On a GPU, a CUDA graph of several calls of `run`, and how many; elsewhere `run` and 1.

    A kernel of few microseconds is over before the host has launched the next one, so calls one by one measure the
    host. What cannot be captured is timed as it is.
    """
    if not ON_GPU:
        return run, 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate and choose at the first calls, which no graph may hold
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(CALLS_IN_GRAPH):
                run()
    except RuntimeError:
        return run, 1
    return graph.replay, CALLS_IN_GRAPH


@dataclass(frozen=True)
class Limits:
    """What this device reached in this run: FLOP/s of a product, bytes/s (read and written) of a copy."""

    matrix_flops: float
    copy_bytes: float

    def seconds(self, flop: float, num_bytes: float) -> float:
        """Below which nothing that computes and moves that much can be, were this device no faster than it was."""
        return max(flop / self.matrix_flops, num_bytes / self.copy_bytes)


@functools.cache
def limits(dtype: torch.dtype) -> Limits:
    """Measured once a run: the fastest product of random `dtype` that PyTorch has here, and a copy beyond all caches.

    On a CPU that may be a convolution: the library behind it (oneDNN) multiplies faster on some processors than the
    one behind matrix products.
    """
    side, size = (8192, 2**31) if ON_GPU else (1536, 2**27)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    rates = [2 * side**3 / best(lambda: a @ b)]
    if not ON_GPU:
        x = torch.randn(4, 256, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 3, 3, dtype=dtype)
        rates.append(18 * x.numel() * len(weight) / best(lambda: F.conv2d(x, weight, padding=1)))
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return Limits(max(rates), 2 * size / best(lambda: target.copy_(source)))


def best(call: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of the fastest round: a limit is what the device can do."""
    call()
    times = []
    for _ in range(rounds):
        start = synchronised_timer()
        call()
        times.append(synchronised_timer() - start)
    return float(np.min(times))


def record(
    benchmark: Any,
    peer: str,
    images: float = 0,
    flop: float = 0,
    num_bytes: float = 0,
    dtype: torch.dtype = DTYPE,
    **more: Any,
) -> None:
    """Beside the time: who was timed, rates, the share of the limit, and what the figure was measured on.

    `images`, `flop`, `num_bytes`: of one call. The share is the limit's time over the median; `dtype` is the limit's.
    """
    median = benchmark.stats.stats.median if benchmark.stats else float("nan")
    info: dict[str, Any] = {"peer": peer, **more}
    if images:
        info["images_per_s"] = images / median
    if flop:
        info |= {"gflop": flop / 1e9, "tflop_per_s": flop / median / 1e12}
    if num_bytes:
        info |= {"gb": num_bytes / 1e9, "gb_per_s": num_bytes / median / 1e9}
    if flop or num_bytes:
        measured = limits(dtype)
        info |= {
            "share_of_limit": measured.seconds(flop, num_bytes) / median,
            "limit_tflop_per_s": measured.matrix_flops / 1e12,
            "limit_gb_per_s": measured.copy_bytes / 1e9,
        }
    benchmark.extra_info |= info | machine()


@functools.cache
def machine() -> dict[str, Any]:
    """The device, versions and date that a figure must name."""
    from machine import description

    found = description() | {"fastddpm": fastddpm.__version__}
    if ON_GPU:
        found |= {"processor": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


@functools.cache
def forward_flop(preset: str, batch: int, size: int | None = None) -> float:
    """Of matrix products and convolutions of one evaluation, the network as the paper has it; `size`: of the images."""
    config = fastddpm.preset(preset).unet
    size = config.image_size if size is None else size
    with torch.device("meta"):
        network = PlainUNet(fastddpm.UNet(replace(config, image_size=size)))
        x = torch.empty(batch, config.image_channels, size, size)
        t = torch.empty(batch, dtype=torch.int64)
        label = torch.empty(batch, dtype=torch.int64) if config.num_classes else None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t, label)
    return float(counter.get_total_flops())
