"""Packs hold exactly what was put in, appear only when complete, and damage to them is always found."""

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.announcements import without_announcements
from helpers.image_folder import PLANES, Load, load, source
from helpers.packs import collection_of, encoded, numbered, packed
from PIL import Image

from fastddpm.data import cache, open_dataset, sources
from fastddpm.data.dataset import checksum
from fastddpm.data.image import Preprocessing, decode
from fastddpm.data.inspect import faults
from fastddpm.data.pack.format import TRAILER, open_pack
from fastddpm.data.pack.writer import write_pack
from fastddpm.errors import DataError, StorageError, UsageError

__all__ = ["load", "source"]
ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(12)
PIXELS = numbered(9)
RGB = Preprocessing(8, 3)


def unused(line: str) -> None:
    pytest.fail(line)


@pytest.mark.parametrize("labels", [None, [4, 4, 2, 0, 1, 7, 7, 7, 2**31 - 1]])
def test_a_pack_holds_what_was_put_in(tmp_path: Path, labels: list[int] | None) -> None:
    made = packed(tmp_path / "x.fdpack", PIXELS, labels)
    opened = open_pack(made.path)
    assert len(opened) == 9 and (None if opened.labels is None else opened.labels.tolist()) == labels
    assert opened.checksum == checksum(PIXELS, None if labels is None else np.array(labels))
    assert (opened.preprocessing, opened.store, opened.source, opened.left_out) == (RGB, "fitted", "files", 0)
    assert opened.decoder.startswith("pillow ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.fdpack"]
    assert faults(opened, full_list=tmp_path / "l", report=unused) == []


def test_images_are_indexed_like_an_array(tmp_path: Path) -> None:
    images = packed(tmp_path / "x.fdpack", PIXELS).images()
    assert (images.shape, len(images), images.nbytes, images.dtype) == (PIXELS.shape, 9, PIXELS.nbytes, np.uint8)
    keys = [3, -1, slice(None), slice(2, 8, 3), np.array([5, 0, 5, -2]), np.array([[1, 2], [3, 4]]), slice(4, 4), [8]]
    for key in keys:
        np.testing.assert_array_equal(images[key], PIXELS[key])
        assert images[key].dtype == np.uint8
    for key in (9, np.array([0, -10])):
        with pytest.raises(IndexError):
            images[key]


def test_the_layout_of_the_file(tmp_path: Path) -> None:
    """Read the file by hand as the module's docstring describes it: other programs and versions rely on that."""
    files = [encoded(image.transpose(1, 2, 0)) for image in PIXELS]
    path = packed(tmp_path / "x.fdpack", PIXELS, [1] * 9).path
    data = path.read_bytes()
    assert data[:8] == data[-8:] == b"FDPACK01"
    start, length = struct.unpack_from("<QQ", data, len(data) - 88)
    said = json.loads(data[start : start + length])
    assert said["count"] == 9 and said["labels"] is True and start + length + 88 == len(data)
    place = 8
    for i, file in enumerate(files):
        stored = data[place : place + len(file)]
        offset, size = struct.unpack_from("<QI", data, start - 9 * 24 + 16 * i)
        assert (stored, offset, size) == (file, place, len(file))
        place += len(file)
    assert data[start - 72 : start] == struct.pack("<9q", *[1] * 9)


def test_fitted_keeps_what_fits_and_stores_the_rest_without_loss(tmp_path: Path) -> None:
    smooth = np.asarray(Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((16, 16)))
    fits = encoded(smooth, "JPEG")
    large = encoded(RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8), "WEBP", lossless=True)
    bloated = encoded(smooth, "PNG") + bytes(10_000)  # more bytes than pixels: stored anew
    grey = encoded(RNG.integers(0, 256, (16, 16), dtype=np.uint8))
    files = [fits, large, bloated, grey]
    preprocessing = Preprocessing(16, 3, "lanczos")
    made = write_pack(collection_of(files), tmp_path / "x.fdpack", preprocessing, report=unused)
    images = made.images()
    for i, data in enumerate(files):
        np.testing.assert_array_equal(images[i], decode(data, preprocessing))
    assert images.encoded(0) == fits and images.encoded(3) == grey
    assert len(images.encoded(2)) < 1000 and images.encoded(1).startswith(b"\x89PNG")
    assert made.preprocessing == preprocessing and images.preprocessing == Preprocessing(16, 3)
    kept = write_pack(collection_of(files), tmp_path / "y.fdpack", preprocessing, store="original", report=unused)
    assert [kept.images().encoded(i) for i in range(4)] == files and kept.images().preprocessing == preprocessing
    np.testing.assert_array_equal(kept.images()[:], images[:])
    assert kept.checksum == made.checksum


def test_grey_models_and_every_kind_that_decodes(tmp_path: Path) -> None:
    grey = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(grey), encoded(np.stack([grey] * 3, -1)), encoded(grey, "GIF"), encoded(grey, exif=exif)]
    made = write_pack(collection_of(files), tmp_path / "x.fdpack", Preprocessing(8, 1), report=unused)
    np.testing.assert_array_equal(made.images()[:][:, 0], np.stack([grey, grey, grey, np.rot90(grey, -1)]))


def test_bad_images_are_listed_and_nothing_is_left(tmp_path: Path) -> None:
    files = [encoded(PIXELS[0].transpose(1, 2, 0)), b"text", b"", encoded(np.zeros((9, 8, 3), np.uint8))]
    with pytest.raises(DataError, match=r"(?s)3 of 4 images in files.*1: not an image.*2: the file is empty.*3: 8x9"):
        write_pack(collection_of(files), tmp_path / "x.fdpack", RGB, report=unused)
    assert list(tmp_path.iterdir()) == []


def test_left_out_images_change_the_checksum_to_that_of_the_rest(tmp_path: Path) -> None:
    files = [encoded(image.transpose(1, 2, 0)) for image in PIXELS]
    lines: list[str] = []
    made = write_pack(
        collection_of([b"bad", *files, b""], [9, *range(9), 9]), tmp_path / "x.fdpack", RGB, skip_bad=True,
        report=lines.append,
    )  # fmt: skip
    assert made.left_out == 2 and made.checksum == checksum(PIXELS, np.arange(9))
    np.testing.assert_array_equal(made.images()[:], PIXELS)
    assert len(lines) == 1 and lines[0].endswith("left out, as --skip-bad asks")
    with pytest.raises(DataError, match="no image is left"):
        write_pack(collection_of([b"bad"]), tmp_path / "y.fdpack", RGB, skip_bad=True, report=unused)
    with pytest.raises(DataError, match="1 images have no label, the others do"):
        write_pack(collection_of(files[:2], [3, None]), tmp_path / "y.fdpack", RGB, report=unused)


def found(path: Path, tmp_path: Path) -> bool:
    """Return whether the damage is found by opening or verifying."""
    try:
        pack = open_pack(path)
    except DataError as error:
        assert str(path) in str(error)
        return True
    return bool(faults(pack, full_list=tmp_path / "list", report=lambda _: None))


@pytest.mark.slow
def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.fdpack", PIXELS, list(range(9))).path
    whole = path.read_bytes()
    places = sorted({*range(8), *range(len(whole) - 1000, len(whole)), *RNG.integers(0, len(whole), 200).tolist()})
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(RNG.integers(8))
        path.write_bytes(data)
        assert found(path, tmp_path), f"byte {place} of {len(whole)}"


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.fdpack", PIXELS).path
    whole = path.read_bytes()
    for length in {0, 1, 8, 87, 88, 96, len(whole) - 1, *RNG.integers(0, len(whole), 50).tolist()}:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="no pack, or damaged"):
            open_pack(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="no pack, or damaged"):
        open_pack(path)


def forged(path: Path, **changes: object) -> None:
    """Change fields of the description, and the checksums accordingly."""
    import hashlib

    data = path.read_bytes()
    start, length, _, _, magic = TRAILER.unpack(data[-TRAILER.size :])
    text = json.dumps(json.loads(data[start : start + length]) | changes).encode()
    body = data[:start] + text
    path.write_bytes(
        body + TRAILER.pack(start, len(text), hashlib.sha256(text).digest(), hashlib.sha256(body).digest(), magic)
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "it is of version 2; this fastddpm reads 1"),
        ({"count": 10**15}, "cannot hold"),
        ({"count": 0}, "cannot hold"),
        ({"count": -1}, "cannot hold"),
        ({"count": "9"}, "count is not of the type int"),
        ({"labels": True}, "index's checksum differs"),
        ({"rule": {"image_size": 10**9, "channels": 3, "resize": "none"}}, "size 1000000000"),
        ({"rule": {"image_size": 8, "channels": 2, "resize": "none"}}, "2 channels"),
        ({"rule": {"image_size": 8, "channels": 3, "resize": "x"}}, "resized by 'x'"),
        ({"rule": [8, 3]}, "rule is not of the type dict"),
        ({"store": "other"}, "stored 'other'"),
        ({"checksum": None}, "checksum is not of the type str"),
        ({"source": "x" * 70_000}, "its end is missing"),
    ],
)
def test_descriptions_that_cannot_be(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    path = packed(tmp_path / "x.fdpack", PIXELS).path
    forged(path, **changes)
    with pytest.raises(DataError, match=reason):
        open_pack(path)


@pytest.mark.parametrize("field", ["offset", "length"])
def test_an_index_that_points_elsewhere(tmp_path: Path, field: str) -> None:
    import hashlib

    made = packed(tmp_path / "x.fdpack", PIXELS)
    for value in (0 if field == "offset" else 2**28 + 1, made.path.stat().st_size, 2**32 - 1, 2**64 - 40):
        if field == "length" and value >= 2**32:
            continue
        index = made.index.copy()
        index[4][field] = value
        data = made.path.read_bytes()
        (start,) = struct.unpack_from("<Q", data, len(data) - TRAILER.size)
        path = tmp_path / "forged.fdpack"
        path.write_bytes(data[: start - index.nbytes] + index.tobytes() + data[start:])
        forged(path, index_sha256=hashlib.sha256(index.tobytes()).hexdigest())
        with pytest.raises(DataError, match="its index points elsewhere"):
            open_pack(path)


def test_pixels_of_another_decoder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = packed(tmp_path / "x.fdpack", PIXELS)
    monkeypatch.setattr("fastddpm.data.inspect.decode", lambda data, preprocessing: decode(data, preprocessing) ^ 1)
    (text,) = faults(made, full_list=tmp_path / "list", report=unused)
    assert "its pixels are not the ones that were packed" in text and made.decoder in text


def test_a_full_disk_leaves_nothing_and_says_so(source: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the full disk. An older pack of the same name is kept."""
    out = tmp_path / "out" / "x.fdpack"
    out.parent.mkdir()
    out.write_bytes(b"older")
    done = subprocess.run(
        [sys.executable, "-m", "fastddpm.data", "pack", str(source), str(out), "--image-size", "8", "--overwrite"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )  # fmt: skip
    assert done.returncode == 5
    assert without_announcements(done.stderr) == [f"error: cannot write {out}: File too large"]
    assert [path.name for path in out.parent.iterdir()] == ["x.fdpack"] and out.read_bytes() == b"older"
    with pytest.raises(StorageError, match="cannot write"):
        packed(tmp_path / "nowhere" / "x.fdpack", PIXELS)


# As a source of training


def test_a_large_set_is_packed_into_the_cache(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = load()
    monkeypatch.setattr(sources, "DECODED_LIMIT_BYTES", PLANES.nbytes)
    assert isinstance(load().images, np.memmap)
    monkeypatch.setattr(sources, "DECODED_LIMIT_BYTES", PLANES.nbytes - 1)
    encoded_set = load()
    assert not isinstance(encoded_set.images, np.ndarray)
    np.testing.assert_array_equal(encoded_set.images[:], PLANES)
    assert encoded_set.checksum == decoded.checksum and encoded_set.name == decoded.name
    np.testing.assert_array_equal(encoded_set.labels, decoded.labels)
    (entry,) = (tmp_path / "cache").glob("*.fdpack")
    monkeypatch.setattr(cache, "write_pack", lambda *_, **__: pytest.fail("packed again"))
    assert load().checksum == decoded.checksum
    assert isinstance(load(keep="decoded").images, np.memmap)
    monkeypatch.undo()
    entry.write_bytes(entry.read_bytes()[:-1])
    lines: list[str] = []
    assert load(keep="encoded", report=lines.append).checksum == decoded.checksum
    assert len(lines) == 2 and "its end is missing" in lines[0] and lines[0].endswith("; packing again")
    assert lines[1] == "3 classes: 0, 1, 2"
    np.testing.assert_array_equal(open_pack(entry).images()[:], PLANES)


def test_without_a_writable_cache_a_large_set_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cache .* cannot be made: Not a directory"):
        load(keep="encoded", cache=tmp_path / "file" / "below")


def test_a_pack_is_for_one_size(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.fdpack", PIXELS).path
    for size, channels in ((16, 3), (8, 1)):
        with pytest.raises(UsageError, match=r"was packed at 8x8 with 3 channels; the model takes \d+x\d+ with [13]"):
            open_dataset(path, image_size=size, channels=channels, cache=tmp_path / "cache")


def test_an_original_pack_is_decoded_by_its_rule(tmp_path: Path) -> None:
    large = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    preprocessing = Preprocessing(8, 3, "area")
    files = [encoded(image) for image in large]
    made = write_pack(collection_of(files), tmp_path / "x.fdpack", preprocessing, store="original", report=unused)
    expected = large.reshape(3, 8, 2, 8, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    for keep in ("decoded", "encoded"):
        dataset = open_dataset(made.path, image_size=8, channels=3, keep=keep, cache=tmp_path / "cache")  # type: ignore[arg-type]
        assert np.abs(dataset.images[:] - expected).max() <= 1  # two passes, each rounded
        assert dataset.checksum == made.checksum
