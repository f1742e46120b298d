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
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import DataError, UsageError
from fastddpm.files import write_whole
from fastddpm.untrusted import MAX_JSON_BYTES, parse_json

from .ans import EMPTY

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
