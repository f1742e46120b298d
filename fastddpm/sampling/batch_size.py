"""How many images are drawn at once, where nobody says: what the device's memory holds."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.config import UNetConfig

MOST = 512
_SHARE = 0.8  # of the free memory
_GRAPHS = 2.0  # a captured step keeps its memory beside what launching it took
_PROBES = (4, 12)


def choose(evaluate: Callable[[Tensor], object], config: UNetConfig, device: torch.device) -> int:
    """The batch of this device; `evaluate` takes images (N, C, H, W) and is tried out on a GPU."""
    return on_a_gpu(evaluate, config, device) if device.type == "cuda" else on_a_cpu(config)


def largest_batch(free: float, fixed: float, per_image: float) -> int:
    """The largest power of two up to 512 whose `fixed` + n `per_image` bytes are within 80 % of `free`; at least 1."""
    images = (_SHARE * free - fixed) / max(per_image, 1.0)
    return 1 << max(0, min(int(max(images, 1.0)), MOST).bit_length() - 1)


def on_a_gpu(evaluate: Callable[[Tensor], object], config: UNetConfig, device: torch.device) -> int:
    """From the free memory and what two evaluations, of a few images each, took at their peak."""
    peaks = []
    for batch in _PROBES:
        shape = (batch, config.image_channels, config.image_size, config.image_size)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        evaluate(torch.zeros(shape, device=device))
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return from_peaks(free, *peaks)


def from_peaks(free: float, first: float, second: float) -> int:
    """`first`, `second`: bytes that evaluations of 4 and of 12 images took."""
    per_image = (second - first) / (_PROBES[1] - _PROBES[0])
    fixed = max(first - _PROBES[0] * per_image, 0.0)
    return largest_batch(free, _GRAPHS * fixed, _GRAPHS * per_image)


def on_a_cpu(config: UNetConfig, free: float | None = None) -> int:
    """64 images, fewer where they are so large that the memory would not do. `free`: bytes; asked of the system."""
    if free is None:
        free = _free_memory()
    # Some thirty images of the first level's width live at once: the skips, and what a block reads and writes.
    per_image = 30 * 4 * config.image_size**2 * config.width
    return min(64, largest_batch(free, 0.0, per_image))


def _free_memory() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not on every system
        return 2.0 * 2**30
