"""Chooses the tiles of the Triton kernels of group_norm_silu: the part of an image that one program takes."""

import functools
from dataclasses import dataclass, replace

from .. import triton_tiles
from ..triton_launch import ceil_div, next_power_of_2

# Elements of a tile per thread, forward (False) and backward (True), which keeps the gradient besides x.
_VALUES = {False: 32, True: 32}  # preferred for images whole in registers; backward the most that no chip spills
_MOST_VALUES = 64  # forward, for large tiles and for 16 bits: the most that no chip spills
_LARGE_TILE = 16384  # elements; in threads of 64 values, two programs share a multiprocessor
_FEWER_VALUES = {False: 16, True: 8}  # of loops, and backward if there are threads enough
_MAX_WARPS = 16
_SECTOR = 32  # bytes: the least that memory moves
# Bytes of a pixel's row, at least. A loop reads its rows twice, and computes twice what backward needs of them, which
# is slower than rows of half a sector: the neighbour's half is in the cache.
_LEAST_ROW = {False: _SECTOR, True: _SECTOR // 2}
_SMALL_TILE = 2048  # elements, below which backward takes fewer to a thread
_ROW = 64  # bytes of a pixel that one program takes if the image is not split
_THIRDS_ROW = 128  # the same where a quarter is padding: rows of 48 bytes are half as fast as 96, on an H200
# A large image is split if there would be fewer programs: a GPU has about a hundred multiprocessors to fill.
_FEW_PROGRAMS = 32
_LARGE_IMAGE = 1024  # pixels
# The largest image, in pixels, that is still in the cache for a second loop, with all programs running at once.
_CACHED_IMAGE = 2048
_CHUNKS = 32  # the most pieces of an image; each program reads the sums of all
_LOOP_WARPS = 8


@dataclass(frozen=True)
class Tile:
    """A tile of `block_p` pixels by `block_c` channels, of which `groups` whole groups are used.

    `chunks`: pieces of an image. 0: the tile holds all pixels. 1: a program loops over all pixels, twice.
    """

    block_p: int
    block_c: int
    groups: int
    warps: int
    chunks: int

    @property
    def padded_groups(self) -> int:
        """The length of a vector of groups. Two are padded to four: with two, the compiler spills registers."""
        return 1 if self.groups == 1 else max(4, next_power_of_2(self.groups))


def key(
    n: int, pixels: int, groups: int, cpg: int, num_bytes: int, channels_last: bool, backward: bool
) -> tuple[str, str]:
    """Return kernel and shape as kernels/triton_tiles.json names them. A tile holds for up to twice as many images."""
    images, layout = 1 << (n.bit_length() - 1), "channels_last" if channels_last else "contiguous"
    return (
        f"group_norm_silu {'backward' if backward else 'forward'}",
        f"{images} images of {pixels} pixels, {groups} groups of {cpg} channels of {num_bytes} bytes, {layout}",
    )


@functools.cache
def choose(
    n: int, pixels: int, groups: int, cpg: int, num_bytes: int, channels_last: bool, backward: bool, chip: str
) -> Tile:
    """Return the tile measured for this chip and shape, or else that of the rules.

    `n` images of `pixels` pixels and groups * cpg channels, with `num_bytes` bytes per element.
    """
    sizes = (n, pixels, groups, cpg, num_bytes, channels_last, backward)
    timed = triton_tiles.timed(chip, *key(*sizes))
    return by_rules(*sizes) if timed is None else Tile(**timed)


def by_rules(n: int, pixels: int, groups: int, cpg: int, num_bytes: int, channels_last: bool, backward: bool) -> Tile:
    """Return the tile for a shape that has not been measured."""
    enough = _FEW_PROGRAMS if pixels >= _LARGE_IMAGE else 1
    whole = _whole_image(pixels, groups, cpg, num_bytes, channels_last, backward, _VALUES[backward])
    if whole is None and not backward:
        whole = _whole_image(pixels, groups, cpg, num_bytes, channels_last, backward, _MOST_VALUES)
    thirds = cpg > 3 and cpg == 3 * (cpg & -cpg) and pixels == next_power_of_2(pixels)
    if thirds and num_bytes == 2 and channels_last and not backward:
        # The kernel of such tiles needs no registers for the padding.
        whole = _whole_image(pixels, groups, cpg, num_bytes, channels_last, backward, 2 * _MOST_VALUES, _THIRDS_ROW)
    if whole is not None and n * ceil_div(groups, whole.groups) >= enough:
        return whole
    if pixels <= _CACHED_IMAGE:
        loop = _loop(pixels, groups, cpg, _ROW // num_bytes if channels_last else 1, backward)
        if n * ceil_div(groups, loop.groups) >= enough:
            return loop
    # Rows of 256 bytes are whole pixels of images with few channels, as most large images are.
    split = _loop(pixels, groups, cpg, 256 // num_bytes if channels_last else 1, backward)
    programs = n * ceil_div(groups, split.groups)
    chunks = min(_CHUNKS, ceil_div(pixels, split.block_p), max(1, ceil_div(512, programs)))
    return replace(split, chunks=chunks)


def _whole_image(
    pixels: int,
    groups: int,
    cpg: int,
    num_bytes: int,
    channels_last: bool,
    backward: bool,
    values: int,
    row: int = _ROW,
) -> Tile | None:
    """Return a tile of all pixels by up to `row` bytes of channels; None if the registers lack room for even a sector.

    `values`: of a thread, at most.
    """
    block_p = next_power_of_2(pixels)
    limit = values * 32 * _MAX_WARPS // block_p
    together = _groups_within(max(min(limit, row // num_bytes), next_power_of_2(cpg)), groups, cpg)
    block_c = next_power_of_2(together * cpg)
    if block_c > limit:
        return None
    if channels_last and together < groups and together * cpg * num_bytes < _LEAST_ROW[backward]:
        return None
    # A small image gets more channels, until there is work for four warps.
    while block_p * block_c < 1024 and together < groups:
        together = min(2 * together, groups)
        block_c = next_power_of_2(together * cpg)
    size = block_p * block_c
    if backward:
        values = _VALUES[True] if size >= _SMALL_TILE else _FEWER_VALUES[True]
    else:
        # Few warps, of which several programs share a multiprocessor, overlap loads and arithmetic best.
        most = max(values, _MOST_VALUES)
        values = most if size >= _LARGE_TILE or num_bytes == 2 else _VALUES[False]
    warps = next_power_of_2(ceil_div(size, 32 * values))
    return Tile(block_p, block_c, together, max(1, min(warps, _MAX_WARPS)), 0)


def with_residual(tile: Tile, pixels: int, groups: int, cpg: int, num_bytes: int) -> Tile:
    """Return the tile for a sum of two images, which are read, and stored, in rows of 64 bytes rather than 32."""
    narrow = tile.chunks == 0 and tile.groups * cpg * num_bytes <= _ROW // 2 and 2 * tile.groups <= groups
    if not narrow or tile.block_p < pixels or 2 * tile.warps > _MAX_WARPS:
        return tile
    return replace(tile, groups=2 * tile.groups, block_c=2 * tile.block_c, warps=2 * tile.warps)


def _groups_within(channels: int, groups: int, cpg: int) -> int:
    """Return the whole groups in at most `channels` channels: one, or a power of two, which keeps rows aligned."""
    together = max(1, channels // cpg)
    return min(1 << (together.bit_length() - 1), groups)


def _loop(pixels: int, groups: int, cpg: int, channels: int, backward: bool) -> Tile:
    """Return a tile of `channels` channels, or one group, and as many pixels as the registers hold."""
    together = _groups_within(max(channels, cpg), groups, cpg)
    block_c = next_power_of_2(together * cpg)
    block_p = max(1, min(next_power_of_2(pixels), 32 * _LOOP_WARPS * _FEWER_VALUES[backward] // block_c))
    return Tile(block_p, block_c, together, _LOOP_WARPS, 1)
