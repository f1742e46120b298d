"""Parquet in the Hugging Face layout."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.image_folder import Load, opener
from PIL import Image

from fastddpm.data import Dataset
from fastddpm.data.readers import parquet as reader
from fastddpm.data.sources import open_image_source
from fastddpm.errors import DataError, UsageError

PIXELS = np.random.default_rng(2).integers(0, 256, (300, 4, 4, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


ENCODED = [png(pixels) for pixels in PIXELS]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def structs(encoded: list[bytes | None]) -> list[dict[str, Any]]:
    return [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(encoded)]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return opener(tmp_path / "cache", 4)


def check(dataset: Dataset, first: int, last: int, labels: list[int] | None) -> None:
    np.testing.assert_array_equal(dataset.images, PIXELS[first:last].transpose(0, 3, 1, 2))
    assert (None if dataset.labels is None else dataset.labels.tolist()) == labels


@pytest.mark.parametrize("column", ["img", "image"])
def test_a_file_of_structs_in_several_row_groups(column: str, tmp_path: Path, load: Load) -> None:
    labels = [i % 10 for i in range(300)]
    path = write(
        tmp_path / "x.parquet", {"other": labels, column: structs(ENCODED), "label": labels}, row_group_size=77
    )
    check(load(path), 0, 300, labels)
    check(load(tmp_path), 0, 300, labels)


def test_bytes_without_a_struct_and_without_labels(tmp_path: Path, load: Load) -> None:
    check(load(write(tmp_path / "x.parquet", {"image": ENCODED[:9]})), 0, 9, None)
    unknown = {"image": ENCODED[:9], "label": [-1] * 9}  # how a hidden test set is marked
    check(load(write(tmp_path / "y.parquet", unknown)), 0, 9, None)


@pytest.mark.parametrize("below", ["", "data", "plain_text"])
def test_a_directory_has_splits_and_shards(below: str, tmp_path: Path, load: Load) -> None:
    for i in range(3):
        part = slice(10 * i, 10 * i + 10)
        name = f"train-{i:05}-of-00003.parquet"
        write(tmp_path / below / name, {"img": structs(ENCODED[part]), "label": [i] * 10})
    write(tmp_path / below / "test-00000-of-00001.parquet", {"img": structs(ENCODED[30:34]), "label": [5] * 4})
    check(load(tmp_path), 0, 30, [0] * 10 + [1] * 10 + [2] * 10)
    check(load(tmp_path, split="test"), 30, 34, [5] * 4)
    (tmp_path / below / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="2 of the 3 files of train; the others are missing"):
        load(tmp_path)
    (tmp_path / below / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"has no test-\*\.parquet; it has train-00000-of-00003\.parquet"):
        load(tmp_path, split="test")


def test_the_layout_that_the_hub_converts_to(tmp_path: Path, load: Load) -> None:
    for split, part in (("train", slice(0, 6)), ("test", slice(6, 9)), ("unsupervised", slice(9, 11))):
        for i, image in enumerate(ENCODED[part]):
            write(tmp_path / "default" / split / f"{i:04}.parquet", {"image": [image]})
    lines: list[str] = []
    check(load(tmp_path, report=lines.append), 0, 6, None)
    assert lines[0].endswith("other splits are left out: unlabeled")
    check(load(tmp_path, split="test"), 6, 9, None)
    write(tmp_path / "other" / "train" / "0000.parquet", {"image": ENCODED[:1]})
    with pytest.raises(DataError, match=r"several folders; name one of default/test, default/train"):
        load(tmp_path)


def test_splits_by_name_or_refused(tmp_path: Path, load: Load) -> None:
    for name, part in (("Train-0", slice(0, 2)), ("validation-0", slice(2, 5))):
        write(tmp_path / f"{name}.parquet", {"img": ENCODED[part]})
    check(load(tmp_path), 0, 2, None)
    lines: list[str] = []
    check(load(tmp_path, split="test", report=lines.append), 2, 5, None)
    assert lines[0].endswith("there is no test split: the parquet files of validation serve as test")
    more = write(tmp_path / "more.parquet", {"img": ENCODED[:1]})
    with pytest.raises(DataError, match=r"some parquet files are named like splits, but more\.parquet are not"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"more\.parquet has no splits.*: found one table"):
        load(more, split="test")
    check(load(tmp_path / "validation-0.parquet", split="test"), 2, 5, None)
    for path in tmp_path.glob("*-0.parquet"):
        path.unlink()
    with pytest.raises(UsageError, match=r"has no splits.*: found 1 parquet files, more\.parquet"):
        load(tmp_path, split="test")


def test_columns_given_twice_are_named(tmp_path: Path, load: Load) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for twice, names in (("img", ["img", "img", "label"]), ("label", ["img", "label", "label"])):
        columns = [ENCODED[:2] if name == "img" else [0, 1] for name in names]
        parquet.write_table(pyarrow.table([pyarrow.array(c) for c in columns], names=names), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=rf"x\.parquet has 2 columns named {twice}; keep one of them"):
            load(tmp_path / "x.parquet")


def test_class_names_that_datasets_has_stored(tmp_path: Path, load: Load) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"img": ENCODED[:3], "label": [1, 0, 1]})
    for info, expected in (
        ('{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}', ("cat", "dog")),
        ('{"info": {"features": {"label": {"names": 5}}}}', ("0", "1")),
        ("[[", ("0", "1")),
    ):
        parquet.write_table(table.replace_schema_metadata({"huggingface": info}), tmp_path / "x.parquet")
        assert load(tmp_path / "x.parquet").classes == expected
        (tmp_path / "x.parquet").unlink()


def test_a_pipe_in_place_of_a_table_is_not_opened(tmp_path: Path, load: Load) -> None:
    pytest.importorskip("pyarrow")
    os.mkfifo(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet is not a regular file"):
        load(tmp_path)
    (tmp_path / "x.parquet").rename(tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"x\.tar is not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize("dictionary", [True, False])
def test_rows_are_read_by_weight(dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 equal rows of 64 kB are one entry of a dictionary, a few kB in the file."""
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = write(
        tmp_path / "x.parquet", {"img": [bytes(2**16)] * 128}, compression="zstd",
        use_dictionary=dictionary, dictionary_pagesize_limit=2**20,
    )  # fmt: skip
    assert path.stat().st_size < 4096
    monkeypatch.setattr(reader, "_MAX_BATCH_BYTES", 5 * 2**16)
    with parquet.ParquetFile(path) as table:
        group = table.metadata.row_group(0)
        assert (group.column(0).total_uncompressed_size < 2**18) == dictionary
        assert reader._rows_at_once(group, path) == 4  # beside the bytes of the page's header
    assert sum(item.read() == bytes(2**16) for item in open_image_source(path).items()) == 128
    monkeypatch.setattr(reader, "_MAX_UNPACKED_BYTES", 2**16)
    with pytest.raises(DataError, match=r"x\.parquet: a row group unpacks to [\d,]+ bytes, \d+ times its size"):
        list(open_image_source(path).items())


def test_several_folders_of_parquet_are_ambiguous(tmp_path: Path, load: Load) -> None:
    for name in ("large", "small"):
        write(tmp_path / name / "train.parquet", {"img": ENCODED[:2]})
    with pytest.raises(DataError, match="several folders; name one of large, small"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixels": [b"x"], "label": [1]}, "has columns pixels, label; images are expected in the column img or image"),
        ({"img": ["text"]}, "img is string; expected the bytes of an image file"),
        ({"img": [[1, 2, 3]]}, "img is list<.*>; expected the bytes of an image file"),
        ({"img": [{"path": "x.png"}]}, "img is struct<path: string>; expected the bytes of an image file"),
        ({"img": ENCODED[:1], "label": ["cat"]}, "label is string; expected integers"),
        ({"img": ENCODED[:1], "label": [0.5]}, "label is double; expected integers"),
        ({"img": ENCODED[:2], "label": [3, None]}, "1 images have no label, the others do"),
        ({"img": ENCODED[:1], "label": [2**62]}, "too large to be a class"),
        ({"img": [None, b"x"]}, "row 0: cannot be read: the row is empty"),
        (
            {"img": [{"bytes": None, "path": "a.png"}, {"bytes": b"", "path": ""}]},
            r"names the file a\.png but holds no",
        ),
        ({"img": []}, "img is null; expected the bytes of an image file"),
    ],
)
def test_other_layouts_are_refused(columns: dict[str, Any], message: str, tmp_path: Path, load: Load) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "x.parquet", columns))


def test_a_table_without_rows(tmp_path: Path, load: Load) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    empty = pyarrow.table({"img": ENCODED[:1]}).slice(0, 0)
    with pytest.raises(DataError, match=r"x\.parquet holds no images"):
        load(write(tmp_path / "x.parquet", {"img": empty.column("img")}))


def test_rows_larger_than_any_image_are_not_decoded(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastddpm.data.readers.parquet.MAX_ENCODED_BYTES", len(ENCODED[0]))
    path = write(tmp_path / "x.parquet", {"img": [ENCODED[0], ENCODED[0] + b"\0"]})
    with pytest.raises(DataError, match=rf"row 1: cannot be read: {len(ENCODED[0]) + 1} bytes; at most"):
        load(path)
    check(load(path, skip_bad=True), 0, 1, None)


def test_rows_that_cannot_be_used_are_named(tmp_path: Path, load: Load) -> None:
    rows = structs([ENCODED[0], b"text", ENCODED[1], b"", None])
    path = write(tmp_path / "x.parquet", {"img": rows, "label": [4, 5, 6, 7, 8]})
    with pytest.raises(DataError, match=r"3 of 5 images in .*x\.parquet cannot be used") as error:
        load(path)
    for line in ("x.parquet row 1: not an image", "x.parquet row 3: the file is empty", "x.parquet row 4: cannot be"):
        assert line in str(error.value)
    check(load(path, skip_bad=True), 0, 2, [4, 6])


def test_damaged_files(tmp_path: Path, load: Load) -> None:
    path = write(tmp_path / "x.parquet", {"img": structs(ENCODED), "label": [1] * 300}, compression="zstd")
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], bytes(len(whole))):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"x\.parquet cannot be read as parquet"):
            load(path)
    path.write_bytes(whole[:200] + bytes(2000) + whole[2200:])  # the pages, not the footer
    with pytest.raises(DataError, match=r"x\.parquet is damaged|cannot be used"):
        load(path)


def test_without_pyarrow_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"^reading parquet needs pyarrow: pip install 'fastddpm\[parquet\]'$"):
        load(tmp_path / "x.parquet")
