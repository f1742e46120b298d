"""The file: what the bits depend on, and the bits, under one checksum.

    8 bytes     89 46 44 5A 0D 0A 1A 0A, "FDZ"
    4 bytes     length of the header, little-endian like everything here
    header      JSON, deflated
    8 bytes     the head of the stack
    2 n bytes   its words, the deepest first
    32 bytes    SHA-256 of all of the above

Nothing of a file is looked at before its checksum is right.
"""

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import DataError, UsageError
from fastddpm.storage.documents import MAX_JSON_BYTES, parse_json
from fastddpm.storage.files import write_whole

from .ans import EMPTY

# What a file says of its images and of what its bits depend on

VERSION = 1
MOST_IMAGES = 2**31
_MOST_LANES = 2**16
_MOST_STEPS = 100_000
_MOST_PIXELS = 2**26  # of the images that are coded side by side
_TEXTS = ("conditioning", "network", "process", "outputs", "made", "pixels")
CONDITIONINGS = ("none", "unknown", "coded")


@dataclass(frozen=True)
class ChunkRun:
    """`repeats` chunks of `size` images that are coded side by side, in `lanes` lanes."""

    repeats: int
    size: int
    lanes: int


@dataclass(frozen=True)
class Header:
    """`shape`: (C, H, W). `levels`: values of a pixel. `timesteps`: descending. `runs`: the images in groups, in order.

    `decoder`: deviation of p(x_0 | first state), None for the model's own.
    `conditioning`: "none", a network without classes; "unknown", its null label; "coded", the labels are in the stream.
    `network`, `process`, `pixels`: checksums of the weights, of the chain's tables, of the images that come out.
    `outputs`: that of some outputs of the network, `made`: by what machinery.
    """

    shape: tuple[int, int, int]
    levels: int
    timesteps: tuple[int, ...]
    runs: tuple[ChunkRun, ...]
    decoder: float | None
    conditioning: str
    network: str
    process: str
    outputs: str
    made: str
    pixels: str

    @property
    def num_images(self) -> int:
        return sum(run.repeats * run.size for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; of the timesteps the first, and how far down each next one is."""
        downwards = [self.timesteps[0], *(-np.diff(self.timesteps)).tolist()]
        runs = [[run.repeats, run.size, run.lanes] for run in self.runs]
        return {"version": VERSION} | asdict(self) | {"timesteps": downwards, "runs": runs}

    @staticmethod
    def of(data: dict[str, Any], where: str) -> "Header":
        """The inverse of `to_dict`; `DataError` unless every field is there, of its type and within bounds."""
        if data.get("version") != VERSION:
            raise DataError(f"{where} has version {data.get('version')!r} of the format; version {VERSION} is read")
        names = {f.name for f in fields(Header)}
        if set(data) != names | {"version"}:
            raise DataError(f"{where}: the header must have the fields {', '.join(sorted(names))}")
        for name in _TEXTS:
            if not isinstance(data[name], str) or not data[name].isprintable() or len(data[name]) > 200:
                raise DataError(f"{where}: {name} must be text of at most 200 characters")
        if data["conditioning"] not in CONDITIONINGS:
            raise DataError(f"{where}: conditioning must be one of {', '.join(CONDITIONINGS)}")
        shape = _numbers(data["shape"], "shape", where, 3, 3)
        levels = _numbers([data["levels"]], "levels", where, 1, 1)[0]
        if not 2 <= levels <= 256:
            raise DataError(f"{where}: levels must be in 2..256; got {levels}")
        downwards = _numbers(data["timesteps"], "timesteps", where, 2, _MOST_STEPS)
        timesteps = tuple((downwards[0] - np.cumsum([0, *downwards[1:]])).tolist())
        if timesteps[-1] < 0:
            raise DataError(f"{where}: the timesteps go below 0")
        runs = tuple(
            ChunkRun(*_numbers(run, "a run", where, 3, 3)) for run in _list(data["runs"], "runs", where, 1, 1000)
        )
        decoder = data["decoder"]
        if decoder is not None and not (type(decoder) is float and 1e-6 < decoder < 10):
            raise DataError(f"{where}: decoder must be a deviation in 1e-6..10 or null")
        texts = {name: data[name] for name in _TEXTS}
        header = Header((shape[0], shape[1], shape[2]), levels, timesteps, runs, decoder, **texts)
        header._check_sizes(where)
        return header

    def _check_sizes(self, where: str) -> None:
        """`DataError` for groups that no encoder makes and that would take memory without end."""
        pixels = self.shape[0] * self.shape[1] * self.shape[2]
        if any(run.lanes > _MOST_LANES or run.lanes & (run.lanes - 1) for run in self.runs):
            raise DataError(f"{where}: lanes must be a power of two, at most {_MOST_LANES}")
        if any(run.size * pixels > _MOST_PIXELS for run in self.runs):
            raise DataError(f"{where}: more than {_MOST_PIXELS:,} pixels are coded side by side")
        if self.num_images > MOST_IMAGES:
            raise DataError(f"{where}: {self.num_images:,} images; at most {MOST_IMAGES:,} are in one file")


def _list(value: Any, name: str, where: str, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise DataError(f"{where}: {name} must be a list of {least} to {most} entries")
    return value


def _numbers(value: Any, name: str, where: str, least: int, most: int) -> list[int]:
    """Positive whole numbers below 2^31."""
    entries = _list(value, name, where, least, most)
    if not all(type(entry) is int and 0 < entry < 2**31 for entry in entries):
        raise DataError(f"{where}: {name} must hold positive whole numbers below 2^31")
    return entries


_MAGIC = b"\x89FDZ\r\n\x1a\n"
_LENGTH, _HEAD = struct.Struct("<I"), struct.Struct("<Q")
_DIGEST = hashlib.sha256().digest_size
_SMALLEST = len(_MAGIC) + _LENGTH.size + _HEAD.size + _DIGEST


def pack(header: dict[str, Any], head: int, words: np.ndarray) -> tuple[bytes, int]:
    """The bytes of a file, and how many of them are not the stack's."""
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    start = _MAGIC + _LENGTH.pack(len(text)) + text
    data = start + _HEAD.pack(head) + words.astype("<u2").tobytes()
    return data + hashlib.sha256(data).digest(), len(start) + _DIGEST


def unpack(data: bytes, where: str | Path) -> tuple[dict[str, Any], int, np.ndarray]:
    """Header, head and words, uint16, of a file; `DataError` for one that is foreign, cut short or changed."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise DataError(f"{where} is not a file of fastddpm.compress")
    if len(data) < _SMALLEST or hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise DataError(f"{where} is damaged: it is cut short or was changed, its checksum is wrong")
    length = _LENGTH.unpack_from(data, len(_MAGIC))[0]
    start = len(_MAGIC) + _LENGTH.size
    rest = len(data) - _DIGEST - _HEAD.size - start - length
    if rest < 0 or rest % 2:
        raise DataError(f"{where}: a header of {length:,} bytes does not fit a file of {len(data):,}")
    header = parse_json(_inflated(data[start : start + length], where), where)
    if not isinstance(header, dict):
        raise DataError(f"{where}: the header is not an object")
    head = _HEAD.unpack_from(data, start + length)[0]
    if head < EMPTY:
        raise DataError(f"{where}: the head of the stack is {head}, less than 2^48")
    return header, head, np.frombuffer(data, "<u2", rest // 2, start + length + _HEAD.size).astype(np.uint16)


def _inflated(data: bytes, where: str | Path) -> bytes:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, MAX_JSON_BYTES)
    except zlib.error as error:
        raise DataError(f"{where}: the header cannot be inflated: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise DataError(f"{where}: the header is cut short, followed by something, or beyond {MAX_JSON_BYTES:,} bytes")
    return text


def read(path: Path) -> bytes:
    """A file's bytes; `UsageError` where there is none, `DataError` where it cannot be read."""
    if not path.is_file():
        raise UsageError(f"no file at {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def write(data: bytes, path: Path) -> None:
    """Write a file, and its directory, whole or not at all; `StorageError` where that fails."""

    def make(temporary: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)

    write_whole(path, make)
