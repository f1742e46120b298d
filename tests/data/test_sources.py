"""What `open_dataset` accepts: the digits, folders and zip files, their splits and labels, and what it refuses."""

import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folder import Load, opener
from PIL import Image

import fastddpm.data
from fastddpm.data import open_dataset, sources
from fastddpm.errors import DataError, UsageError

RNG = np.random.default_rng(11)
PIXELS = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zip_of(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return path


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return opener(tmp_path / "cache", 8)


# The embedded digits


def original() -> tuple[np.ndarray, np.ndarray]:
    with np.load(Path(fastddpm.data.__file__).with_name("mnist5k.npz")) as file:
        return file["images"], file["labels"]


def test_digits_at_their_size_and_padded() -> None:
    images, labels = original()
    digits = open_dataset(None, image_size=28, channels=1)
    assert digits.images.dtype == np.uint8 and digits.labels is not None and digits.labels.dtype == np.int64
    np.testing.assert_array_equal(digits.images, images[:, None])
    np.testing.assert_array_equal(digits.labels, labels)
    assert np.bincount(digits.labels).tolist() == [500] * 10
    padded = open_dataset(None, image_size=32, channels=1).images
    np.testing.assert_array_equal(padded[:, 0, 2:30, 2:30], images)
    assert padded.astype(int).sum() == images.astype(int).sum()
    odd = open_dataset(None, image_size=31, channels=1).images
    np.testing.assert_array_equal(odd[:, 0, 1:29, 1:29], images)


@pytest.mark.parametrize("size", [14, 16, 8, 1])
def test_smaller_digits_are_averages_over_areas(size: int) -> None:
    """Output i averages the pixels whose centres lie in (28 i / S, 28 (i + 1) / S]."""
    images = original()[0][::10].astype(np.float64)
    centres = np.arange(28) + 0.5
    lower = np.arange(size)[:, None] * 28 / size
    window = ((centres > lower) & (centres <= lower + 28 / size)).astype(np.float64)
    window /= window.sum(1, keepdims=True)
    expected = np.einsum("ij,kl,njl->nik", window, window, images)
    digits = open_dataset(None, image_size=size, channels=1)
    assert digits.images.shape == (5000, 1, size, size)
    assert np.abs(digits.images[::10, 0] - expected).max() <= 1  # two passes, each rounded to 8 bits
    box = [Image.fromarray(image).resize((size, size), Image.Resampling.BOX) for image in original()[0][::100]]
    np.testing.assert_array_equal(digits.images[::100, 0], np.stack([np.asarray(image) for image in box]))


def test_digits_have_their_class_names() -> None:
    lines: list[str] = []
    assert open_dataset(None, image_size=28, channels=1, report=lines.append).classes == tuple("0123456789")
    assert lines == ["10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"]


def test_digits_in_colour_are_refused() -> None:
    with pytest.raises(UsageError, match="the embedded digits are grey: image_channels must be 1, got 3"):
        open_dataset(None, image_size=28, channels=3)


# What is refused


@pytest.mark.parametrize(("channels", "size"), [(2, 8), (0, 8), (4, 8), (3, 0), (3, -1)])
def test_impossible_shapes(channels: int, size: int) -> None:
    with pytest.raises(UsageError, match="1 or 3 channels and a positive size"):
        open_dataset(None, image_size=size, channels=channels)


@pytest.mark.parametrize("name", ["nowhere", "", "a" * 300, "a\0b", "x/../y", "loop"])
def test_missing_paths_are_usage_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(UsageError, match="does not exist") as error:
        load(name)
    assert error.value.exit_code == 2


def test_other_kinds_of_files_name_what_is_accepted(tmp_path: Path, load: Load) -> None:
    for name in ("data.npz", "picture.png", "noending"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(
            UsageError, match=r"images may be a folder, \.zip or \.tar of images, \.parquet .*LMDB.*CIFAR-10"
        ):
            load(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        load(tmp_path / "pipe.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no images; files ending in \.png, \.jpg"):
        load(tmp_path / "empty")
    for data in (b"", b"text" * 20):
        (tmp_path / "data.zip").write_bytes(data)
        with pytest.raises(DataError, match=r"data\.zip cannot be read as a zip file"):
            load(tmp_path / "data.zip")
    with pytest.raises(DataError, match="holds no images"):
        load(zip_of(tmp_path / "texts.zip", {"a.txt": b"x", "dir.png/": b""}))


# Folders and zip files


NAMES = ["b.png", "a/2.PNG", "a/10.png", "a/deep/er/1.png", "ä ö.png", "z.png"]


def test_a_folder_and_a_zip_of_it_are_the_same_images(tmp_path: Path, load: Load) -> None:
    files = {name: png(PIXELS[i]) for i, name in enumerate(NAMES)}
    expected = [PIXELS[NAMES.index(name)].transpose(2, 0, 1) for name in sorted(NAMES, key=lambda n: n.split("/"))]
    of_folder = load(folder_of(tmp_path / "f", files))
    of_zip = load(zip_of(tmp_path / "f.ZIP", files))
    stored = load(zip_of(tmp_path / "stored.zip", files, zipfile.ZIP_STORED))
    for dataset in (of_folder, of_zip, stored):
        np.testing.assert_array_equal(dataset.images, np.stack(expected))
        assert dataset.labels is None and dataset.checksum == of_folder.checksum
    assert (of_folder.name, of_zip.name) == (str(tmp_path / "f"), str(tmp_path / "f.ZIP"))


def test_files_read_by_the_ending_in_either_case(tmp_path: Path, load: Load) -> None:
    encoded = {}
    for kind, ending in [("JPEG", "JPG"), ("JPEG", "jpeg"), ("BMP", "Bmp"), ("WEBP", "WebP"), ("GIF", "gif")]:
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(file, kind)
        encoded[f"x.{ending}"] = file.getvalue()
    dataset = load(folder_of(tmp_path / "f", encoded))
    assert len(dataset.images) == 5 and np.abs(dataset.images.astype(int) - 90).max() <= 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["dog/1.png", "cat/2.png", "emu/x/3.png", "cat/4.png"], [0, 0, 1, 2]),
        (["dog/1.png", "cat/2.png", "3.png", "4.png", "5.png"], None),  # more pictures outside than inside
        (["all/1.png", "all/2.png"], None),  # one class is none
        (["1.png", "2.png"], None),
    ],
)
def test_labels_are_first_level_folders(
    packed: bool, names: list[str], labels: list[int] | None, tmp_path: Path, load: Load
) -> None:
    files = {name: png(PIXELS[i]) for i, name in enumerate(names)}
    dataset = load(zip_of(tmp_path / "z.zip", files) if packed else folder_of(tmp_path / "f", files))
    assert (None if dataset.labels is None else dataset.labels.tolist()) == labels
    assert len(dataset.images) == len(names)


@pytest.mark.parametrize("packed", [False, True])
def test_folders_named_as_splits(packed: bool, tmp_path: Path, load: Load) -> None:
    names = ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png", "test/dog/5.png"]
    files = {name: png(PIXELS[i]) for i, name in enumerate(names)}
    source = zip_of(tmp_path / "z.zip", files) if packed else folder_of(tmp_path / "f", files)
    train, test = load(source), load(source, split="test")
    np.testing.assert_array_equal(train.images, PIXELS[:2].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(test.images, PIXELS[2:5].transpose(0, 3, 1, 2))
    assert train.labels is not None and train.labels.tolist() == [0, 1]
    assert test.labels is not None and test.labels.tolist() == [0, 1, 1]
    only = {name: data for name, data in files.items() if name.startswith("train")}
    source = zip_of(tmp_path / "y.zip", only) if packed else folder_of(tmp_path / "g", only)
    with pytest.raises(DataError, match=r"has no images in test/; it has train"):
        load(source, split="test")


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_an_image_is_left_alone_and_said(packed: bool, tmp_path: Path, load: Load) -> None:
    files = {"a/1.png": png(PIXELS[0]), "b/2.png": png(PIXELS[1])}
    other = {"readme.txt": b"x", "a/x.svg": b"x", "b/y.SVG": b"x", "b/LICENSE": b"x"}
    hidden = {".git/z.png": b"x", "a/._1.png": b"x", ".DS_Store": b"x", "__MACOSX/a/1.png": b"x"}
    everything = files | other | hidden
    lines: list[str] = []
    source = zip_of(tmp_path / "z.zip", everything) if packed else folder_of(tmp_path / "f", everything)
    dataset = load(source, report=lines.append)
    np.testing.assert_array_equal(dataset.images, PIXELS[:2].transpose(0, 3, 1, 2))
    assert dataset.labels is not None and dataset.labels.tolist() == [0, 1]
    assert len(lines) == 2 and lines[1] == "2 classes: a, b"
    assert "4 files are not read" in lines[0]
    assert "2 .svg" in lines[0] and "1 .txt" in lines[0] and "1 without extension" in lines[0]


def test_links_and_odd_entries_of_a_folder(tmp_path: Path, load: Load) -> None:
    root = folder_of(tmp_path / "f", {"1.png": png(PIXELS[0]), "folder.png/2.png": png(PIXELS[1])})
    folder_of(tmp_path / "elsewhere", {"3.png": png(PIXELS[2])})
    (root / "empty.png").mkdir()
    (root / "loop").symlink_to(root)
    (root / "folder.png" / "up").symlink_to("..")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "z.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    (root / "0.png").write_bytes(png(PIXELS[0]))
    lines: list[str] = []
    dataset = load(root, report=lines.append)
    expected = PIXELS[[0, 0, 1, 2, 2]]  # 0, 1, folder.png/2, linked/3, z
    np.testing.assert_array_equal(dataset.images, expected.transpose(0, 3, 1, 2))
    assert dataset.labels is None and len(lines) == 3
    assert "3 images lie beside the folders folder.png, linked, which thus are no classes" in lines[0]
    assert lines[1].endswith("2 links lead back to a folder that holds them and are not followed: folder.png/up, loop")
    assert lines[2] == "no classes: the images have no labels"


def test_links_to_links_are_followed_so_many_times(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two links in each of n folders lead to the next: 2^n paths to the images of the last."""
    for i in range(6):
        folder_of(tmp_path / f"{i}", {"x.png": png(PIXELS[i])} if i == 5 else {})
        (tmp_path / f"{i}").mkdir(exist_ok=True)
        for name in "ab" if i < 5 else "":
            (tmp_path / f"{i}" / name).symlink_to(tmp_path / f"{i + 1}")
    assert len(load(tmp_path / "0").images) == 32
    monkeypatch.setattr("fastddpm.data.readers.folder._MAX_LINKS", 61)
    with pytest.raises(DataError, match="has more than 61 links to folders"):
        load(tmp_path / "0")


@pytest.mark.slow
def test_walking_a_folder_keeps_the_names_of_one_folder_at_a_time(tmp_path: Path) -> None:
    peaks = []
    for count in (3, 40):
        for i in range(count):
            folder_of(tmp_path / f"{count}" / f"{i:02}", {f"{j:02}.png": b"x" for j in range(50)})
        measured = []
        for _ in range(3):  # once the interpreter's own table of names may grow, by megabytes
            tracemalloc.start()
            found = sources.open_image_source(tmp_path / f"{count}")
            assert sum(1 for _ in found.items()) == found.count == 50 * count
            measured.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        peaks.append(min(measured))
    assert peaks[1] < peaks[0] + 20_000, peaks  # 1,850 names more are 150 kB


# Zip files from strangers


def tree(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def test_zip_members_are_never_extracted(tmp_path: Path, load: Load) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ["../../escaped.png", "../x.png", "/absolute.png", "C:\\x\\y.png", "a/../../b.png", "nested.zip", "n.png"]
    source = zip_of(inside / "z.zip", {name: png(PIXELS[i]) for i, name in enumerate(names)})
    before = tree(tmp_path)
    dataset = load(source, cache=tmp_path / "cache")
    assert len(dataset.images) == 6
    assert [name for name in tree(tmp_path) if not name.startswith("cache")] == before
    assert not Path("/absolute.png").exists()


def test_a_link_in_a_zip_is_its_text(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w") as packed:
        info = zipfile.ZipInfo("x.png")
        info.external_attr = 0o120777 << 16
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"x\.png: not an image of a known format"):
        load(path)


def patched(path: Path, name: str, size: int) -> None:
    """Have both headers of member `name` claim that it unpacks to `size` bytes."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as packed:
        local = packed.getinfo(name).header_offset
    central = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
    for offset in (local + 22, central + 24):
        data[offset : offset + 4] = struct.pack("<I", size)
    path.write_bytes(bytes(data))


@pytest.mark.slow
def test_zip_bombs_are_bounded(tmp_path: Path, load: Load) -> None:
    """A member of 200 MB that says so is refused; one that claims 1,000 bytes is not unpacked beyond them."""
    path = zip_of(tmp_path / "z.zip", {"bomb.png": bytes(200_000_000)})
    assert path.stat().st_size < 300_000
    for size, reason in ((4_000_000_000, "4,000,000,000 bytes unpacked; at most"), (1000, "Bad CRC-32|not an image")):
        patched(path, "bomb.png", size)
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=reason):
                load(path)
            assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_bound_are_refused(method: int, tmp_path: Path, load: Load) -> None:
    with pytest.raises(DataError, match="other than deflate"):
        load(zip_of(tmp_path / "z.zip", {"bomb.png": bytes(10**6)}, method))


def test_zip_members_are_counted(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddpm.data.readers.zip._MAX_MEMBERS", 10)
    with pytest.raises(DataError, match="has 11 members; at most 10 are read"):
        load(zip_of(tmp_path / "z.zip", {f"{i}.png": b"" for i in range(11)}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_encrypted_and_repeated_members(tmp_path: Path, load: Load) -> None:
    path = zip_of(tmp_path / "z.zip", {"a.png": png(PIXELS[0]), "b.png": png(PIXELS[1])}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    whole = bytes(data)
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png: cannot be read: Bad CRC-32"):
        load(path)
    data = bytearray(whole)
    for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + offset] |= 1  # the flag of encryption
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png: cannot be read: .*encrypted"):
        load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as a zip file"):
        load(path)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("a.png", png(PIXELS[0]))
        packed.writestr("a.png", png(PIXELS[1]))
    with pytest.raises(DataError, match="several members of the same name"):
        load(path)
