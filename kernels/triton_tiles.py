"""Reads kernels/triton_tiles.json: tiles that were measured on a GPU to be faster than those of the rules.

The file has an object for each chip, which has one for each kernel, which has a tile for each shape.
`benchmarks/tune.py` writes it; nothing is timed in a user's process.
"""

import functools
import json
from pathlib import Path

import torch

FILE = Path(__file__).with_name("triton_tiles.json")

Table = dict[str, dict[str, dict[str, dict[str, int]]]]


@functools.cache
def table() -> Table:
    """Return the tiles by chip, kernel and shape; a tile is the arguments of its `Tile` by name."""
    tiles: Table = json.loads(FILE.read_text(encoding="utf-8"))
    return tiles


@functools.cache
def chip(device: torch.device) -> str:
    """Return a GPU's architecture, such as sm_90 (H100, H200) or gfx942 (MI300); for other devices their type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def timed(chip: str, kernel: str, shape: str) -> dict[str, int] | None:
    """Return the measured tile of `kernel` for `shape`, or None. An operation's tiles.py words both in `key`."""
    return table().get(chip, {}).get(kernel, {}).get(shape)
