"""The cache of decoded images and the message about images that cannot be used."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm.data import Dataset, cache, decoding, open_dataset
from fastddpm.data.dataset import checksum
from fastddpm.errors import DataError

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(8).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
PLANES = PIXELS.transpose(0, 3, 1, 2)
Load = Callable[..., Dataset]


def png(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Thirty images in three classes."""
    root = tmp_path / "images"
    for i, pixels in enumerate(PIXELS):
        path = root / f"{i // 10}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return root


@pytest.fixture
def load(source: Path, tmp_path: Path) -> Load:
    def opened(**options: object) -> Dataset:
        wanted = {"source": source, "image_size": 8, "channels": 3, "cache": tmp_path / "cache"} | options
        return open_dataset(**wanted)  # type: ignore[arg-type]

    return opened


def check(dataset: Dataset) -> None:
    np.testing.assert_array_equal(dataset.images, PLANES)
    assert dataset.labels is not None and dataset.labels.tolist() == [i // 10 for i in range(30)]
    assert dataset.checksum == checksum(PLANES, np.arange(30) // 10)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def test_images_are_decoded_once_and_then_mapped(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(load())
    (entry,) = entries(tmp_path)
    assert sorted(path.name for path in entry.iterdir()) == ["images.npy", "labels.npy", "meta.json"]
    np.testing.assert_array_equal(np.load(entry / "images.npy"), PLANES)
    assert json.loads((entry / "meta.json").read_text())["rule"] == {"image_size": 8, "channels": 3, "resize": "none"}
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded again"))
    again = load()
    check(again)
    assert isinstance(again.images, np.memmap) and not again.images.flags.writeable


def test_whatever_changes_the_images_changes_the_entry(load: Load, source: Path, tmp_path: Path) -> None:
    load()
    load(resize="area")
    load(resize="area", image_size=4)
    load(skip_bad=True)
    assert len(entries(tmp_path)) == 4
    os.utime(source / "0" / "00.png", ns=(1, 1))
    load()
    assert len(entries(tmp_path)) == 5
    (source / "0" / "00.png").rename(source / "0" / "000.png")
    load()
    assert len(entries(tmp_path)) == 6
    (source / "2" / "29.png").unlink()
    assert len(load().images) == 29
    assert len(entries(tmp_path)) == 7


def test_a_relative_path_is_the_same_source(
    load: Load, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    monkeypatch.chdir(source.parent)
    check(load(source="images"))
    assert len(entries(tmp_path)) == 1


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_directory() == tmp_path / "fastddpm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_directory() == tmp_path / "home" / ".cache" / "fastddpm"


def damaged(path: Path, how: str, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del data[rng.integers(len(data)) :]
    path.write_bytes(data)
    if how == "delete":
        path.unlink()


def test_damaged_entries_are_never_used(load: Load, tmp_path: Path, rng: np.random.Generator) -> None:
    load()
    (entry,) = entries(tmp_path)
    whole = {name: (entry / name).read_bytes() for name in ("images.npy", "labels.npy", "meta.json")}
    noticed = 0
    cases = [(name, how) for name in whole for how in ("delete", *["flip"] * 40, *["cut"] * 20)]
    for name, how in cases:
        damaged(entry / name, how, rng)
        lines: list[str] = []
        check(load(report=lines.append))
        if lines:
            assert len(lines) == 1 and lines[0].startswith(f"cache entry {entry} is damaged ("), lines
            noticed += 1
            assert {path.name: path.read_bytes() for path in entry.iterdir()} == whole, "it was not made again"
        for path, data in whole.items():
            (entry / path).write_bytes(data)
    # What is not noticed is in the spaces and names of meta.json, which nothing depends on, or in padding.
    assert noticed > len(cases) / 2
    assert entries(tmp_path) == [entry]


def test_a_foreign_array_in_the_cache_is_refused(load: Load, tmp_path: Path) -> None:
    """Arrays of objects would be pickles; the same bytes under another type have the same checksum."""
    load()
    (entry,) = entries(tmp_path)
    for array in (np.array([{"x": 1}], dtype=object), PLANES.view(np.int8), PLANES[:, :1], PLANES[:0]):
        np.save(entry / "images.npy", array, allow_pickle=True)
        lines: list[str] = []
        check(load(report=lines.append))
        assert len(lines) == 1 and "damaged" in lines[0]
    np.save(entry / "labels.npy", (np.arange(30) // 10).view(np.uint64))
    check(load(report=lines.append))
    assert len(lines) == 2 and "uint64" in lines[1]


def test_a_large_entry_is_verified_by_a_sample(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load().checksum
    monkeypatch.setattr(cache, "_VERIFY_ALL_BYTES", 0)
    (entry,) = entries(tmp_path)
    assert load().checksum == whole
    with (entry / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([PIXELS[29, 7, 7, 2] ^ 1]))
    lines: list[str] = []
    check(load(report=lines.append))
    assert len(lines) == 1 and "its checksum differs" in lines[0]


def test_without_a_writable_cache_images_are_decoded_in_memory(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for _ in range(2):
        lines: list[str] = []
        check(load(cache=tmp_path / "file" / "below", report=lines.append))
        assert len(lines) == 1 and lines[0].startswith(f"cache {tmp_path / 'file' / 'below'} cannot be written (")
        assert "Not a directory" in lines[0]


PROGRAM = """
import resource, sys
from pathlib import Path
from fastddpm.data import open_dataset
if sys.argv[3] != "-1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
dataset = open_dataset(sys.argv[1], image_size=8, channels=3, cache=Path(sys.argv[2]))
print(dataset.checksum)
"""


def started(source: Path, directory: Path, file_limit: int = -1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(source), str(directory), str(file_limit)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_while_decoding(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: writing beyond it is an OSError, too."""
    output, errors = started(source, tmp_path / "cache", 3000).communicate()
    assert output.strip() == checksum(PLANES, np.arange(30) // 10)
    assert "File too large" in errors and "decoding in memory" in errors and "Traceback" not in errors
    assert entries(tmp_path) == []


def test_concurrent_writers_make_one_entry(source: Path, tmp_path: Path) -> None:
    writers = [started(source, tmp_path / "cache") for _ in range(4)]
    results = [writer.communicate() for writer in writers]
    assert [output.strip() for output, _ in results] == [checksum(PLANES, np.arange(30) // 10)] * 4, results
    assert [errors for _, errors in results] == [""] * 4
    assert len(entries(tmp_path)) == 1


def test_an_entry_that_appears_meanwhile_does_no_harm(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes while this one decodes: both have whole images, and one entry is left."""
    decode_all, others = cache.decode_all, []

    def overtaken(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(cache, "decode_all", decode_all)
        others.append(load())
        return decode_all(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "decode_all", overtaken)
    check(load())
    check(others[0])
    assert len(entries(tmp_path)) == 1


# Images that cannot be used


def huge_header() -> bytes:
    """A PNG of 65535 by 65535 pixels as far as its header says."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def spoil(root: Path) -> dict[str, str]:
    """Put every kind of bad image into `root`; returns a part of the reason for each."""
    transparent = Image.fromarray(PIXELS[0]).convert("RGBA")
    transparent.putpixel((0, 0), (1, 2, 3, 0))
    bad = {
        "0/empty.png": (b"", "the file is empty"),
        "0/text.png": (b"this is text", "not an image of a known format"),
        "0/cut.png": (png(PIXELS[0])[:-60], "damaged"),
        "0/cut.JPG": (png(PIXELS[0], "JPEG")[:-60], "damaged"),
        "1/cmyk.jpg": (png(Image.fromarray(PIXELS[0]).convert("CMYK"), "JPEG"), "CMYK"),
        "1/dot.png": (png(PIXELS[0, :1, :1]), "1x1, expected 8x8; --resize area crops and resizes"),
        "1/long.png": (png(np.zeros((10000, 1, 3), np.uint8)), "1x10000, expected 8x8"),
        "1/transparent.png": (png(transparent), "transparent"),
        "2/huge.png": (huge_header(), "64,000,000"),
        "2/tiff.png": (png(PIXELS[0], "TIFF"), "not an image of a known format"),
    }
    for name, (data, _) in bad.items():
        (root / name).write_bytes(data)
    reasons = {name: reason for name, (_, reason) in bad.items()}
    (root / "0" / "loop.png").symlink_to("loop.png")
    (root / "1" / "nowhere.png").symlink_to("does-not-exist.png")
    os.mkfifo(root / "2" / "pipe.png")
    (root / "2" / "locked.png").write_bytes(png(PIXELS[0]))
    return reasons | {
        "0/loop.png": "cannot be read: Too many levels of symbolic links",
        "1/nowhere.png": "cannot be read: No such file or directory",
        "2/pipe.png": "cannot be read: not a regular file",
        "2/locked.png": "cannot be read: Permission denied",
    }


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """locked.png cannot be opened; permissions would not stop a test that runs as root."""
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "locked.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)


@pytest.mark.usefixtures("locked")
def test_every_bad_image_is_listed_at_once(
    load: Load, source: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    reasons = spoil(source)
    with pytest.raises(DataError) as error:
        load()
    first, *listed, advice = str(error.value).splitlines()
    assert first == f"14 of 44 images in {source} cannot be used:"
    assert advice == "mend or remove them, or use --skip-bad to go on without them"
    found = dict(line.strip().split(": ", 1) for line in listed)
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name], name
    assert entries(tmp_path) == []
    assert not recwarn.list


@pytest.mark.usefixtures("locked")
def test_skip_bad_reports_them_and_goes_on(load: Load, source: Path) -> None:
    reasons = spoil(source)
    lines: list[str] = []
    check(load(skip_bad=True, report=lines.append))
    (text,) = lines
    assert all(name in text for name in reasons) and text.endswith("left out, as --skip-bad asks")
    check(load(skip_bad=True, report=lines.append))
    assert lines[1:] == [f"14 images of {source} are left out, as --skip-bad asks"]


def test_no_usable_image_is_always_an_error(tmp_path: Path, load: Load) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"text")
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=r"(?s)1 of 1 images .* x\.png: not an image.*no image is left"):
            load(source=tmp_path / "bad", skip_bad=skip_bad)


def test_a_long_list_is_cut_and_kept_in_a_file(load: Load, source: Path, tmp_path: Path) -> None:
    for i in range(25):
        (source / "1" / f"bad{i:02}.png").write_bytes(b"text")
    with pytest.raises(DataError) as error:
        load()
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 20 + 1 + 1
    assert lines[-2].startswith("  and 5 more; the whole list is in ")
    kept = Path(lines[-2].split(" is in ")[1]).read_text().splitlines()
    assert kept == [f"1/bad{i:02}.png: not an image of a known format (JPEG, PNG, WEBP, BMP, GIF)" for i in range(25)]
    # Where no file can be written, each is reported.
    (tmp_path / "file").write_bytes(b"")
    reported: list[str] = []
    with pytest.raises(DataError, match="and 5 more; listed above"):
        load(cache=tmp_path / "file", report=reported.append)
    assert [line for line in reported if "bad" in line] == kept


def test_a_folder_that_cannot_be_listed_is_a_problem(load: Load, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith(f"{os.sep}1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"(?s)1 of 21 images.*images/1: cannot be read: Permission denied"):
        load()
    assert len(load(skip_bad=True, report=lambda _: None).images) == 20


def test_names_cannot_disturb_the_terminal(load: Load, source: Path) -> None:
    (source / "0" / "a\x1b[2J\nb.png").write_bytes(b"text")
    with pytest.raises(DataError) as error:
        load()
    assert "\x1b" not in str(error.value) and r"0/a\x1b[2J\nb.png" in str(error.value)


@pytest.mark.parametrize("count", [1, 16, 127, 128, 129, 300])
def test_order_is_kept_across_threads_and_chunks(count: int, tmp_path: Path, load: Load) -> None:
    root = tmp_path / "many"
    root.mkdir()
    colours = np.random.default_rng(count).integers(0, 256, (count, 3), dtype=np.uint8)
    for i, colour in enumerate(colours):
        (root / f"{i:04}.png").write_bytes(png(np.broadcast_to(colour, (8, 8, 3)).copy()))
    dataset = load(source=root)
    assert dataset.labels is None and len(dataset.images) == count
    np.testing.assert_array_equal(dataset.images[:, :, 3, 5], colours)


def test_the_checksum_names_shape_pixels_and_labels() -> None:
    images, labels = PLANES.copy(), np.arange(30)
    base = checksum(images, labels)
    assert checksum(images, labels.astype(np.int32)) == base == Dataset.of(images, labels, "another name").checksum
    others = [
        checksum(images, None), checksum(images, labels + 1), checksum(images.reshape(30, 1, 24, 8), labels),
        checksum(images[:29], labels[:29]), checksum(images[::-1], labels), checksum(images[:, ::-1], labels),
    ]  # fmt: skip
    images[17, 1, 2, 3] ^= 1
    others.append(checksum(images, labels))
    assert len({base, *others}) == 1 + len(others)
