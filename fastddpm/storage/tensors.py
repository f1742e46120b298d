"""A strict parser for safetensors from untrusted sources, with bounds on time and memory."""

from pathlib import Path

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
