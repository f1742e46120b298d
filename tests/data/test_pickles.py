"""Hostile pickles in place of CIFAR-10 batches: nothing runs, and memory is neither corrupted nor exhausted."""

import builtins
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastddpm.data import open_dataset
from fastddpm.data.readers.pickles import read_pickle
from fastddpm.errors import DataError

PIXELS = np.random.default_rng(5).integers(0, 256, (2, 3072), dtype=np.uint8)
GOOD = pickle.dumps({"data": PIXELS, "labels": [1, 2]}, 2)


def refusal(folder: Path, data: bytes) -> str:
    """Return the error message for a CIFAR-10 whose first batch is `data`."""
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(GOOD if i > 1 else data)
    with pytest.raises(DataError) as error:
        open_dataset(folder, image_size=32, channels=3)
    assert "data_batch_1 is not a CIFAR-10 batch" in str(error.value)
    return str(error.value)


class Runs:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    command = f"touch {canary}"
    calls = {
        "os.system": Runs(os.system, command),
        "eval": Runs(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "exec": Runs(builtins.exec, f"open({str(canary)!r}, 'w')"),
        "open": Runs(builtins.open, str(canary), "w"),
        "getattr": Runs(builtins.getattr, 1, "real"),
        "numpy": Runs(np.loadtxt, str(canary)),
    }
    made = {name: pickle.dumps({"data": call, "labels": [1]}, 2) for name, call in calls.items()}
    made |= {f"{name} at protocol 0": pickle.dumps({"data": call}, 0) for name, call in calls.items()}
    made["stack global"] = pickle.dumps({"data": calls["os.system"]}, 4)
    made["dotted name"] = b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93."
    made["attribute of an admitted name"] = b"\x80\x04\x8c\x07_codecs\x8c\x16encode.__self__.lookup\x93."
    made["extension registry"] = b"\x80\x02\x82\x01."
    made["persistent id"] = b"Pthing\n."
    return made


@pytest.mark.parametrize("kind", hostile_pickles(Path("x")))
def test_pickles_run_nothing(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    refusal(tmp_path / "c", hostile_pickles(canary)[kind])
    assert not canary.exists()


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """Unrestricted loading runs what the hostile pickles ask for, so the test above can fail."""
    canary = tmp_path / "canary"
    for kind in ("os.system", "eval", "exec", "open", "os.system at protocol 0", "stack global"):
        pickle.loads(hostile_pickles(canary)[kind])
        assert canary.exists(), kind
        canary.unlink()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def array(shape: bytes, kind: str = "u1", flags: bytes = b"N") -> bytes:
    """Return opcodes for an array of eight bytes. `flags`: a part of its dtype's state, b"N" for no state."""
    state = b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff" + flags + b"tb" if flags != b"N" else b""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
        b"(K\x01" + shape + b"cnumpy\ndtype\n" + text(kind) + b"\x89\x88\x87R" + state + b"\x89C\x08AAAAAAAAtb"
    )


ENCODE = b"(c_codecs\nencode\nq\x00" + text("a" * 2**16) + text("latin1") + b"\x86q\x01"
MEMORY_ATTACKS = {
    # numpy.dtype accepts a state that makes NumPy read these eight bytes as the address of an object.
    "object pointers": (array(b"K\x01\x85", "O", b"K\x00"), "an array of 'O'"),
    "shape beyond its bytes": (array(b"J\x00\x00\x00\x7f\x85"), "in 8 bytes"),
    "negative shape": (array(b"J\xff\xff\xff\xffJ\xf8\xff\xff\xff\x86"), "without a shape"),
    "shape of text": (array(text("8") + b"\x85"), "without a shape"),
    "memo": (b"Nr\xff\xff\xff\x7f", "stores at memo 2147483647"),
    "memo in text": (b"Np2147483647\n", "stores at memo 2147483647"),
    "bytes of a size": (b"\x8e" + struct.pack("<Q", 2**40), "expected 1099511627776 bytes"),
    "bytearray of a size": (b"\x96" + struct.pack("<Q", 2**40), "expected 1099511627776 bytes"),
    "encoding without end": (ENCODE + b"h\x00h\x01R" * 2**14 + b"l", "encodes 65536 characters"),
    "another encoding": (b"c_codecs\nencode\n" + text("a") + text("zlib") + b"\x86R", "as 'zlib'"),
}


def test_the_opcodes_of_the_attacks_are_well_formed() -> None:
    """`array` makes an array that pickle reads, too, so the attacks are refused for what they ask."""
    value = pickle.loads(b"\x80\x03" + array(b"K\x02K\x04\x86", "u1", b"K\x00") + b".")
    np.testing.assert_array_equal(value, np.full((2, 4), ord("A"), np.uint8))
    np.testing.assert_array_equal(
        value, read_pickle(b"\x80\x03}" + text("data") + array(b"K\x02K\x04\x86", "u1", b"K\x00") + b"s.")["data"]
    )


@pytest.mark.parametrize("kind", MEMORY_ATTACKS)
def test_pickles_cannot_corrupt_or_exhaust_memory(kind: str, tmp_path: Path) -> None:
    attack, reason = MEMORY_ATTACKS[kind]
    tracemalloc.start()
    try:
        assert reason in refusal(tmp_path / "c", b"\x80\x05}" + text("data") + attack + b"s.")
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()


def test_labels_nested_without_end_are_not_unfolded(tmp_path: Path) -> None:
    nested: Any = [1, 1]
    for _ in range(60):
        nested = [nested, nested]
    data = pickle.dumps({"data": PIXELS, "labels": nested})
    assert "labels are not integers" in refusal(tmp_path / "c", data)


@pytest.mark.parametrize(
    "name", ["_codecs encode", "numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct"]
)
def test_a_pickle_cannot_change_how_the_next_one_is_read(name: str) -> None:
    """The opcode BUILD sets attributes, here of the objects behind admitted names."""
    attributes = b"N}(" + text("__defaults__") + b"K\x01\x85" + text("__init__") + b"N" + text("array") + b"Nu\x86b"
    read_pickle(b"\x80\x02}" + text("data") + b"c" + name.replace(" ", "\n").encode() + b"\n" + attributes + b"s.")
    np.testing.assert_array_equal(read_pickle(GOOD)["data"], PIXELS)
