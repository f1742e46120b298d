"""Checkpoints whose content is hostile under a manifest that fits."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers.marks import slow
from helpers.saved_checkpoint import reseal, saved, write_manifest

from fastddpm.errors import DataError
from fastddpm.storage import checkpoint, tensors

__all__ = ["saved"]


# Hostile content under a manifest that fits


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: Any, begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HOSTILE_TENSORS = {
    "empty": b"",
    "short": b"\0\0\0",
    "huge header length": struct.pack("<Q", 2**62) + b"{}",
    "header length of all ones": b"\xff" * 16,
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "header above the limit": safetensors_bytes(b" " * 2**21 + b"{}"),
    "a million tensors": b"",  # made when needed
    "overlap": safetensors_bytes({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, bytes(4)),
    "partial overlap": safetensors_bytes({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "gap": safetensors_bytes({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
    "unused tail": safetensors_bytes({"a": tensor([1], 0, 4)}, bytes(8)),
    "offsets beyond the file": safetensors_bytes({"a": tensor([2**20], 0, 2**22)}, bytes(4)),
    "offsets reversed": safetensors_bytes({"a": tensor([1], 4, 0)}, bytes(4)),
    "negative offset": safetensors_bytes({"a": tensor([1], -4, 0)}, bytes(4)),
    "shape overflow to zero": safetensors_bytes({"a": tensor([2**62, 4], 0, 0)}),
    "shape overflow": safetensors_bytes({"a": tensor([2**39, 2**39], 0, 4)}, bytes(4)),
    "shape beyond 64 bits": safetensors_bytes({"a": tensor([2**64 - 1, 0], 0, 0)}),
    "huge empty shape": safetensors_bytes({"a": tensor([2**62, 0], 0, 0)}),
    "shape against offsets": safetensors_bytes({"a": tensor([3], 0, 4)}, bytes(4)),
    "100,000 dimensions": safetensors_bytes({"a": tensor([1] * 100_000, 0, 4)}, bytes(4)),
    "negative dimension": safetensors_bytes({"a": tensor([-1], 0, 4)}, bytes(4)),
    "fractional dimension": safetensors_bytes({"a": tensor([1.0], 0, 4)}, bytes(4)),
    "name twice": safetensors_bytes(TWICE, bytes(4)),
    "unknown dtype": safetensors_bytes({"a": tensor([1], 0, 4, "Q32")}, bytes(4)),
    "dtype without torch type": safetensors_bytes({"a": tensor([2], 0, 1, "F4")}, bytes(1)),
    "dtype a list": safetensors_bytes({"a": tensor([1], 0, 4, [])}, bytes(4)),
    "entry a number": safetensors_bytes({"a": 1}),
    "entry without offsets": safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "header a list": safetensors_bytes(b"[]"),
    "header not JSON": safetensors_bytes(b"{"),
    "header not UTF-8": safetensors_bytes(b"\xff\xfe{}"),
    "header 1000 deep": safetensors_bytes(b'{"a":' * 1000 + b"1" + b"}" * 1000),
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
}
HOSTILE_JSON = {
    "nothing": b"",
    "200 deep": b"[" * 200 + b"]" * 200,
    "200 objects deep": b'{"a":' * 200 + b"1" + b"}" * 200,
    "a million deep": b"[" * 10**6 + b"]" * 10**6,
    "100 MB": b"",  # made when needed
    "not UTF-8": b'"\xff"',
    "UTF-16": "{}".encode("utf-16"),
    "key twice": b'{"a": 1, "a": 2}',
    "number of a million digits": b"1" * 10**6,
    "number too large for a float": b'{"a": -' + b"9" * 400 + b"}",
    "trailing text": b"{} {}",
    "truncated": b'{"a": [1, 2',
}


def hostile(case: str) -> bytes:
    if case == "a million tensors":
        entries = (b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6))
        return safetensors_bytes(b"{" + b",".join(entries) + b"}")
    if case == "100 MB":
        return b"[" + b"0," * (50 * 10**6) + b"0]"
    return (HOSTILE_TENSORS | HOSTILE_JSON)[case]


def peak_growth(action: Any) -> tuple[str, int]:
    """Run `action` in a forked child: the name of the exception it raised, and the growth of its peak memory, bytes."""
    import resource

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        name = "none"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            action()
        except BaseException as error:
            name = type(error).__name__
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(write, f"{name} {growth}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    name, _, growth_text = os.read(read, 1000).decode().partition(" ")
    os.close(read)
    return name, int(growth_text)


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(saved: Path, case: str) -> None:
    data = hostile(case)
    (saved / "ema.safetensors").write_bytes(data)
    reseal(saved)
    with pytest.raises(DataError, match=r"ema\.safetensors"):
        checkpoint.load(saved)
    name, growth = peak_growth(lambda: checkpoint.load(saved))
    assert name == "DataError"
    assert growth < 100e6 + len(data)


@pytest.mark.parametrize("case", HOSTILE_JSON)
@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_hostile_json_is_refused(saved: Path, case: str, name: str) -> None:
    if name == "manifest.json":
        write_manifest(saved, hostile(case))
    else:
        (saved / name).write_bytes(hostile(case))
        reseal(saved)
    with pytest.raises(DataError, match=name):
        checkpoint.load(saved)
    error, growth = peak_growth(lambda: checkpoint.load(saved))
    assert error == "DataError"
    assert growth < 100e6


@pytest.mark.slow
@pytest.mark.parametrize("text", [b"[],", *map(slow, [b"{},", b"[[]],", b'{"a":0},', b"0.1,", b'"\\ud800",'])])
def test_the_largest_json_takes_little_memory(text: bytes) -> None:
    data = b"[" + text * ((tensors.MAX_JSON_BYTES - 4) // len(text)) + b"0]"
    error, growth = peak_growth(lambda: tensors.parse_json(data, "x"))
    print(f"{text!r}: {growth / 1e6:.0f} MB")
    assert error == "none"
    assert growth < 150e6


FILES = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"version": 2, "step": 1, "files": {}},
        {"version": 1, "step": "1", "files": {}},
        {"version": 1, "step": -1, "files": {}},
        {"version": 1, "step": True, "files": {}},
        {"version": 1, "step": 1, "files": []},
        {"version": 1, "step": 1, "files": {"../../secret.json": FILES}},
        {"version": 1, "step": 1, "files": {"/etc/passwd": FILES}},
        {"version": 1, "step": 1, "files": {"a\nb.json": FILES}},
        {"version": 1, "step": 1, "files": {"weights.pt": FILES}},
        {"version": 1, "step": 1, "files": {"manifest.json": FILES}},
        {"version": 1, "step": 1, "files": {"a.json": None}},
        {"version": 1, "step": 1, "files": {"a.json": {"size": "1", "sha256": "0"}}},
        {"version": 1, "step": 1, "files": {"a.json": {"size": 1, "sha256": 0}}},
        {"version": 1, "step": 1, "files": {"config.json": {"size": 10**15, "sha256": "0"}}},
        {"version": 1, "step": 1, "files": {"ema.safetensors": {"size": 10**15, "sha256": "0"}}},
    ],
)
def test_hostile_manifests_are_refused(saved: Path, content: Any) -> None:
    if isinstance(content, dict) and "ema.safetensors" in content.get("files", ()):
        for name in ("config.json", "state.json", "weights.safetensors"):
            (saved / name).unlink()
    write_manifest(saved, json.dumps(content).encode())
    with pytest.raises(DataError):
        checkpoint.load(saved)
