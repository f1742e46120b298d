"""Which part of an image one program of the Triton kernels takes."""

from dataclasses import dataclass

from ..triton_launch import ceil_div, next_power_of_2

# Float32 values of a tile that a thread keeps: x in the forward pass; x and the gradient in the backward pass.
_VALUES = {False: 64, True: 32}
_MAX_WARPS = 16
_SECTOR = 32  # bytes that memory moves at least
# Programs below which a large image is rather split: a GPU has some hundred multiprocessors to fill.
_FEW_PROGRAMS = 32
_LARGE_IMAGE = 1024  # pixels
_CHUNKS = 32  # into which an image is split at most; each program reads the sums of all
_SPLIT_TILE = 4096  # values


@dataclass(frozen=True)
class Tile:
    """`block_p` pixels by `block_c` channels, of which `groups` whole groups are used; `chunks` pieces of an image.

    chunks == 0: the tile holds all pixels, and the image is read once.
    """

    block_p: int
    block_c: int
    groups: int
    warps: int
    chunks: int

    @property
    def padded_groups(self) -> int:
        """The length of a vector of the groups. Two are padded to four: with two, the compiler spills registers."""
        return 1 if self.groups == 1 else max(4, next_power_of_2(self.groups))


def choose(n: int, pixels: int, groups: int, cpg: int, num_bytes: int, channels_last: bool, backward: bool) -> Tile:
    """The tile for `n` images of `pixels` pixels and groups * cpg channels, `num_bytes` bytes an element."""
    whole = _whole_image(pixels, groups, cpg, num_bytes, channels_last, backward)
    if whole is not None:
        programs = n * ceil_div(groups, whole.groups)
        if pixels < _LARGE_IMAGE or programs >= _FEW_PROGRAMS:
            return whole
    return _split(n, pixels, groups, cpg, num_bytes, channels_last)


def _whole_image(
    pixels: int, groups: int, cpg: int, num_bytes: int, channels_last: bool, backward: bool
) -> Tile | None:
    """As many channels as the registers hold, but no more than a 64-byte row; None where not even a sector's fit."""
    block_p = next_power_of_2(pixels)
    limit = _VALUES[backward] * 32 * _MAX_WARPS // block_p
    together = _groups_within(max(min(limit, 64 // num_bytes), next_power_of_2(cpg)), groups, cpg)
    block_c = next_power_of_2(together * cpg)
    if block_c > limit:
        return None
    if channels_last and together < groups and together * cpg * num_bytes < _SECTOR:
        return None
    # Small images: more channels, until there is work for four warps.
    while block_p * block_c < 1024 and together < groups:
        together = min(2 * together, groups)
        block_c = next_power_of_2(together * cpg)
    warps = next_power_of_2(ceil_div(block_p * block_c, 32 * _VALUES[backward]))
    return Tile(block_p, block_c, together, max(1, min(warps, _MAX_WARPS)), 0)


def _groups_within(channels: int, groups: int, cpg: int) -> int:
    """Whole groups of a block of at most `channels` channels: one, or a power of two, which keeps rows aligned."""
    together = max(1, channels // cpg)
    return min(1 << (together.bit_length() - 1), groups)


def _split(n: int, pixels: int, groups: int, cpg: int, num_bytes: int, channels_last: bool) -> Tile:
    together = _groups_within(max(256 // num_bytes if channels_last else 1, cpg), groups, cpg)
    block_c = next_power_of_2(together * cpg)
    block_p = max(1, min(next_power_of_2(pixels), _SPLIT_TILE // block_c))
    programs = n * ceil_div(groups, together)
    chunks = min(_CHUNKS, ceil_div(pixels, block_p), max(1, ceil_div(512, programs)))
    return Tile(block_p, block_c, together, 4, chunks)
