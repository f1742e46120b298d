"""Reader of TensorFlow's checkpoints (TensorBundle, version 2), without TensorFlow: strict, every checksum verified.

    PREFIX.index                      a sorted table (LevelDB's format): variables, their types, shapes and places
    PREFIX.data-SSSSS-of-NNNNN        the bytes of the variables, little-endian, in N files (shards)

Names in the files are never used as paths.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastddpm.errors import DataError, UsageError
from fastddpm.storage.reading import open_regular, read_bytes, readable

from .crc32c import crc32c, masked

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48  # bytes: two handles, padded to 40, and the magic number
_TRAILER = 5  # bytes after a block: its compression, and its checksum
_MOST_INDEX_BYTES = 2**24
_MOST_SHARDS = 4096
_MOST_DIMENSIONS = 8
_VERSION = 1  # of the bundle format
_BFLOAT16 = 14
# TensorFlow's numbers of the types that are read; bfloat16 is widened to float32.
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", _BFLOAT16: "<u2", 19: "<f2"}


@dataclass(frozen=True)
class Variable:
    """Where a variable lies: `dtype` is TensorFlow's number, `offset` and `size` are bytes in file `shard`."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool


class Bundle(NamedTuple):
    """The index of a checkpoint: its variables by name, and the number of files with their bytes."""

    prefix: Path
    shards: int
    variables: Mapping[str, Variable]


def find(path: Path) -> Path | None:
    """Return the prefix of the checkpoint that `path` names: a prefix, or a directory with one; None if it names none.

    Raises `UsageError` for a directory with several, naming them.
    """
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(file.stem for file in found[:5])
            raise UsageError(f"{path} holds {len(found)} TensorFlow checkpoints; name one: {path}/NAME of {names}")
        return found[0].with_suffix("") if found else None
    return path if _index(path).is_file() else None


def open_bundle(prefix: Path) -> Bundle:
    """Read and verify the index of the checkpoint `prefix`. Raises `UsageError` without one, `DataError` if damaged."""
    path = _index(prefix)
    if not path.exists():
        raise UsageError(f"there is no TensorFlow checkpoint {prefix}: no file {path}")
    with readable(path):
        data = read_bytes(path, _MOST_INDEX_BYTES)
        shards, variables = 0, {}
        for key, value in _table(data):
            if not key:
                shards = _header(value)
            else:
                variables[key.decode("utf-8")] = _variable(value)
        if not shards:
            raise ValueError("it has no header")
    return Bundle(prefix, shards, variables)


def read(bundle: Bundle, names: Collection[str]) -> dict[str, np.ndarray]:
    """Return the variables `names`, each verified by its checksum, in their types (bfloat16 as float32).

    Raises `DataError`, naming the variable, if one is missing, partitioned, of another type, cut or damaged.
    """
    wanted = {name: _wanted(bundle, name) for name in names}
    files = {shard: _shard(bundle, shard) for shard in {variable.shard for variable in wanted.values()}}
    for shard, path in files.items():
        here = {name: variable for name, variable in wanted.items() if variable.shard == shard}
        try:
            with readable(path), open_regular(path) as file:
                size = file.seek(0, 2)
        except FileNotFoundError as error:
            raise DataError(f"{bundle.prefix}: its file {path.name} is missing") from error
        if sum(variable.size for variable in here.values()) > size:
            raise DataError(f"{path} has {size:,} bytes, fewer than the variables that the index places in it")
    return {name: _read(files[variable.shard], name, variable) for name, variable in wanted.items()}


def _read(path: Path, name: str, variable: Variable) -> np.ndarray:
    with readable(path), open_regular(path) as file:
        file.seek(variable.offset)
        data = file.read(variable.size)
    if len(data) != variable.size:
        raise DataError(f"{path} is cut: {name} should end at byte {variable.offset + variable.size:,}")
    if masked(crc32c(data)) != variable.checksum:
        raise DataError(f"{path} is damaged: the checksum of {name} does not fit its bytes")
    array = np.frombuffer(data, _DTYPES[variable.dtype]).reshape(variable.shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if variable.dtype == _BFLOAT16 else array


def _wanted(bundle: Bundle, name: str) -> Variable:
    variable = bundle.variables.get(name)
    if variable is None:
        raise DataError(f"{bundle.prefix} lacks the variable {name}")
    if variable.sliced:
        raise DataError(f"{bundle.prefix}: {name} is partitioned, which is not read; save it as one variable")
    if variable.dtype not in _DTYPES:
        raise DataError(f"{bundle.prefix}: {name} has TensorFlow's type number {variable.dtype}, which is not read")
    expected = math.prod(variable.shape) * np.dtype(_DTYPES[variable.dtype]).itemsize
    if variable.size != expected or variable.shard >= bundle.shards:
        raise DataError(
            f"{bundle.prefix}: {name} of shape {variable.shape} should take {expected:,} bytes in one of "
            f"{bundle.shards} files; the index has {variable.size:,} in number {variable.shard}"
        )
    return variable


def _index(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def _shard(bundle: Bundle, shard: int) -> Path:
    return bundle.prefix.with_name(f"{bundle.prefix.name}.data-{shard:05}-of-{bundle.shards:05}")


# The table: its errors are ValueError, to which the caller adds the file's name


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a table in LevelDB's format."""
    if len(data) < _FOOTER or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise ValueError("it is not the index of a TensorFlow checkpoint of version 2")
    footer = data[-_FOOTER:-8]
    at = 0
    for _ in range(2):  # the handle of an index of filters, which TensorFlow leaves empty
        _, at = _varint(footer, at)
    handle, _ = _handle(footer, at)
    last = b""
    for _, value in _entries(_block(data, handle)):
        for key, inner in _entries(_block(data, _handle(value, 0)[0])):
            if key <= last and last:
                raise ValueError("its keys are not sorted")
            last = key
            yield key, inner


def _block(data: bytes, handle: tuple[int, int]) -> bytes:
    offset, size = handle
    if offset + size + _TRAILER > len(data) - _FOOTER:
        raise ValueError("it is cut, or a block lies outside of it")
    if data[offset + size] != 0:
        raise ValueError("it is compressed, which TensorFlow does not do")
    stored = int.from_bytes(data[offset + size + 1 : offset + size + _TRAILER], "little")
    if masked(crc32c(data[offset : offset + size + 1])) != stored:
        raise ValueError("it is damaged: the checksum of a block does not fit its bytes")
    return data[offset : offset + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a block. Keys share their beginning with the key before."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if len(block) < 4 or end < 0:
        raise ValueError("a block is too short")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or at + own + size > end:
            raise ValueError("an entry of a block is longer than the block")
        key = key[:shared] + block[at : at + own]
        at += own + size
        yield key, block[at - size : at]


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, the lowest first, and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("a number does not end")


# Protocol buffers


def _header(data: bytes) -> int:
    """Return the number of shards of a BundleHeaderProto."""
    fields = _fields(data)
    shards, endianness = _number(fields, 1), _number(fields, 2)
    if endianness != 0:
        raise ValueError("its numbers are big-endian, which is not read")
    for version in _messages(fields, 3):
        least = _number(_fields(version), 2)
        if least > _VERSION:
            raise ValueError(f"it needs a reader of version {least} of the format; this one reads {_VERSION}")
    if not 1 <= shards <= _MOST_SHARDS:
        raise ValueError(f"it names {shards} data files; 1 to {_MOST_SHARDS} are read")
    return shards


def _variable(data: bytes) -> Variable:
    """Return the place of a variable from a BundleEntryProto, whose fields of value 0 are left out."""
    fields = _fields(data)
    shape = []
    for message in _messages(fields, 2):
        described = _fields(message)
        if _number(described, 3):
            raise ValueError("a variable has no shape")
        shape += [_number(_fields(dimension), 1) for dimension in _messages(described, 2)]
    if len(shape) > _MOST_DIMENSIONS or any(size >= 2**40 for size in shape):
        raise ValueError(f"a variable has no shape of at most {_MOST_DIMENSIONS} dimensions below 2^40")
    dtype, shard, offset, size, checksum = (_number(fields, number) for number in (1, 3, 4, 5, 6))
    if max(offset, size) >= 2**62:
        raise ValueError("a variable lies outside of any file")
    return Variable(dtype, tuple(shape), shard, offset, size, checksum, bool(_messages(fields, 7)))


def _fields(data: bytes) -> dict[int, list[int | bytes]]:
    """Return the fields of a message by number: numbers, or the bytes of what has a length."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            fields.setdefault(tag >> 3, []).append(value)
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(data, at)
        elif not size:
            raise ValueError("a message has a field of unknown kind")
        if at + size > len(data):
            raise ValueError("a message is cut")
        part = data[at : at + size]
        fields.setdefault(tag >> 3, []).append(part if kind == 2 else int.from_bytes(part, "little"))
        at += size
    return fields


def _number(fields: Mapping[int, list[int | bytes]], number: int) -> int:
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise ValueError("a message has text where a number belongs")
    return value


def _messages(fields: Mapping[int, list[int | bytes]], number: int) -> list[bytes]:
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise ValueError("a message has a number where another message belongs")
    return [value for value in values if isinstance(value, bytes)]
