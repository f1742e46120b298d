"""Files that are damaged, forged, or no files: one error, at once, and in bounded memory."""

import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastddpm.errors import DataError
from fastddpm.storage.documents import MAX_JSON_BYTES, read_json, read_object
from fastddpm.storage.reading import open_regular, read_arrays, read_bytes

LIMIT = 10_000


def arrays() -> dict[str, np.ndarray]:
    return {"x": np.arange(12, dtype=np.float64).reshape(3, 4), "n": np.array(5)}


def archive(**options: object) -> bytes:
    data = io.BytesIO()
    np.savez_compressed(data, **arrays())  # type: ignore[arg-type]
    return data.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def forged_shape() -> bytes:
    """A header that promises 2^40 numbers, and 12 of them."""
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    return zipped({"x.npy": data.getvalue() + bytes(96), "n.npy": npy(np.array(5))})


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
    "a device without an end": lambda path: os.symlink("/dev/zero", path),
}
NO_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "empty": bytes,
    "cut short": lambda: archive()[:-30],
    "an .npy under that name": lambda: npy(np.zeros(3)),
    "a member missing": lambda: zipped({"x.npy": npy(np.zeros(3))}),
    "a member that is no array": lambda: zipped({"x.npy": b"hello", "n.npy": npy(np.array(5))}),
    "a pickled object": lambda: zipped({"x.npy": npy(np.array([{}], dtype=object)), "n.npy": npy(np.array(5))}),
    "bzip2": lambda: zipped({"x.npy": npy(np.zeros(3)), "n.npy": npy(np.array(5))}, zipfile.ZIP_BZIP2),
    "a shape of 8 TiB": forged_shape,
    "more than the limit": lambda: zipped({"x.npy": npy(np.zeros(10**6)), "n.npy": npy(np.array(5))}),
    "directory bytes of 0xff": lambda: archive()[:-60] + b"\xff" * 20 + archive()[-40:],
    "text": lambda: b"not an archive" * 100,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    NO_FILES[kind](path)
    with pytest.raises((ValueError, IsADirectoryError)), open_regular(path):
        pytest.fail("opened")
    with pytest.raises((ValueError, IsADirectoryError)):
        read_bytes(path, LIMIT)
    with pytest.raises(DataError, match=rf"{path} cannot be read"):
        read_json(path)
    with pytest.raises(DataError, match=rf"{path} cannot be read"):
        read_arrays(path, ["x"], LIMIT)


def test_a_missing_file_is_its_own_error(tmp_path: Path) -> None:
    for read in (lambda path: read_bytes(path, 1), read_json, lambda path: read_arrays(path, ["x"], 1)):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "x")


def test_bytes_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes; at most 4 are read"):
        read_bytes(tmp_path / "x", 4)


def test_whole_arrays_are_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(archive())
    found = read_arrays(tmp_path / "x.npz", ["x", "n"], LIMIT)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("damage", NO_ARCHIVES)
def test_damaged_arrays_are_one_error_in_bounded_memory(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(NO_ARCHIVES[damage]())
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{path} cannot be read \("):
            read_arrays(path, ["x", "n"], LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_any_byte_of_an_archive_may_be_damaged(place: int, tmp_path: Path) -> None:
    """Either the arrays are whole, as where a name or a time is damaged, or there is one error."""
    data = bytearray(archive())
    data[place % len(data)] ^= 0xFF
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    try:
        found = read_arrays(path, ["x", "n"], LIMIT)
    except DataError:
        return
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"[1]", "must hold a JSON object; it holds list"),
        (b"\xff", "not valid JSON"),
        (b"[" * 10_000, "nested too deeply"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, "nested too deeply"),
        (b"1" * 5000, "not valid JSON"),
        (b'"' + b"a" * MAX_JSON_BYTES + b'"', "at most 2,097,152 are read"),
        (b'{"a": 1, "a": 2}', "given twice"),
    ],
)
def test_damaged_documents_are_one_error(text: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(DataError, match=problem):
        read_object(tmp_path / "x.json")


def test_a_document_is_what_was_written(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "é"]}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == read_object(tmp_path / "x.json") == value
