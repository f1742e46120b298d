"""Tiles that were timed on a GPU and found faster than those of the rules: kernels/triton_tiles.json.

The file has an object for each chip, in it one for each kernel, in it a tile for each shape. `benchmarks/tune.py`
writes it; nothing is timed in a user's process.
"""

import functools
import json
from pathlib import Path

import torch

FILE = Path(__file__).with_name("triton_tiles.json")

Table = dict[str, dict[str, dict[str, dict[str, int]]]]


@functools.cache
def table() -> Table:
    """By chip, kernel and shape: the sides of a tile, by name."""
    tiles: Table = json.loads(FILE.read_text(encoding="utf-8"))
    return tiles


@functools.cache
def chip(device: torch.device) -> str:
    """sm_90 (H100, H200), gfx942 (MI300) ... of a GPU; otherwise the device's type, for which nothing is timed."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def timed(chip: str, kernel: str, shape: str) -> dict[str, int] | None:
    """The timed tile of `kernel` for `shape`, as the kernel's own table words it, or None."""
    return table().get(chip, {}).get(kernel, {}).get(shape)
