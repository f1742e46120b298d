"""The file: refused whole when a bit of it is wrong, and bounded in what a stranger's header can ask for."""

import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.networks import SMALLEST, shaken

from fastddpm.codec import decode, encode, file_format
from fastddpm.codec.file_format import Header
from fastddpm.config import CodecOptions, DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet import UNet

MAGIC = 8


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(shaken(UNet(SMALLEST), 0.05), Diffusion(DiffusionConfig(timesteps=30, beta_end=0.4)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(sampler: Sampler) -> bytes:
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4)).astype(np.uint8)
    return encode(sampler, images, None, CodecOptions(steps=5, batch=4)).data


def never(*_arguments: object) -> None:
    raise AssertionError("something was decoded")


def test_every_flipped_byte_is_refused(data: bytes, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddpm.codec.bits_back.decode", never)
    for i in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :]
            with pytest.raises(DataError, match="not a file of" if i < MAGIC else "damaged"):
                decode(sampler, damaged)


def test_every_truncation_is_refused(data: bytes, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddpm.codec.bits_back.decode", never)
    for length in range(len(data)):
        with pytest.raises(DataError, match="not a file of" if length < MAGIC else "damaged"):
            decode(sampler, data[:length])
    for longer in (data + b"\0", data + data, b"\0" + data):
        with pytest.raises(DataError):
            decode(sampler, longer)


def test_foreign_files_are_refused(sampler: Sampler) -> None:
    for foreign in (b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\3\4" + bytes(2000), bytes(8)):
        with pytest.raises(DataError, match="not a file of fastddpm"):
            decode(sampler, foreign, "picture.png")


def sealed(text: bytes, rest: bytes, length: int | None = None) -> bytes:
    """A file with a checksum that fits, as a hostile author would make it."""
    start = data_start(len(text) if length is None else length) + text + rest
    return start + sha256(start).digest()


def data_start(length: int) -> bytes:
    return b"\x89FDZ\r\n\x1a\n" + struct.pack("<I", length)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<I", data[8:12])[0]
    return json.loads(zlib.decompress(data[12 : 12 + length])), data[12 + length : -32]


def changed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    header, rest = parts(data)
    change(header)
    return sealed(zlib.compress(json.dumps(header).encode()), rest)


def put(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.update(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "format version 2; this fastddpm reads 1"),
        ({"version": None}, "version None"),
        ({"extra": 1}, "must have the fields"),
        ({"shape": [1, 4]}, "shape must be a list of 3"),
        ({"shape": [1, 4, 2**40]}, "positive integers below"),
        ({"shape": [2**20, 2**20, 2**20]}, "a chunk has more than 67,108,864 pixels"),
        ({"shape": [1, 4, True]}, "positive integers"),
        ({"shape": [1, 8, 8]}, "does not suit the model"),
        ({"levels": 257}, "levels must be in"),
        ({"levels": 1}, "levels must be in"),
        ({"levels": "256"}, "levels must hold"),
        ({"timesteps": [29]}, "2 to 100000 entries"),
        ({"timesteps": [29, 30]}, "go below 0"),
        ({"timesteps": [29, 0, 29]}, "positive integers"),
        ({"timesteps": [29, -3]}, "positive integers"),
        ({"timesteps": [28, 28]}, "does not suit the model"),
        ({"timesteps": [1] * 100_001}, "2 to 100000 entries"),
        ({"runs": []}, "1 to 1000 entries"),
        ({"runs": [[1, 1, 3]]}, "power of two"),
        ({"runs": [[1, 1, 2**20]]}, "power of two"),
        ({"runs": [[1, 2**30, 16]]}, "a chunk has more than 67,108,864 pixels"),
        ({"runs": [[2**30, 2, 16], [2**30, 2, 16]]}, "images; at most"),
        ({"runs": [[1, 4096, 16]]}, "larger chunks of images than its"),
        ({"runs": [[1, 1]]}, "a run must be a list of 3"),
        ({"runs": [[1, 1, 16]] * 1001}, "1 to 1000 entries"),
        ({"runs": {"a": 1}}, "1 to 1000 entries"),
        ({"decoder": 0.0}, "decoder must be"),
        ({"decoder": 1}, "decoder must be"),
        ({"decoder": float("nan")}, "decoder must be"),
        ({"conditioning": "maybe"}, "one of none, unknown, coded"),
        ({"conditioning": "coded"}, "does not suit the model"),
        ({"made": "a" * 201}, "text of at most 200"),
        ({"made": "red \x1b[31m"}, "text of at most 200"),
        ({"network": 5}, "text of at most 200"),
        ({"network": "0" * 32}, "another model"),
        ({"outputs": "0" * 32}, "other last bits"),
        ({"process": "0" * 32}, "other last bits"),
    ],
)
def test_hostile_headers_are_refused(
    fields: dict[str, object], message: str, data: bytes, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastddpm.codec.bits_back.decode", never)
    with pytest.raises(DataError, match=message):
        decode(sampler, changed(data, put(**fields)))


def test_hostile_bytes_are_refused(data: bytes, sampler: Sampler) -> None:
    _, rest = parts(data)
    header = zlib.compress(json.dumps(parts(data)[0]).encode())
    for damaged, message in [
        (sealed(b"not deflated", rest), "cannot be decompressed"),
        (sealed(header[:-5], rest), "ends early"),
        (sealed(header + b"more", rest), "has bytes after its end"),
        (sealed(zlib.compress(bytes(2**23)), rest), "more than 2,097,152 bytes"),
        (sealed(zlib.compress(b"[1]"), rest), "not an object"),
        (sealed(zlib.compress(b'{"a":1,"a":2}'), rest), "given twice"),
        (sealed(header, rest, 2**32 - 1), "does not fit a file"),
        (sealed(header, rest[:-1]), "does not fit a file"),
        (sealed(header, bytes(8) + rest[8:]), "less than 2"),
    ]:
        with pytest.raises(DataError, match=message):
            decode(sampler, damaged)


def test_other_streams_end_in_an_error(data: bytes, sampler: Sampler, rng: np.random.Generator) -> None:
    """Bits of one's own under a checksum that fits, and groups that the bits were not coded in: never wrong images."""
    header, rest = parts(data)
    text = zlib.compress(json.dumps(header).encode())
    for _ in range(20):
        noise = rng.integers(0, 256, len(rest) - 8).astype(np.uint8).tobytes()
        with pytest.raises(DataError):
            decode(sampler, sealed(text, rest[:8] + noise))
    for cut in (2, 10, 100):
        with pytest.raises(DataError):
            decode(sampler, sealed(text, rest[:8] + rest[8 + cut :]))
    with pytest.raises(DataError):  # two thousand million images from a few hundred bytes
        outputs = encode(sampler, np.zeros((1, 1, 4, 4), np.uint8), None, CodecOptions(steps=5)).header.outputs
        decode(sampler, changed(data, put(runs=[[2**31 - 1, 1, 16]], outputs=outputs)))
    with pytest.raises(DataError, match="does not give the images"):
        decode(sampler, changed(data, put(pixels="0" * 32)))


def test_the_header_comes_back(data: bytes) -> None:
    fields, head, words = file_format.unpack(data, "file")
    header = Header.of(fields, "file")
    assert header.to_dict() == {**fields, "shape": (1, 4, 4)} and header.num_images == 6
    assert header.timesteps[0] == 29 and header.timesteps[-1] == 0 and len(header.timesteps) == 5
    assert file_format.pack(fields, head, words)[0] == data


def test_files_are_written_whole(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "new" / "images.fdz"
    file_format.write(data, path)
    assert file_format.read(path) == data and list(path.parent.iterdir()) == [path]
    with pytest.raises(StorageError, match="cannot write"):
        file_format.write(data, path / "below-a-file.fdz")
    for missing in (tmp_path / "nothing.fdz", tmp_path):
        with pytest.raises(UsageError, match="no file at"):
            file_format.read(missing)


def test_a_file_that_grew_is_refused_before_it_takes_memory(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.fdz"
    path.write_bytes(data)
    os.truncate(path, 2**27)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"x\.fdz is damaged: it was cut short or changed"):
            file_format.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
