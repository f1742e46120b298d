"""LSUN's LMDB and data sets of the hub: libraries that are asked for only when they are used."""

import re
import struct
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.packs import encoded

from fastddpm.data import open_dataset
from fastddpm.data.sources import open_image_source
from fastddpm.errors import DataError, UsageError

PIXELS = np.random.default_rng(6).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
WEBP = [encoded(pixels, "WEBP", lossless=True) for pixels in PIXELS]
PLANES = PIXELS.transpose(0, 3, 1, 2)


def keys() -> list[bytes]:
    """As LSUN's: 40 hexadecimal digits, in no order."""
    return [bytes(np.random.default_rng(i).integers(0, 256, 20, dtype=np.uint8)).hex().encode() for i in range(20)]


@pytest.fixture
def lsun(tmp_path: Path) -> Path:
    """The layout of LSUN's archives: a folder CATEGORY_train_lmdb with data.mdb and lock.mdb."""
    lmdb = pytest.importorskip("lmdb", reason="reading LSUN needs lmdb: pip install lmdb")
    folder = tmp_path / "church_outdoor_train_lmdb"
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, data in zip(keys(), WEBP, strict=True):
            transaction.put(key, data)
    return folder


def opened(source: Path | str, tmp_path: Path, **options: Any) -> Any:
    def report(line: str) -> None:
        assert "classes: " in line, line

    return open_dataset(source, image_size=8, channels=3, cache=tmp_path / "cache", report=report, **options)


def test_lsun_is_read_in_the_order_of_its_keys(lsun: Path, tmp_path: Path) -> None:
    order = sorted(range(20), key=lambda i: keys()[i])
    (lsun / "lock.mdb").unlink()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in lsun.iterdir())
    for source in (lsun, lsun / "data.mdb"):
        for keep in ("decoded", "encoded"):
            dataset = opened(source, tmp_path, keep=keep)
            np.testing.assert_array_equal(dataset.images[:], PLANES[order])
            assert dataset.labels is None and dataset.name == str(lsun)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in lsun.iterdir()) == before
    assert [item.name for item in open_image_source(lsun).items()] == sorted(key.decode() for key in keys())


def test_lsun_is_cropped_and_packed_once(lsun: Path, tmp_path: Path) -> None:
    """As its images are: the shorter side is the model's size."""
    import lmdb

    wide = np.random.default_rng(1).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    with lmdb.open(str(lsun), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", encoded(wide, "WEBP", lossless=True))
    dataset = opened(lsun, tmp_path, resize="lanczos", keep="encoded")
    assert len(dataset.images) == 21
    np.testing.assert_array_equal(dataset.images[0], wide[:, 3:11].transpose(2, 0, 1))


def test_files_that_are_no_lmdb(tmp_path: Path, lsun: Path) -> None:
    for data in (b"", b"text" * 1000, bytes(8192)):
        (tmp_path / "x.mdb").write_bytes(data)
        with pytest.raises(DataError, match=r"x\.mdb (cannot be read as LMDB|is damaged|holds no images)"):
            opened(tmp_path / "x.mdb", tmp_path)


def test_an_lmdb_cut_short_is_refused_before_it_crashes(lsun: Path, tmp_path: Path) -> None:
    """Reading beyond the file would end the process by SIGBUS."""
    whole = (lsun / "data.mdb").read_bytes()
    for missing in (1, 4096, len(whole) - 3 * 4096):
        (lsun / "data.mdb").write_bytes(whole[:-missing])
        with pytest.raises(DataError) as error:
            opened(lsun, tmp_path)
        assert str(error.value) == (
            f"{lsun / 'data.mdb'} is cut short: it has {len(whole) - missing:,} bytes of the {len(whole):,} that its "
            "last page needs; copy it again"
        )
    (lsun / "data.mdb").write_bytes(whole + b"x")
    assert len(opened(lsun, tmp_path).images) == 20
    (lsun / "data.mdb").write_bytes(whole[:40] + b"\xff\xff\0\0" + whole[44:])
    with pytest.raises(DataError, match="is damaged: its page size is 65,535 bytes"):
        opened(lsun, tmp_path)


def _pages_of(path: Path) -> tuple[bytes, int, int]:
    """The file, its page size, and the number of the root, which is a branch above several leaves."""
    import lmdb

    with lmdb.open(str(path.parent), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number in range(200):
            transaction.put(b"%040d" % number, WEBP[number % 20] if number else bytes(9000))
    data = path.read_bytes()
    metas = [struct.unpack_from("<QQ", data, 4096 * number + 128) for number in (0, 1)]
    root = max(metas, key=lambda meta: struct.unpack_from("<Q", data, 4096 * metas.index(meta) + 144))[0]
    return data, 4096, root


FORGED: dict[str, Callable[[bytearray, int, int], None]] = {
    "the kind of a page": lambda data, root, leaf: struct.pack_into("<H", data, root + 10, 4),
    "a page's number": lambda data, root, leaf: struct.pack_into("<Q", data, leaf, 1),
    "a table longer than the page": lambda data, root, leaf: struct.pack_into("<H", data, leaf + 12, 65534),
    "an empty table": lambda data, root, leaf: struct.pack_into("<H", data, leaf + 12, 16),
    "a node in the table": lambda data, root, leaf: struct.pack_into("<H", data, leaf + 16, 2),
    "a node beyond the page": lambda data, root, leaf: struct.pack_into("<H", data, leaf + 16, 4095),
    "a child beyond the file": lambda data, root, leaf: _put(data, root + _node(data, root), 2**32 - 1),
    "a child that is its parent": lambda data, root, leaf: _put(data, root + _node(data, root), root // 4096),
    "a key beyond its page": lambda data, root, leaf: struct.pack_into("<H", data, root + _node(data, root) + 6, 65535),
    "a value beyond its page": lambda data, root, leaf: _put(data, leaf + _node(data, leaf, 1), 60_000),
    "a value beyond the file": lambda data, root, leaf: _put(data, leaf + _node(data, leaf), 2**31),
    "a value on pages beyond it": lambda data, root, leaf: _put(data, leaf + _node(data, leaf) + 48, 2**32 - 1),
    "another database": lambda data, root, leaf: struct.pack_into("<H", data, leaf + _node(data, leaf, 1) + 4, 2),
}


def _put(data: bytearray, offset: int, value: int) -> None:
    struct.pack_into("<I", data, offset, value)


def _node(data: bytes | bytearray, page: int, number: int = 0) -> int:
    return int(struct.unpack_from("<H", data, page + 16 + 2 * number)[0])


@pytest.mark.parametrize("kind", FORGED)
def test_an_lmdb_with_damaged_pages_is_refused_before_it_crashes(kind: str, lsun: Path, tmp_path: Path) -> None:
    """The library trusts every number in the file and would end the process by SIGSEGV or SIGBUS."""
    path = lsun / "data.mdb"
    whole, size, root = _pages_of(path)
    assert struct.unpack_from("<H", whole, root * size + 10)[0] == 1
    leaf = struct.unpack_from("<I", whole, root * size + _node(whole, root * size))[0]
    data = bytearray(whole)
    FORGED[kind](data, root * size, leaf * size)
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} is damaged: .*; copy it again"):
        opened(lsun, tmp_path)


def test_an_lmdb_with_a_wrong_count_or_two_page_sizes_is_refused(lsun: Path, tmp_path: Path) -> None:
    path = lsun / "data.mdb"
    whole = path.read_bytes()
    for offset, message in ((120, "it has 20 values, not"), (40, "its two meta pages differ in the size of a page")):
        data = bytearray(whole)
        for meta in (0, 4096) if offset == 120 else (4096,):
            data[meta + offset + 1] ^= 0x20
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"is damaged: {message}"):
            opened(lsun, tmp_path)


def test_the_test_split_of_lsun_is_named_so(lsun: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"church_outdoor_train_lmdb has no splits.*: found one LMDB"):
        opened(lsun, tmp_path, split="test")
    held_out = lsun.rename(tmp_path / "church_outdoor_val_lmdb")
    assert len(opened(held_out, tmp_path, split="test").images) == 20


def test_values_that_are_no_images_are_named(lsun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lmdb

    with lmdb.open(str(lsun), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"bad\x1b[2J", b"text")
        transaction.put(b"empty", b"")
        transaction.put(b"large", bytes(5000))
    monkeypatch.setattr("fastddpm.data.readers.lmdb.MAX_ENCODED_BYTES", 4096)
    monkeypatch.setattr("fastddpm.data.readers.source.MAX_ENCODED_BYTES", 4096)
    with pytest.raises(DataError) as error:
        opened(lsun, tmp_path)
    text = str(error.value)
    assert "3 of 23 images" in text and "empty: the file is empty" in text and r"'bad\x1b[2J': not an image" in text
    assert "large: cannot be read: 5,000 bytes; at most 4,096 are read" in text


def test_without_lmdb_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(UsageError, match=r"^reading LSUN's LMDB needs lmdb: pip install 'fastddpm\[lmdb\]'$"):
        opened(tmp_path, tmp_path)


class Table:
    """As much of datasets.Dataset as is used."""

    def __init__(self, columns: dict[str, list[Any]], decodes: bool = True) -> None:
        self.columns, self.column_names, self._decodes = columns, list(columns), decodes
        self._fingerprint = "f"
        self.features: dict[str, Any] = {}

    def select_columns(self, names: list[str]) -> "Table":
        selected = Table({name: self.columns[name] for name in names})
        selected.features = self.features
        return selected

    def cast_column(self, name: str, feature: Any) -> "Table":
        assert feature == ("Image", False)
        cast = Table(self.columns, decodes=False)
        cast.features = self.features
        return cast

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert not self._decodes, "the library would decode every image, by rules of its own"
        for row in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.column_names, row, strict=True))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Table | Exception]:
    """A stand-in for the library, for it would download: what is there by name and split."""
    there: dict[tuple[str, str], Table | Exception] = {}

    def load_dataset(name: str, *, split: str) -> Table:
        found = there[name, split]
        if isinstance(found, Exception):
            raise found
        return found

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.Image = lambda decode: ("Image", decode)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return there


def structs(numbers: list[int]) -> list[Any]:
    return [{"bytes": WEBP[i], "path": None} for i in numbers]


def test_data_sets_of_the_hub(hub: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    hub["org/name", "train"] = Table({"id": [7, 8], "img": structs([3, 1]), "label": [5, 2]})
    hub["org/name", "test"] = Table({"image": structs([2, 4]), "label": [-1, -1]})
    hub["org/name", "extra"] = Table({"image": [*structs([2]), {"bytes": None, "path": str(tmp_path / "x.webp")}]})
    (tmp_path / "x.webp").write_bytes(WEBP[9])
    train = opened("hf:org/name", tmp_path)
    np.testing.assert_array_equal(train.images, PLANES[[3, 1]])
    assert train.labels.tolist() == [5, 2] and train.name == "hf:org/name"
    test = opened("hf:org/name", tmp_path, split="test")
    assert test.labels is None
    np.testing.assert_array_equal(test.images, PLANES[[2, 4]])
    np.testing.assert_array_equal(opened("hf:org/name:extra", tmp_path).images, PLANES[[2, 9]])


def test_class_names_of_the_hub(hub: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    table = hub["org/name", "train"] = Table({"img": structs([3, 1]), "label": [1, 0]})
    table.features = {"label": types.SimpleNamespace(names=["cat", "dog"])}
    assert opened("hf:org/name", tmp_path).classes == ("cat", "dog")


def test_what_the_hub_does_not_have(hub: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    hub["gone", "train"] = FileNotFoundError("no such data set\nand more lines")
    hub["text", "train"] = Table({"text": ["x"]})
    hub["rows", "train"] = Table({"image": [None, {"bytes": b"text", "path": None}]})
    for source, message in (
        ("hf:gone", "datasets cannot load 'gone', split 'train': no such data set$"),
        ("hf:text", "hf:text has columns text; images are expected in the column image or img"),
        ("hf:rows", r"(?s)row 0: cannot be read: the row is empty.*row 1: not an image"),
    ):
        with pytest.raises(DataError, match=message):
            opened(source, tmp_path)
    with pytest.raises(UsageError, match="hf:rows:train names the split train, which is not test"):
        opened("hf:rows:train", tmp_path, split="test")
    with pytest.raises(UsageError, match="'hf:' names no data set"):
        opened("hf:", tmp_path)


def test_without_datasets_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"^data sets of the hub need datasets: pip install 'fastddpm\[hf\]'$"):
        opened("hf:org/name", tmp_path)


def test_a_name_without_the_prefix_never_reaches_the_hub(hub: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    hub["org/name", "train"] = AssertionError("asked the hub")
    with pytest.raises(UsageError, match="does not exist"):
        opened("org/name", tmp_path)
