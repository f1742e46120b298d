"""Checkpoints of other implementations, written from a network of ours by the inverse of the reading mapping."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.config import UNetConfig
from fastddpm.pretrained.foreign.catalogue import FORMATS
from fastddpm.pretrained.foreign.crc32c import crc32c, masked
from fastddpm.pretrained.foreign.mapping import rows

# 8 groups of one channel and more would leave the biases before a norm without effect; two levels attend, one not.
CONFIG: dict[str, Any] = dict(
    image_size=16, width=16, multipliers=(1, 2), blocks=1, attention_resolutions=(8,), dropout=0.0, groups=8
)


def theirs(name: str, config: UNetConfig, weights: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Our weights by the names and in the layouts of the format `name`."""
    family = FORMATS[name].family(dict(FORMATS[name].options) | options)
    return {
        row.theirs: row.layout.write([weights[ours].detach() for ours in row.ours]).contiguous()
        for row in rows(family, config)
    }


def container(name: str, tensors: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the implementation gives to torch.save, with averaged and raw weights if it has both."""
    if name == "tqch":
        shadow = {f"module.{key}": value for key, value in tensors.items()}
        model = {f"module.{key}": value for key, value in raw.items()}
        optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        ema = {"decay": 0.9999, "shadow": shadow, "num_updates": 7}
        return {"model": model, "optimizer": optimizer, "ema": ema, "epoch": 3}
    if name == "w86763777":
        table = {"time_embedding.timembedding.0.weight": torch.zeros(1000, 16)}
        return {
            "net_model": dict(raw) | table, "ema_model": dict(tensors) | table, "optim": {}, "sched": {"last_epoch": 9},
            "step": 9, "x_T": torch.zeros(2, 3, 16, 16),
        }  # fmt: skip
    return dict(tensors)


def write_bundle(prefix: Path, variables: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """A TensorFlow checkpoint: LevelDB's table format and its two kinds of messages, written a second time here."""
    files: list[bytearray] = [bytearray() for _ in range(shards)]
    records = [(b"", _field(1, shards) + _message(3, _field(1, 1)))]
    for number, (name, array) in enumerate(sorted(variables.items())):
        data, file = array.tobytes(), files[number % shards]
        shape = b"".join(_message(2, _field(1, size)) for size in array.shape)
        dtype = {"float32": 1, "int64": 9}[array.dtype.name]
        place = _field(3, number % shards) + _field(4, len(file)) + _field(5, len(data))
        checksum = bytes([6 << 3 | 5]) + struct.pack("<I", masked(crc32c(data)))
        records.append((name.encode(), _field(1, dtype) + _message(2, shape) + place + checksum))
        file += data
    write_index(prefix, records)
    for number, file in enumerate(files):
        prefix.with_name(f"{prefix.name}.data-{number:05}-of-{shards:05}").write_bytes(file)


def write_index(prefix: Path, records: list[tuple[bytes, bytes]]) -> None:
    """The table of `records`, sorted, in several blocks as TensorFlow writes of long ones."""
    out = bytearray()
    index = []
    for start in range(0, len(records), 7):
        some = records[start : start + 7]
        index.append((some[-1][0] + b"~", _block(out, some)))
    meta, top = _block(out, []), _block(out, index)
    footer = (meta + top).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    prefix.with_name(f"{prefix.name}.index").write_bytes(bytes(out) + footer)


def _block(out: bytearray, records: list[tuple[bytes, bytes]]) -> bytes:
    """Append a block whose keys share their beginnings; return its handle."""
    body, last = bytearray(), b""
    for key, value in records:
        shared = next((i for i, (a, b) in enumerate(zip(last, key, strict=False)) if a != b), min(len(last), len(key)))
        body += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        last = key
    body += struct.pack("<II", 0, 1) + b"\0"
    handle = _varint(len(out)) + _varint(len(body) - 1)
    out += body + struct.pack("<I", masked(crc32c(bytes(body))))
    return handle


def _varint(value: int) -> bytes:
    data = bytearray()
    while value >= 128:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _field(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _varint(value) if value else b""


def _message(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(data)) + data
