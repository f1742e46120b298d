"""The default sampling batch size, from the device's free memory."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.config import UNetConfig

MAX_BATCH = 512
_MEMORY_SHARE = 0.8  # of the free memory that a batch may take
_GRAPH_FACTOR = 2.0  # a captured step keeps memory of its own beside that of a launched step
_PROBE_BATCHES = (4, 12)  # images of the two evaluations that measure memory


def choose(evaluate: Callable[[Tensor], object], config: UNetConfig, device: torch.device) -> int:
    """Return the default batch size on `device`.

    `evaluate` evaluates the network for images float32 (N, C, H, W). It is called twice on a GPU, to measure the memory
    that it takes, and not at all on a CPU.
    """
    return on_a_gpu(evaluate, config, device) if device.type == "cuda" else on_a_cpu(config)


def largest_batch(free: float, fixed: float, per_image: float) -> int:
    """Return the largest power of two n <= 512 with `fixed` + n `per_image` within 80 % of `free` bytes; at least 1."""
    images = (_MEMORY_SHARE * free - fixed) / max(per_image, 1.0)
    return 1 << max(0, min(int(max(images, 1.0)), MAX_BATCH).bit_length() - 1)


def on_a_gpu(evaluate: Callable[[Tensor], object], config: UNetConfig, device: torch.device) -> int:
    """Return the batch size from a GPU's free memory and the peak memory of evaluating 4 and 12 images."""
    peaks = []
    for batch in _PROBE_BATCHES:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        evaluate(torch.zeros((batch, *config.image_shape), device=device))
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return from_peaks(free, *peaks)


def from_peaks(free: float, first: float, second: float) -> int:
    """Return the batch size for `free` bytes, if evaluating 4 and 12 images took `first` and `second` bytes."""
    per_image = (second - first) / (_PROBE_BATCHES[1] - _PROBE_BATCHES[0])
    fixed = max(first - _PROBE_BATCHES[0] * per_image, 0.0)
    return largest_batch(free, _GRAPH_FACTOR * fixed, _GRAPH_FACTOR * per_image)


def on_a_cpu(config: UNetConfig, free: float | None = None) -> int:
    """Return 64, or fewer if so many images do not fit in memory. `free`: bytes. Default: the system's free memory."""
    if free is None:
        free = free_bytes(torch.device("cpu"))
    # About thirty feature maps of the first level exist at once: the skips, and the inputs and outputs of a block.
    _, height, width = config.image_shape
    per_image = 30 * 4 * height * width * config.level_channels[0]
    return min(64, largest_batch(free, 0.0, per_image))


def free_bytes(device: torch.device) -> float:
    """Return the bytes of memory that are free on a GPU, or that the system can give to a program on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, StopIteration, ValueError):  # Linux counts what it can take back from its caches
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not every system has these names; assume 2 GiB
        return 2.0 * 2**30
