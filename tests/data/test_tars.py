"""Tar files of images: webdataset's layout, folders, and damaged or hostile files."""

import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folder import Load, opener
from helpers.packs import encoded

from fastddpm.data import Dataset
from fastddpm.data.readers import tar
from fastddpm.data.sources import open_image_source
from fastddpm.errors import DataError

PIXELS = np.random.default_rng(4).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
FILES = [encoded(pixels) for pixels in PIXELS]


def tar_of(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return opener(tmp_path / "cache", 8)


def check(dataset: Dataset, numbers: list[int], labels: list[int] | None) -> None:
    np.testing.assert_array_equal(dataset.images[:], PIXELS[numbers].transpose(0, 3, 1, 2))
    assert (None if dataset.labels is None else dataset.labels.tolist()) == labels


def samples(numbers: list[int], label: Callable[[int], tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    members = []
    for i in numbers:
        ending, data = label(i)
        members += [(f"{i:06}.png", FILES[i]), (f"{i:06}.{ending}", data), (f"{i:06}.txt", b"a caption")]
    return members


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_webdataset_in_order(kind: int, tmp_path: Path, load: Load) -> None:
    """Shards are sorted by name, samples keep their order, classes come from .cls or .json."""
    tar_of(tmp_path / "s" / "x-000001.tar", samples([5, 4, 6], lambda i: ("cls", b"%d" % (i % 3))), kind)
    tar_of(tmp_path / "s" / "x-000000.tar", samples([2, 9, 0], lambda i: ("json", json.dumps({"label": i}).encode())))
    lines: list[str] = []
    check(load(tmp_path / "s", report=lines.append), [2, 9, 0, 5, 4, 6], [2, 9, 0, 2, 1, 0])
    assert len(lines) == 2 and "6 files are not read" in lines[0] and "6 .txt" in lines[0]
    assert lines[1] == "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    check(load(tmp_path / "s" / "x-000001.tar", keep="encoded"), [5, 4, 6], [2, 1, 0])
    names = [item.name for item in open_image_source(tmp_path / "s").items()]
    assert names[0] == "x-000000.tar: 000002.png" and len(names) == 6


def test_shards_are_named_by_splits(tmp_path: Path, load: Load) -> None:
    tar_of(tmp_path / "s" / "train-0.tar", [("a.png", FILES[0])])
    tar_of(tmp_path / "s" / "test-0.tar", [("a.png", FILES[1]), ("b.png", FILES[2])])
    check(load(tmp_path / "s"), [0], None)
    check(load(tmp_path / "s", split="test"), [1, 2], None)
    (tmp_path / "s" / "train-0.tar").unlink()
    with pytest.raises(DataError, match=r"has no train-\*\.tar; it has test-0\.tar"):
        load(tmp_path / "s")


def test_a_tar_of_folders_has_their_classes_and_splits(tmp_path: Path, load: Load) -> None:
    names = ["dog/1.png", "cat/2.PNG", "emu/x/3.png", "cat/4.png"]
    path = tar_of(tmp_path / "x.tar", [(name, FILES[i]) for i, name in enumerate(names)])
    check(load(path), [0, 1, 2, 3], [1, 0, 2, 0])
    path = tar_of(tmp_path / "y.tar", [(f"train/{n}" if i < 3 else f"test/{n}", FILES[i]) for i, n in enumerate(names)])
    check(load(path), [0, 1, 2], [1, 0, 2])
    check(load(path, split="test"), [3], None)


def test_json_without_a_label_is_no_label(tmp_path: Path, load: Load) -> None:
    path = tar_of(tmp_path / "x.tar", samples([1, 2], lambda i: ("json", b'{"width": 8, "label": "cat"}')))
    check(load(path), [1, 2], None)


def test_samples_that_cannot_be_used_are_named(tmp_path: Path, load: Load) -> None:
    members = [
        ("a.png", FILES[0]), ("a.cls", b"0"),
        ("b.png", FILES[1]), ("b.cls", b"cat"),
        ("c.png", FILES[2]), ("c.jpg", FILES[3]), ("c.cls", b"1"),
        ("d.png", b"text"), ("d.cls", b"1"),
        ("e.seg.png", FILES[4]), ("e.png", FILES[5]), ("e.cls", b" 2\n"),
    ]  # fmt: skip
    path = tar_of(tmp_path / "x.tar", members)
    with pytest.raises(DataError) as error:
        load(path)
    assert [line.strip() for line in str(error.value).splitlines()][:4] == [
        f"3 of 5 images in {path} cannot be used:",
        "x.tar: b.png: cannot be read: its label: b.cls holds no number",
        "x.tar: c.png: cannot be read: several images in one sample: c.png, c.jpg",
        "x.tar: d.png: not an image of a known format (PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF)",
    ]
    check(load(path, skip_bad=True), [0, 5], [0, 2])


def test_very_many_files_of_one_name(tmp_path: Path, load: Load) -> None:
    path = tar_of(tmp_path / "x.tar", [(f"IMG.{i}.png", FILES[0]) for i in range(70)])
    with pytest.raises(DataError, match=r"more than 64 files in a row have the name '\./IMG' before the first dot"):
        load(path)


def special(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def test_hostile_members_reach_nothing(tmp_path: Path, load: Load) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "x.tar"
    with tarfile.open(path, "w") as archive:
        for i, name in enumerate(["../../escaped.png", "/absolute.png", "a/../../b.png", "C:\\x.png"]):
            info = tarfile.TarInfo(name)
            info.size = len(FILES[i])
            archive.addfile(info, io.BytesIO(FILES[i]))
        archive.addfile(special("link.png", tarfile.SYMTYPE, "/etc/passwd"))
        archive.addfile(special("hard.png", tarfile.LNKTYPE, "../../etc/passwd"))
        archive.addfile(special("device.png", tarfile.CHRTYPE))
        archive.addfile(special("pipe.png", tarfile.FIFOTYPE))
        archive.addfile(special("folder.png", tarfile.DIRTYPE))
        info = tarfile.TarInfo("nested.tar")
        archive.addfile(info)
    check(load(path), [0, 1, 2, 3], None)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if "cache" not in p.parts)
    assert left == ["inside", "inside/x.tar"] and not Path("/absolute.png").exists()


def test_a_member_of_ten_gigabytes_of_zeros(tmp_path: Path, load: Load) -> None:
    """The member is a hole in the file. It is refused because of its size and not read."""
    path = tmp_path / "x.tar"
    size = 10 * 2**30
    header = special("zeros.png", tarfile.REGTYPE, size=size).tobuf(tarfile.GNU_FORMAT)
    rest = tar_of(tmp_path / "rest.tar", [("a.png", FILES[0])]).read_bytes()
    with path.open("wb") as file:
        file.write(header)
        file.seek(512 + size)
        file.write(rest)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"zeros\.png: cannot be read: 10,737,418,240 bytes; at most 268,435,456"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()
    check(load(path, skip_bad=True), [0], None)


def header(size: bytes, kind: bytes = tarfile.XHDTYPE, name: str = "a.png") -> bytes:
    """Return a header whose size field is these twelve bytes."""
    buffer = bytearray(special(name, kind).tobuf(tarfile.USTAR_FORMAT))
    buffer[124:136] = size
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    return bytes(buffer)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [b"\xff" * 10 + b"\xf8\x00", b"\xff" * 9 + b"\0\0\0", b"77777777777\0"])
def test_headers_that_claim_impossible_sizes(kind: bytes, size: bytes, tmp_path: Path, load: Load) -> None:
    """A negative size could make the reader go in circles, and a huge one would be read into memory."""
    path = tmp_path / "x.tar"
    whole = tar_of(tmp_path / "rest.tar", [("b.png", FILES[0])]).read_bytes()
    for before in (b"", whole[:1024]):
        path.write_bytes(before + header(size, kind) + whole)
        tracemalloc.start()
        with pytest.raises(DataError, match=r"x\.tar"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()


def test_endless_headers_of_headers(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "x.tar"
    one = header(b"%011o\0" % 1, tarfile.GNUTYPE_LONGNAME) + b"a".ljust(512, b"\0")
    path.write_bytes(one * 3000 + bytes(1024))
    with pytest.raises(DataError, match="cannot be read as a tar file"):
        load(path)


def test_damage_and_truncation_are_errors(tmp_path: Path, load: Load) -> None:
    """tarfile takes a damaged header for the end of the file and leaves out the members after it."""
    whole = tar_of(tmp_path / "whole.tar", [(f"{i}.png", data) for i, data in enumerate(FILES)]).read_bytes()
    path = tmp_path / "x.tar"
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = archive.getmembers()[3].offset
    for data in (
        whole[:third], whole[: third + 100], whole[: third + 600], whole[:third] + b"x" + whole[third + 1 :], b"",
        b"text" * 300, bytes(511),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"x\.tar (cannot be read as a tar file|holds no images)"):
            load(path)
    tar_of(path, [("a.txt", b"x")])
    with pytest.raises(DataError, match=r"x\.tar holds no images"):
        load(path)


def test_sparse_members_are_refused(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(FILES[0])
        info.pax_headers = {"GNU.sparse.map": "0,8", "GNU.sparse.size": "100000"}
        archive.addfile(info, io.BytesIO(FILES[0]))
    with pytest.raises(DataError, match=r"a\.png: cannot be read: a sparse file"):
        load(path)


def test_a_file_that_shrinks_afterwards(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", [("a.png", FILES[0])])
    (item,) = open_image_source(path).items()
    os.truncate(path, 600)
    with pytest.raises(ValueError, match="the tar file is cut off"):
        item.read()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_members(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tar_of(tmp_path / f"{count}.tar", [(f"{i}.png", b"x") for i in range(count)], tarfile.USTAR_FORMAT)
        tracemalloc.start()
        assert sum(1 for _ in open_image_source(path).items()) == open_image_source(path).count == count
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    # The smaller of two, because now and then Python doubles a table of its own, by megabytes in a long session.
    few, many = (min(peak(count), peak(count)) for count in (500, 4000))
    assert many < few + 100_000, (few, many)


def test_the_limits_are_what_the_messages_say() -> None:
    assert tar._MAX_SAMPLE_FILES == 64
