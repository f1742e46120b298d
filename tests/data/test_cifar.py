"""CIFAR-10 in each of its packings: exact when whole, one DataError when damaged, whatever the damage."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.data import open_dataset
from fastddpm.data.readers import cifar
from fastddpm.errors import DataError, UsageError

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
PER_BATCH = 7
RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (6, PER_BATCH, 3072), dtype=np.uint8)
LABELS = RNG.integers(0, 10, (6, PER_BATCH))
TRAIN = (PIXELS[:5].reshape(-1, 3, 32, 32), LABELS[:5].reshape(-1))
TEST = (PIXELS[5].reshape(-1, 3, 32, 32), LABELS[5])


def python2(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """Byte for byte the layout of the distributed files: protocol 2 of Python 2, whose strings are bytes."""

    def string(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING
        return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        b"(K\x01" + b"M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + string(pixels.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([int(label)]) for label in labels) + b"e"
    names = b"](" + b"".join(string(b"name_%d.png" % i) for i in range(len(labels))) + b"e"
    return (
        b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers
        + string(b"batch_label") + string(b"training batch 1 of 5") + string(b"filenames") + names + b"u."
    )  # fmt: skip


def python3(protocol: int, text_keys: bool = True) -> Callable[[np.ndarray, np.ndarray], bytes]:
    def write(pixels: np.ndarray, labels: np.ndarray) -> bytes:
        batch: dict[Any, Any] = {"batch_label": "one", "labels": labels.tolist(), "data": pixels, "filenames": ["a"]}
        return pickle.dumps(batch if text_keys else {k.encode(): v for k, v in batch.items()}, protocol)

    return write


def binary(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


def contents(write: Callable[[np.ndarray, np.ndarray], bytes], suffix: str = "") -> dict[str, bytes]:
    return {name + suffix: write(PIXELS[i], LABELS[i]) for i, name in enumerate(NAMES)}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz", folder: str = "cifar-10-batches-py/") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def check(source: Path, split: str = "train") -> None:
    images, labels = TRAIN if split == "train" else TEST
    dataset = open_dataset(source, image_size=32, channels=3, split=split)  # type: ignore[arg-type]
    assert dataset.images.dtype == np.uint8 and dataset.labels is not None and dataset.labels.dtype == np.int64
    np.testing.assert_array_equal(dataset.images, images)
    np.testing.assert_array_equal(dataset.labels, labels)


WRITERS = {
    "python 2": python2,
    **{f"python 3, protocol {p}": python3(p) for p in range(6)},
    "bytes as keys": python3(2, text_keys=False),
    "array of labels": lambda pixels, labels: pickle.dumps({"data": pixels, "labels": labels.astype(np.int32)}, 2),
    "columns first": lambda pixels, labels: pickle.dumps(
        {"data": np.asfortranarray(pixels), "labels": labels.tolist()}, 4
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_python_batches_are_exact(writer: str, split: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "cifar-10-batches-py", contents(WRITERS[writer]) | {"readme.html": b"<p>"})
    check(folder, split)
    check(tmp_path, split)  # its parent


def test_the_hand_written_python_2_batch_is_what_pickle_reads() -> None:
    batch = pickle.loads(python2(PIXELS[0], LABELS[0]), encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], PIXELS[0])
    assert batch[b"labels"] == LABELS[0].tolist() and batch[b"filenames"][1] == b"name_1.png"


@pytest.mark.parametrize("split", ["train", "test"])
def test_binary_batches_are_exact(split: str, tmp_path: Path) -> None:
    check(write_folder(tmp_path / "cifar-10-batches-bin", contents(binary, ".bin")), split)
    check(tmp_path, split)


@pytest.mark.parametrize(("name", "mode"), [("c.tar.gz", "w:gz"), ("C.TGZ", "w:gz"), ("c.tar", "w")])
def test_tar_files_are_exact_and_extract_nothing(name: str, mode: str, tmp_path: Path) -> None:
    for write, suffix in ((python2, ""), (binary, ".bin")):
        path = write_tar(tmp_path / name, contents(write, suffix), mode)
        for split in ("train", "test"):
            check(path, split)
        assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("resize", ["area", "lanczos"])
def test_other_sizes_need_resize(resize: str, tmp_path: Path) -> None:
    flat = np.repeat(RNG.integers(0, 256, (PER_BATCH, 3, 1), dtype=np.uint8), 1024, 2).reshape(PER_BATCH, 3072)
    folder = write_folder(tmp_path / "c", {name: python2(flat, LABELS[0]) for name in NAMES})
    dataset = open_dataset(folder, image_size=16, channels=3, resize=resize, split="test")  # type: ignore[arg-type]
    assert dataset.images.shape == (PER_BATCH, 3, 16, 16)
    np.testing.assert_array_equal(dataset.images[..., 5, 7], flat.reshape(PER_BATCH, 3, 1024)[..., 0])
    with pytest.raises(UsageError, match="CIFAR-10 is 32x32; the model takes 16x16: use --image-size 32, or --resize"):
        open_dataset(folder, image_size=16, channels=3)
    with pytest.raises(UsageError, match="CIFAR-10 is in colour; the model has 1 channel: use --image-channels 3"):
        open_dataset(folder, image_size=32, channels=1)


def refusal(source: Path) -> str:
    with pytest.raises(DataError) as error:
        open_dataset(source, image_size=32, channels=3)
    return str(error.value)


def test_incomplete_sets_name_what_is_missing(tmp_path: Path) -> None:
    files = contents(python2)
    del files["data_batch_3"], files["data_batch_5"]
    assert "lacks data_batch_3, data_batch_5" in refusal(write_folder(tmp_path / "c", files))
    assert "lacks data_batch_3, data_batch_5" in refusal(write_tar(tmp_path / "c.tar.gz", files))
    assert "holds no CIFAR-10 batch" in refusal(write_tar(tmp_path / "d.tar.gz", {"cat.png": b"x"}))


BAD_BATCHES = {
    "wrong dtype": (pickle.dumps({"data": PIXELS[0].astype(np.int32), "labels": [1] * 7}), "int32"),
    "wrong width": (pickle.dumps({"data": PIXELS[0][:, :3000], "labels": [1] * 7}), "(7, 3000)"),
    "no images": (pickle.dumps({"data": PIXELS[0][:0], "labels": []}), "N > 0"),
    "too few labels": (pickle.dumps({"data": PIXELS[0], "labels": [1] * 6}), "7 integers in 0..9"),
    "label 10": (pickle.dumps({"data": PIXELS[0], "labels": [10] * 7}), "7 integers in 0..9"),
    "huge label": (pickle.dumps({"data": PIXELS[0], "labels": [10**30] * 7}), "not a CIFAR-10 batch"),
    "labels of text": (pickle.dumps({"data": PIXELS[0], "labels": ["1"] * 7}), "labels are not integers"),
    "not a dictionary": (pickle.dumps([1, 2]), "holds a list"),
    "no data": (pickle.dumps({"labels": [1]}), "'data'"),
    "empty": (b"", "not a CIFAR-10 batch"),
    "text": (b"<!DOCTYPE html>", "not a CIFAR-10 batch"),
    "truncated": (python2(PIXELS[0], LABELS[0])[:-2000], "not a CIFAR-10 batch"),
    "float array": (pickle.dumps({"data": PIXELS[0].astype(float), "labels": [1] * 7}, 2), "'f8'"),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_damaged_batches_are_one_clear_error(kind: str, tmp_path: Path) -> None:
    data, message = BAD_BATCHES[kind]
    text = refusal(write_folder(tmp_path / "c", contents(python2) | {"data_batch_4": data}))
    assert message in text and "data_batch_4" in text and "\n" not in text


@pytest.mark.parametrize("data", [b"", binary(PIXELS[0], LABELS[0])[:-1], binary(PIXELS[0], LABELS[0] + 10)])
def test_damaged_binary_batches(data: bytes, tmp_path: Path) -> None:
    text = refusal(write_folder(tmp_path / "c", contents(binary, ".bin") | {"data_batch_2.bin": data}))
    assert "data_batch_2.bin" in text


VALID = python2(PIXELS[0][:1], LABELS[0][:1])


@given(position=st.integers(0, len(VALID) - 1), noise=st.binary(min_size=1, max_size=6))
def test_any_damage_is_a_data_error_or_a_batch(position: int, noise: bytes) -> None:
    data = bytearray(VALID)
    data[position : position + len(noise)] = noise
    try:
        images, labels = cifar._parse_pickle(bytes(data), "batch")
    except DataError:
        return
    assert images.dtype == np.uint8 and images.shape[1:] == (3, 32, 32) and len(images) == len(labels) > 0
    assert labels.dtype == np.int64 and labels.min() >= 0 and labels.max() <= 9


def test_hostile_tar_members_reach_nothing(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "c.tar.gz"
    data = contents(python2)
    with tarfile.open(path, "w:gz") as archive:
        for name, kind, target in [
            ("../escaped/readme", tarfile.REGTYPE, ""),
            ("/absolute", tarfile.REGTYPE, ""),
            ("test_batch", tarfile.SYMTYPE, "/etc/passwd"),
            ("data_batch_1", tarfile.LNKTYPE, "../../etc/passwd"),
            ("data_batch_2", tarfile.CHRTYPE, ""),
            ("data_batch_3", tarfile.FIFOTYPE, ""),
            ("data_batch_4", tarfile.DIRTYPE, ""),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    assert "holds no CIFAR-10 batch" in refusal(path)
    write_tar(path, data, folder="../../")  # a path outside, of which only the name counts
    check(path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["inside", "inside/c.tar.gz"]


@pytest.mark.parametrize("member", ["data_batch_1", "zeros", "pax header"])
def test_tar_bombs_are_bounded(member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_MAX_TAR_BYTES", 4 * 2**20)
    monkeypatch.setattr(cifar, "_MAX_BATCH_BYTES", 2**20)
    header = tarfile.TarInfo(member)
    header.size = 64 * 2**20
    if member == "pax header":
        header.type = tarfile.XHDTYPE
    path = tmp_path / "c.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf())
        for _ in range(64):
            file.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        assert "at most" in refusal(path) or "unpacks to more than" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()


def test_damaged_tar_files(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar.gz", contents(python2)).read_bytes()
    path = tmp_path / "c.tar.gz"
    for data in (b"", b"text", whole[: len(whole) // 2], whole[:2] + bytes(len(whole) - 2)):
        path.write_bytes(data)
        assert "c.tar.gz" in refusal(path)
    body = whole.index(b"\0", 10) + 1  # behind gzip's header, whose time and name count for nothing
    positions = range(body, len(whole), len(whole) // 200)
    for position in positions:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        assert "c.tar.gz" in refusal(path), f"byte {position} of {len(whole)}"
    assert len(positions) >= 200


def test_a_tar_file_grown_by_zeros_is_refused_and_not_read_one_by_one(tmp_path: Path) -> None:
    """gzip skips zeros at the end of a file, a byte at a time; four gigabytes of them take hours."""
    path = write_tar(tmp_path / "c.tar.gz", contents(python2))
    with path.open("ab") as file:
        file.write(bytes(1000))
    check(path)  # some programs pad to whole blocks
    os.truncate(path, 2**32)
    begun = time.monotonic()
    assert "more than 1,048,576 zeros follow its end" in refusal(path)
    assert time.monotonic() - begun < 20


def test_batches_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "c", contents(python2))
    (folder / "data_batch_2").unlink()
    os.mkfifo(folder / "data_batch_2")
    assert "data_batch_2 cannot be read: not a regular file" in refusal(folder)
    (folder / "data_batch_2").unlink()
    (folder / "data_batch_2").symlink_to("data_batch_2")
    assert "data_batch_2 cannot be read: Too many levels" in refusal(folder)
    monkeypatch.setattr(cifar, "_MAX_BATCH_BYTES", 1000)
    assert "data_batch_1 cannot be read" in refusal(folder) and "at most 1,000" in refusal(folder)
