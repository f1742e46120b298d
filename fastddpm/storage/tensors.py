"""A strict parser for safetensors from untrusted sources, with bounds on time and memory."""

import os
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

from fastddpm.errors import DataError

from .documents import MAX_JSON_BYTES, parse_json

_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def parse_tensors(data: bytes, where: str | Path) -> dict[str, torch.Tensor]:
    """Parse safetensors from an untrusted source: tensors by name, on the CPU, that share no memory.

    `where`: the name of the source in messages. Raises `DataError` for a header beyond 2 MiB, names given twice, more
    than 8 dimensions, a dtype that `checkpoint.save` does not write, or offsets that overlap, leave gaps or disagree
    with the shapes.
    """
    check_header(data, where)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where}: not valid safetensors: {error}") from error


def read_start(file: BinaryIO, where: str | Path) -> bytes:
    """Return the bytes of an open safetensors file up to the end of its header, which tells the size of the file.

    So a file that was grown is refused before it is read. Raises `DataError` as `parse_tensors` does for the header,
    and for a file of another size than the tensors in it have together.
    """
    length = file.read(8)
    start = length + file.read(min(int.from_bytes(length, "little"), MAX_JSON_BYTES))
    check_header(start, where)
    size, ends = os.fstat(file.fileno()).st_size, [0]
    for name, entry in parse_json(start[8:], where).items():
        offsets = None if name == "__metadata__" else entry.get("data_offsets")
        if isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int:
            ends.append(offsets[1])
    if size != len(start) + max(ends):
        raise DataError(f"{where} has {size:,} bytes; by its header it should have {len(start) + max(ends):,}")
    return start


def check_header(data: bytes, where: str | Path) -> None:
    """Raise `DataError` for a header that `parse_tensors` refuses. The library itself checks less."""
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_JSON_BYTES, len(data) - 8):
        raise DataError(f"{where}: a safetensors header of {length:,} bytes in a file of {len(data):,} is not read")
    header = parse_json(data[8 : 8 + length], where)
    if not isinstance(header, dict):
        raise DataError(f"{where}: the safetensors header is not an object")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise DataError(f"{where}: tensor {name[:100]!r} has no dtype of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > _DIMENSIONS:
            raise DataError(f"{where}: tensor {name[:100]!r} has no shape of at most {_DIMENSIONS} dimensions")
        if not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise DataError(f"{where}: tensor {name[:100]!r} has a dimension outside 0..2^40 - 1")
