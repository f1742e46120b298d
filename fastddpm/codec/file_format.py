"""The format of a compressed file: a header with everything that decoding depends on, then the coded bits.

    8 bytes     89 46 44 5A 0D 0A 1A 0A, "FDZ"
    4 bytes     length of the header in bytes; all numbers are little-endian
    header      JSON, compressed by zlib
    8 bytes     the head of the stack
    2 n bytes   the words of the stack, the deepest first
    32 bytes    SHA-256 of all of the above

The checksum is verified before anything else is read.
"""

import hashlib
import io
import json
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.storage.documents import MAX_JSON_BYTES, parse_json
from fastddpm.storage.files import write_whole
from fastddpm.storage.reading import check_size, open_regular, readable

from .ans import EMPTY

# The header

VERSION = 1
MOST_IMAGES = 2**31
_MOST_LANES = 2**16
_MOST_STEPS = 100_000
_MAX_BYTES = 2**36
_MOST_PIXELS = 2**26  # in one chunk of images
_TEXTS = ("conditioning", "network", "process", "outputs", "made", "pixels")
CONDITIONINGS = ("none", "unknown", "coded")


@dataclass(frozen=True)
class ChunkRun:
    """`repeats` consecutive chunks of `size` images; the images of a chunk are coded together, in `lanes` lanes."""

    repeats: int
    size: int
    lanes: int


@dataclass(frozen=True)
class Header:
    """The images' shape, the chain, and checksums of everything that decoding depends on.

    `shape`: (C, H, W). `levels`: number of pixel levels. `timesteps`: descending. `runs`: the chunks of images, in
    order. `decoder`: standard deviation of p(x_0 | first state), None for the model's own.
    `conditioning`: "none" for a network without classes, "unknown" if it was given its null label, "coded" if the
    labels are coded with the images.
    `network`, `process`, `outputs`, `pixels`: checksums of the weights, of the chain's tables, of some network outputs,
    and of the decoded images. `made`: the device and versions that computed the outputs.
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
        """Return the header for JSON; timesteps are stored as the first one and the differences between neighbours."""
        differences = [self.timesteps[0], *(-np.diff(self.timesteps)).tolist()]
        runs = [[run.repeats, run.size, run.lanes] for run in self.runs]
        return {"version": VERSION} | asdict(self) | {"timesteps": differences, "runs": runs}

    @staticmethod
    def of(data: dict[str, Any], where: str) -> "Header":
        """Return the header from the result of `to_dict`.

        Raises `DataError` unless every field is there, of its type and within bounds.
        """
        if data.get("version") != VERSION:
            raise DataError(f"{where} has format version {data.get('version')!r}; this fastddpm reads {VERSION}")
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
        differences = _numbers(data["timesteps"], "timesteps", where, 2, _MOST_STEPS)
        timesteps = tuple((differences[0] - np.cumsum([0, *differences[1:]])).tolist())
        if timesteps[-1] < 0:
            raise DataError(f"{where}: the timesteps go below 0")
        runs = tuple(
            ChunkRun(*_numbers(run, "a run", where, 3, 3)) for run in _list(data["runs"], "runs", where, 1, 1000)
        )
        decoder = data["decoder"]
        if decoder is not None and not (type(decoder) is float and 1e-6 < decoder < 10):
            raise DataError(f"{where}: decoder must be a standard deviation in 1e-6..10 or null")
        texts = {name: data[name] for name in _TEXTS}
        header = Header((shape[0], shape[1], shape[2]), levels, timesteps, runs, decoder, **texts)
        header._check_sizes(where)
        return header

    def _check_sizes(self, where: str) -> None:
        """Raise `DataError` for chunks that no encoder makes, since they could take unbounded memory."""
        pixels = self.shape[0] * self.shape[1] * self.shape[2]
        if any(run.lanes > _MOST_LANES or run.lanes & (run.lanes - 1) for run in self.runs):
            raise DataError(f"{where}: lanes must be a power of two, at most {_MOST_LANES}")
        if any(run.size * pixels > _MOST_PIXELS for run in self.runs):
            raise DataError(f"{where}: a chunk has more than {_MOST_PIXELS:,} pixels")
        if self.num_images > MOST_IMAGES:
            raise DataError(f"{where}: {self.num_images:,} images; at most {MOST_IMAGES:,} are read")


def _list(value: Any, name: str, where: str, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise DataError(f"{where}: {name} must be a list of {least} to {most} entries")
    return value


def _numbers(value: Any, name: str, where: str, least: int, most: int) -> list[int]:
    """Return `value` if it is a list of `least` to `most` positive integers below 2^31, otherwise raise `DataError`."""
    entries = _list(value, name, where, least, most)
    if not all(type(entry) is int and 0 < entry < 2**31 for entry in entries):
        raise DataError(f"{where}: {name} must hold positive integers below 2^31")
    return entries


# The bytes of a file

_MAGIC = b"\x89FDZ\r\n\x1a\n"
_LENGTH, _HEAD = struct.Struct("<I"), struct.Struct("<Q")
_DIGEST = hashlib.sha256().digest_size
_SMALLEST = len(_MAGIC) + _LENGTH.size + _HEAD.size + _DIGEST


def pack(header: dict[str, Any], head: int, words: np.ndarray) -> tuple[bytes, int]:
    """Return the bytes of a file, and the number of those that are not the stack's."""
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    start = _MAGIC + _LENGTH.pack(len(text)) + text
    data = start + _HEAD.pack(head) + words.astype("<u2").tobytes()
    return data + hashlib.sha256(data).digest(), len(start) + _DIGEST


def unpack(data: bytes, where: str | Path) -> tuple[dict[str, Any], int, np.ndarray]:
    """Return the header, the stack's head and its words, uint16, of a file.

    Raises `DataError` if the file was not made by this codec, is cut short or was changed.
    """
    _verify(io.BytesIO(data), len(data), where)
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
    """Decompress the header, in bounded memory."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, MAX_JSON_BYTES)
    except zlib.error as error:
        raise DataError(f"{where}: the header cannot be decompressed: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise DataError(
            f"{where}: the header ends early, has bytes after its end, or unpacks to more than {MAX_JSON_BYTES:,} bytes"
        )
    return text


def read(path: Path) -> bytes:
    """Return a file's bytes, verified block by block before they take memory.

    Raises `UsageError` if there is no such file and `DataError` if it cannot be read or is damaged.
    """
    if path.is_dir() or not path.exists():
        raise UsageError(f"no file at {path}")
    with readable(path), open_regular(path) as file:
        size = check_size(file, _MAX_BYTES)
        _verify(file, size, path)
        file.seek(0)
        return file.read(size)


def _verify(file: BinaryIO, size: int, where: str | Path) -> None:
    """Raise `DataError` unless the `size` bytes of a file begin as this codec's and end with their checksum."""
    start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise DataError(f"{where} is not a file of fastddpm.compress")
    digest, left = hashlib.sha256(start), size - len(start) - _DIGEST
    while left > 0 and (block := file.read(min(2**20, left))):
        digest.update(block)
        left -= len(block)
    if size < _SMALLEST or digest.digest() != file.read(_DIGEST):
        raise DataError(f"{where} is damaged: it was cut short or changed, since its checksum is wrong")


def write(data: bytes, path: Path) -> None:
    """Write a file completely or not at all, making its directory if needed. Raises `StorageError` on failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    write_whole(path, lambda temporary: temporary.write_bytes(data))
