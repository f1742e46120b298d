"""Parquet in the Hugging Face layout."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastddpm.data import Dataset, open_dataset
from fastddpm.errors import DataError, UsageError

PIXELS = np.random.default_rng(2).integers(0, 256, (300, 4, 4, 3), dtype=np.uint8)
Load = Callable[..., Dataset]


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
    def opened(source: Path, **options: object) -> Dataset:
        wanted = {"image_size": 4, "channels": 3, "cache": tmp_path / "cache", "report": lambda _: None} | options
        return open_dataset(source, **wanted)  # type: ignore[arg-type]

    return opened


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
