"""Chooses the tiles of the Triton kernels of attention."""

import functools
from dataclasses import dataclass

from .. import triton_tiles
from ..triton_launch import next_power_of_2


@dataclass(frozen=True)
class Tile:
    """A program holds `rows` rows and their scores with all tokens, and streams `chunk` channels at a time."""

    rows: int
    chunk: int
    warps: int
    stages: int


# By kernel ("queries" gives dq, "keys" dk and dv), bytes per element and largest number of tokens: the largest tiles
# that the compiler fits into registers without spilling, on sm_80, sm_90, sm_100 and gfx942.
_TABLE = {
    ("forward", 2, 64): Tile(64, 64, warps=4, stages=2),
    ("forward", 2, 256): Tile(64, 64, warps=8, stages=2),
    ("forward", 4, 64): Tile(32, 32, warps=4, stages=1),
    ("forward", 4, 256): Tile(16, 32, warps=8, stages=1),
    ("queries", 2, 64): Tile(64, 64, warps=4, stages=2),
    ("queries", 2, 256): Tile(64, 64, warps=8, stages=2),
    ("queries", 4, 64): Tile(32, 32, warps=4, stages=1),
    ("queries", 4, 256): Tile(16, 32, warps=8, stages=1),
    ("keys", 2, 64): Tile(64, 64, warps=4, stages=2),
    ("keys", 2, 256): Tile(64, 64, warps=8, stages=2),
    ("keys", 4, 64): Tile(32, 32, warps=4, stages=1),
    ("keys", 4, 256): Tile(16, 16, warps=8, stages=1),
}
_SMALLEST = 16  # the shortest side of a matrix that tl.dot takes


def columns(tokens: int) -> int:
    """Return the padded length of a row of scores."""
    return max(_SMALLEST, next_power_of_2(tokens))


def key(kernel: str, tokens: int, channels: int, num_bytes: int) -> tuple[str, str]:
    """Return kernel and shape as kernels/triton_tiles.json names them."""
    return f"attention {kernel}", f"{tokens} tokens of {channels} channels of {num_bytes} bytes"


@functools.cache
def choose(kernel: str, tokens: int, channels: int, num_bytes: int, chip: str) -> Tile:
    """Return the tile of a kernel: the one measured for this chip and shape, or else that of the table."""
    timed = triton_tiles.timed(chip, *key(kernel, tokens, channels, num_bytes))
    if timed is not None:
        return Tile(**timed)
    tile = _TABLE[kernel, num_bytes, 64 if columns(tokens) <= 64 else 256]
    chunk = min(tile.chunk, max(_SMALLEST, next_power_of_2(channels)))
    return Tile(min(tile.rows, columns(tokens)), chunk, tile.warps, tile.stages)
