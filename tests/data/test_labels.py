"""Labels from lists: dataset.json of EDM and StyleGAN, metadata.jsonl and metadata.csv of Hugging Face."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folder import png

from fastddpm.data import Dataset, open_dataset
from fastddpm.data.readers import labels
from fastddpm.errors import DataError

PIXELS = np.random.default_rng(3).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
EDM = [f"{i // 4:05d}/img{i:08d}.png" for i in range(12)]
Make = Callable[[dict[str, bytes]], Path]


@pytest.fixture(params=["folder", "zip", "tar"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    def as_folder(files: dict[str, bytes]) -> Path:
        for name, data in files.items():
            (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name).write_bytes(data)
        return tmp_path / "data"

    def as_zip(files: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return tmp_path / "data.zip"

    def as_tar(files: dict[str, bytes]) -> Path:
        with tarfile.open(tmp_path / "data.tar", "w") as archive:
            for name, data in sorted(files.items()):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return tmp_path / "data.tar"

    return {"folder": as_folder, "zip": as_zip, "tar": as_tar}[request.param]


def images(names: list[str]) -> dict[str, bytes]:
    return {name: png(PIXELS[i]) for i, name in enumerate(names)}


def opened(source: Path, **options: str) -> tuple[Dataset, list[str]]:
    lines: list[str] = []
    dataset = open_dataset(
        source, image_size=4, channels=3, cache=source.parent / "cache", report=lines.append, **options
    )  # type: ignore[call-overload]
    return dataset, [line.removeprefix(f"{source}: ") for line in lines]


def check(dataset: Dataset, numbers: list[int], expected: list[int] | None) -> None:
    np.testing.assert_array_equal(dataset.images, PIXELS[numbers].transpose(0, 3, 1, 2))
    assert (None if dataset.labels is None else dataset.labels.tolist()) == expected


ALL = list(range(12))


@pytest.mark.parametrize("below", ["", "cifar10-32x32/"])
@pytest.mark.parametrize("kind", ["list", "table", "plain"])
def test_edm_labels_are_those_of_dataset_json(kind: str, below: str, make: Make) -> None:
    pairs = [[name, i % 10] for i, name in enumerate(EDM)]
    document = {"list": {"labels": pairs[::-1]}, "table": {"labels": dict(pairs)}, "plain": dict(pairs)}[kind]
    files = images([below + name for name in EDM])
    dataset, lines = opened(make(files | {f"{below}dataset.json": json.dumps(document).encode()}))
    check(dataset, ALL, [i % 10 for i in ALL])
    assert dataset.classes == tuple("0123456789")
    assert lines == [f"labels are those of {below}dataset.json", "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"]


def test_edm_without_labels(make: Make) -> None:
    dataset, lines = opened(make(images(EDM) | {"dataset.json": b'{"labels": null}'}))
    check(dataset, ALL, None)
    assert lines == ["dataset.json has no labels", "no classes: the images have no labels"]


def test_another_dataset_json_is_no_list(make: Make) -> None:
    dataset, lines = opened(make(images(EDM) | {"dataset.json": b'{"name": "faces", "version": 2}'}))
    check(dataset, ALL, [i // 4 for i in ALL])
    assert lines[0].startswith("dataset.json gives no labels")
    assert lines[1] == "3 classes: 00000, 00001, 00002"


def test_images_and_entries_need_each_other(make: Make) -> None:
    pairs = [[name, 1] for name in [*EDM[2:], "00000/gone.png"]]
    source = make(images(EDM) | {"dataset.json": json.dumps({"labels": pairs}).encode()})
    with pytest.raises(DataError) as error:
        opened(source)
    assert (
        f"{source}/dataset.json does not fit the images: 2 images are not in it ({EDM[0]}, {EDM[1]}) and 1 of its "
        "entries have no image (00000/gone.png)"
    ) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"labels": [["a.png", 1], ["a.png", 2]]}', "lists 'a.png' twice"),
        ('{"labels": [["a.png", 1.5]]}', r"the label of 'a\.png' is '1\.5'; expected a number below 2\^31"),
        ('{"labels": [["a.png", -1]]}', "the label of 'a.png' is '-1'"),
        ('{"labels": [["a.png", null]]}', "the label of 'a.png' is 'None'"),
        ('{"labels": [["a.png", true]]}', "the label of 'a.png' is 'True'"),
        ('{"labels": [["a.png", [0, 1]]]}', r"the label of 'a\.png' is '\[0, 1\]'"),
        ('{"labels": [["a.png", 1, 2]]}', r"expected \[name, label\]; got \['a\.png', 1, 2\]"),
        ('{"labels": [["a.png", 1], ["b.png", "cat"]]}', "has numbers and names as labels; use one of them"),
        ('{"labels": "a.png"}', r"labels must be a list of \[name, label\]"),
        ('{"labels": [', "not valid JSON"),
        ('{"labels": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    ],
)
def test_damaged_lists_are_refused(text: str, message: str, make: Make) -> None:
    with pytest.raises(DataError, match=rf"dataset\.json.*{message}"):
        opened(make(images(["a.png", "b.png"]) | {"dataset.json": text.encode()}))


def test_large_lists_are_read_entry_by_entry(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MAX_JSON_BYTES", 100)
    names = [*EDM[:11], "odd ] name, \\u00e4.png"]
    pairs = [[name, i] for i, name in enumerate(names)]
    source = make(images(names) | {"dataset.json": json.dumps({"labels": pairs}, indent=1).encode()})
    dataset, _ = opened(source)
    check(dataset, ALL, ALL)
    monkeypatch.setattr(labels, "MAX_LIST_BYTES", 300)
    with pytest.raises(DataError, match=r"dataset\.json cannot be read: .* at most 300 are read"):
        opened(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"other": 1, "labels": [["a.png", 1]]}', "must begin with"),
        ('{"labels": [["a.png", 1] ["b.png", 2]]}', "no , or ] at character 24"),
        ('{"labels": [["a.png", 1], ["b.png", 2]', "no , or ] at character 38"),
        ('{"labels": [["a.png", 1]], "more": 1}', "labels must be its only key"),
        ('{"labels": [' + "[" * 5000, "not valid"),
    ],
)
def test_large_lists_that_are_damaged(text: str, message: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MAX_JSON_BYTES", 10)
    with pytest.raises(DataError, match=message):
        opened(make(images(["a.png", "b.png"]) | {"dataset.json": text.encode()}))


def table(kind: str, column: str, rows: list[tuple[str, object]]) -> dict[str, bytes]:
    if kind == "csv":
        text = "\n".join([f"file_name,text,{column}", *(f'{name},"a, b",{label}' for name, label in rows)])
    else:
        text = "\n".join(json.dumps({"file_name": name, "text": "a, b", column: label}) for name, label in rows)
    return {f"metadata.{kind}": text.encode()}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["label", "labels", "class"])
def test_metadata_of_hugging_face(kind: str, column: str, make: Make) -> None:
    names = [f"{i:02}.png" for i in range(12)]
    numbered = [(name, 11 - i) for i, name in enumerate(names)]
    dataset, lines = opened(make(images(names) | table(kind, column, numbered)))
    check(dataset, ALL, ALL[::-1])
    assert lines[0] == f"labels are those of metadata.{kind}"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_of_classes_are_sorted(kind: str, make: Make) -> None:
    names = [f"part{i % 2}/{i}.png" for i in range(4)]
    rows = list(zip(names, ["dog", "cat", "eel", "cat"], strict=True))
    dataset, lines = opened(make(images(names) | table(kind, "label", rows)))
    check(dataset, [0, 2, 1, 3], [1, 2, 0, 0])
    assert dataset.classes == ("cat", "dog", "eel") and lines[-1] == "3 classes: cat, dog, eel"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_in_splits_number_classes_as_in_training(kind: str, make: Make) -> None:
    files = images(["train/0.png", "train/1.png", "test/2.png", "train/3.png", "val/4.png"])
    for split, rows in {
        "train": [("0.png", "dog"), ("1.png", "cat"), ("3.png", "eel")], "test": [("2.png", "eel")],
        "val": [("4.png", "ant")],
    }.items():  # fmt: skip
        files |= {f"{split}/{name}": data for name, data in table(kind, "label", rows).items()}
    source = make(files)
    train, _ = opened(source)
    check(train, [0, 1, 3], [1, 0, 2])
    test, _ = opened(source, split="test")
    check(test, [2], [2])
    assert test.classes == train.classes == ("cat", "dog", "eel")


def test_classes_that_training_lacks(make: Make) -> None:
    files = images(["train/0.png", "train/1.png", "test/2.png"])
    for split, rows in {"train": [("0.png", "dog"), ("1.png", "cat")], "test": [("2.png", "eel")]}.items():
        files |= {f"{split}/{name}": data for name, data in table("csv", "label", rows).items()}
    dataset, lines = opened(make(files), split="test")
    check(dataset, [2], None)
    assert lines[0] == ("read without labels, because test/metadata.csv has classes that the training split lacks: eel")


def test_one_list_for_all_splits(make: Make) -> None:
    names = ["train/0.png", "train/1.png", "test/2.png"]
    source = make(images(names) | table("jsonl", "label", list(zip(names, [4, 3, 2], strict=True))))
    check(opened(source)[0], [0, 1], [4, 3])
    check(opened(source, split="test")[0], [2], [2])


def test_metadata_without_labels_leaves_the_folders(make: Make) -> None:
    names = ["cat/0.png", "dog/1.png"]
    for metadata in (table("csv", "caption", [(name, "x") for name in names]), {"metadata.csv": b"id,label\n1,2\n"}):
        dataset, lines = opened(make(images(names) | metadata))
        check(dataset, [0, 1], [0, 1])
        assert lines[0].startswith("metadata.csv gives no labels") and lines[-1] == "2 classes: cat, dog"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\na.png\n", "line 2 has 1 fields; expected 2"),
        ("metadata.csv", "file_name,label,label\na.png,1,2\n", "a column is given twice"),
        ("metadata.csv", "file_name,label\n\"a.png,1\n", "not valid CSV"),
        ("metadata.csv", "file_name,label\na.png," + "x" * 200_000, "field larger than field limit"),
        ("metadata.csv", "file_name,label\n,1\n", "row 1 has no file_name"),
        ("metadata.csv", "file_name,label\na.png,\n", "the label of 'a.png' is ''"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n{"label": 1}\n', "row 2 has no file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n[]\n', "line 2 is not an object"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": ' + "1" * 70_000 + "}\n", "line 1 has 70,034 bytes"),
    ],
)  # fmt: skip
def test_damaged_metadata(name: str, text: str, message: str, make: Make) -> None:
    with pytest.raises(DataError, match=message):
        opened(make(images(["a.png"]) | {name: text.encode()}))


def test_two_lists_are_ambiguous(make: Make) -> None:
    files = images(["a.png"]) | table("csv", "label", [("a.png", 1)]) | table("jsonl", "label", [("a.png", 2)])
    with pytest.raises(DataError, match=r"several lists of labels: metadata\.csv, metadata\.jsonl; keep one of them"):
        opened(make(files))


def test_a_changed_list_is_another_data_set(tmp_path: Path) -> None:
    """The cache must not answer with the labels of the older list."""
    for name, data in (images(["0.png", "1.png"]) | table("csv", "label", [("0.png", 0), ("1.png", 1)])).items():
        (tmp_path / name).write_bytes(data)
    source = tmp_path
    first = open_dataset(source, image_size=4, channels=3, cache=tmp_path / ".cache", report=lambda _: None)
    (tmp_path / "metadata.csv").write_bytes(table("csv", "label", [("0.png", 1), ("1.png", 0)])["metadata.csv"])
    os.utime(tmp_path / "metadata.csv", ns=(5, 5))
    second = open_dataset(source, image_size=4, channels=3, cache=tmp_path / ".cache", report=lambda _: None)
    assert first.labels is not None and second.labels is not None
    assert (first.labels.tolist(), second.labels.tolist()) == ([0, 1], [1, 0])


def test_a_pipe_in_place_of_a_list_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(png(PIXELS[0]))
    os.mkfifo(tmp_path / "data" / "dataset.json")
    with pytest.raises(DataError, match=r"dataset\.json cannot be read: not a regular file"):
        opened(tmp_path / "data")
