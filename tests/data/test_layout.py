"""Splits, classes and wrapping folders as people have them: recognised or refused, never silently wrong."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folder import png

from fastddpm.data import Dataset, open_dataset
from fastddpm.data.readers import layout
from fastddpm.errors import DataError, UsageError

Make = Callable[[str, Iterable[str]], Path]
CLASSES = ("cat", "dog")


def pixels(name: str) -> np.ndarray:
    """Pixels that tell which file an image is from."""
    return np.random.default_rng(list(name.encode())).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def content(name: str) -> bytes:
    return png(pixels(name)) if name.endswith(".png") else b"text"


def as_folder(path: Path, names: Iterable[str]) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content(name))
    return path


def as_zip(path: Path, names: Iterable[str]) -> Path:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name in names:
            archive.writestr(name, content(name))
    return path.with_suffix(".zip")


def as_tar(path: Path, names: Iterable[str]) -> Path:
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content(name))
            archive.addfile(info, io.BytesIO(content(name)))
    return path.with_suffix(".tar")


@pytest.fixture(params=[as_folder, as_zip, as_tar])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Write files as a folder, a zip and a tar."""
    return lambda name, files: request.param(tmp_path / name, files)


def opened(source: Path, split: str = "train") -> tuple[Dataset, list[str]]:
    """The data set, and what was reported but for files that are no images, without the path."""
    lines: list[str] = []
    dataset = open_dataset(
        source, image_size=4, channels=3, split=split, cache=source.parent / "cache", report=lines.append
    )  # type: ignore[call-overload]
    lines = [line.removeprefix(f"{source}: ") for line in lines]
    return dataset, [line for line in lines if "files are not read" not in line]


def check(
    source: Path, names: list[str], labels: list[int] | None, *notes: str, split: str = "train",
    classes: tuple[str, ...] = CLASSES,
) -> None:  # fmt: skip
    """The images are those of the files `names`, in this order; the notes are all that is reported, in order."""
    dataset, lines = opened(source, split)
    expected = np.stack([pixels(name) for name in names]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(dataset.images, expected)
    assert (None if dataset.labels is None else dataset.labels.tolist()) == labels
    assert dataset.classes == (None if labels is None else classes)
    last = "no classes: the images have no labels"
    if labels is not None:
        last = f"{len(classes)} classes: {', '.join(classes)}"
    assert lines == [*notes, last]


def files(*splits: str, classes: Iterable[str] = CLASSES, count: int = 2) -> list[str]:
    return [f"{split}/{name}/{i}.png" for split in splits for name in classes for i in range(count)]


LABELS = [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("trainset", "testset"),
        ("training_set", "test_set"), ("train_images", "test_images"), ("images_train", "images_test"),
        ("Training Data", "Test Data"), ("train2017", "test2017"), ("train_32x32", "test_32x32"), ("tr", "te"),
        ("seg_train", "seg_test"), ("mnist-train", "mnist-test"), ("trainval", "test"),
    ],
)  # fmt: skip
def test_splits_by_their_common_names(train: str, test: str, make: Make) -> None:
    source = make("data", files(train, test))
    check(source, files(train), LABELS)
    check(source, files(test), LABELS, split="test")


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev", "eval"])
def test_validation_serves_as_test_if_there_is_none(name: str, make: Make) -> None:
    source = make("data", files("train", name))
    check(source, files("train"), LABELS)
    check(source, files(name), LABELS, f"there is no test split: the images of {name}/ serve as test", split="test")
    source = make("both", files("train", name, "test"))
    left_out = f"other splits are left out: {name}/ (4 images)"
    check(source, files("train"), LABELS, left_out)
    check(source, files("test"), LABELS, left_out, split="test")


def test_other_splits_are_named_and_left_out(make: Make) -> None:
    source = make("data", [*files("train", "test"), "unlabeled/0.png", "unlabeled/1.png", "extra/0.png"])
    for split in ("train", "test"):
        dataset, lines = opened(source, split)
        assert len(dataset.images) == 4 and lines[1:] == ["2 classes: cat, dog"]
        assert lines[0].startswith("other splits are left out: ")
        assert "unlabeled/ (2 images)" in lines[0] and "extra/ (1 images)" in lines[0]


@pytest.mark.parametrize("wrapper", ["images-master/", "a/b/c/", "test/", "data/train/"])
def test_single_folders_are_passed_through(wrapper: str, make: Make) -> None:
    names = files(f"{wrapper}train", f"{wrapper}test")
    source = make("data", [*names, f"{wrapper}README.md"])
    check(source, names[:4], LABELS)
    check(source, names[4:], LABELS, split="test")


def test_single_folders_inside_splits_and_around_classes(make: Make) -> None:
    source = make("data", [*files("train/images"), *files("test")])
    check(source, files("train/images"), LABELS)
    check(source, files("test"), LABELS, split="test")
    check(make("plain", files("wrapped/again")), files("wrapped/again"), LABELS)


def test_pictures_and_texts_beside_folders_are_noted(make: Make) -> None:
    rest = ["LICENSE", "README.md", "Thumbs.db", ".DS_Store", "__MACOSX/train/cat/0.png"]
    source = make("data", [*files("train", "test"), "preview.png", *rest])
    note = "1 image beside the folders left out: preview.png"
    check(source, files("train"), LABELS, note)
    check(source, files("test"), LABELS, note, split="test")
    check(make("classes", ["a.png", *files("x"), "x/logo.png"]), files("x"), LABELS,
          "1 image beside the folders left out: a.png", "1 image beside the folders left out: x/logo.png")  # fmt: skip
    source = make("inside", [*files("train"), "train/logo.png"])
    check(source, files("train"), LABELS, "1 image beside the folders left out: train/logo.png")


def test_many_pictures_beside_folders_are_the_data(make: Make) -> None:
    loose = [f"{i}.png" for i in range(3)]
    names = [*loose, *files("a")[:1], *files("b")[:1]]
    note = "3 images lie beside the folders a, b, which thus are no classes"
    check(make("data", names), names, None, note)
    with pytest.raises(DataError, match="has 3 images beside the splits test, train: move them into a split"):
        opened(make("splits", [*files("train", "test"), *loose]))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "bus", "car"], r"of its folders, train can be splits, but bus, car cannot"),
        (["train", "test", "Meta"], r"of its folders, test, train can be splits, but Meta cannot"),
        (["Train", "training", "test"], r"its folders Train, training both look like the split train"),
        (
            ["seg_train", "seg_test", "seg_pred"],
            r"of its folders, seg_test, seg_train can be splits, but seg_pred cannot",
        ),
        (["dev", "eval"], r"its folders dev, eval may be splits or classes"),
        (["bottle/train", "bottle/test", "cable/train"], r"bottle has the folder test, which looks like a split"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(folders: list[str], message: str, make: Make) -> None:
    source = make("data", files(*folders))
    for split in ("train", "test"):
        with pytest.raises(DataError, match=rf"data.* can be read in two ways: .*{message}"):
            opened(source, split)


def test_splits_inside_a_split_are_refused(make: Make) -> None:
    message = r"train can be read in two ways: it is a split, but its folders train, val look like splits of their own"
    with pytest.raises(DataError, match=message):
        opened(make("data", files("train/train", "train/val", "test")))


def test_words_of_splits_can_be_classes(make: Make) -> None:
    """Inside a split, or where the words are no certain sign."""
    for folders in (("tr", "de", "us"), ("train_station", "bridge"), ("extra", "normal"), ("testament", "trainer")):
        names = sorted(f"{folder}/{i}.png" for folder in folders for i in range(2))
        labels = [i for i in range(len(folders)) for _ in range(2)]
        check(make("-".join(folders), names), names, labels, classes=tuple(sorted(folders)))
    names = files("train", classes=("bus", "train"))
    check(make("vehicles", names), names, LABELS, classes=("bus", "train"))


def test_data_without_splits_are_not_test(make: Make) -> None:
    source = make("data", files("all"))
    with pytest.raises(UsageError, match=r"has no splits.*: found 4 images in 2 folders, cat, dog\.") as error:
        opened(source, "test")
    assert error.value.exit_code == 2
    with pytest.raises(UsageError, match="found 2 images"):
        opened(make("flat", ["0.png", "1.png"]), "test")
    with pytest.raises(UsageError, match="has no splits"):
        opened(make("my_train", files("all")), "test")
    with pytest.raises(UsageError, match="has no splits"):
        opened(make("test_of_something", files("all")), "test")
    for name in ("my_test", "faces-val"):  # the name of the source says it
        check(make(name, files("all")), files("all"), LABELS, split="test")


def test_classes_are_numbered_as_in_training(make: Make) -> None:
    three = files("train", classes=("cat", "dog", "eel"), count=1)
    source = make("data", [*three, "test/cat/0.png", "test/eel/0.png"])
    names = ("cat", "dog", "eel")
    check(source, ["test/cat/0.png", "test/eel/0.png"], [0, 2], split="test", classes=names)
    source = make("more", [*three, "test/ant/0.png", "test/eel/0.png"])
    note = "read without labels, because test/ has classes that the training split lacks: ant"
    check(source, ["test/ant/0.png", "test/eel/0.png"], None, note, split="test")
    check(make("flat", [*three, "test/0.png"]), ["test/0.png"], None, split="test")


def test_a_source_without_images_says_what_is_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"holds no images; files ending in .*, and there are 2 \.txt, 1 \.xcf$"):
        opened(make("data", ["a.txt", "b/c.txt", "b/d.xcf"]))


def test_folders_beyond_number_are_merged(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_MAX_FOLDERS", 10)
    names = [f"w/train/{c}/1/2/3/4/{i}/0.png" for c in CLASSES for i in range(9)]
    check(make("data", [*names, "w/test/0.png"]), names, [0] * 9 + [1] * 9)


def test_a_zip_with_backslashes(tmp_path: Path) -> None:
    path = tmp_path / "windows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in files("train", "test"):
            archive.writestr(name.replace("/", "\\"), content(name))
    check(path, files("train"), LABELS)


def test_classes_that_are_links(tmp_path: Path) -> None:
    real = as_folder(tmp_path / "real", files("all"))
    links = tmp_path / "links" / "train"
    links.mkdir(parents=True)
    for name in CLASSES:
        (links / name).symlink_to(real / "all" / name)
    check(tmp_path / "links", files("all"), LABELS)
    (tmp_path / "links" / "train" / "up").symlink_to("..")
    loop = "1 links lead back to a folder that holds them and are not followed: train/up"
    check(tmp_path / "links", files("all"), LABELS, loop)


def test_many_classes_are_shortened(tmp_path: Path) -> None:
    names = [f"{i:02}/0.png" for i in range(12)]
    _, lines = opened(as_folder(tmp_path / "data", names))
    assert lines == ["12 classes: 00, 01, 02, 03, 04, 05, 06, 07, 08, .., 11"]


def shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_shards_by_split_and_shards_that_hold_splits(tmp_path: Path) -> None:
    named = tmp_path / "named"
    for name in ("Train-0", "Train-1", "Test-0", "Test-1", "extra-0"):
        shard(named / f"{name}.tar", {f"{name}.png": content(f"{name}.png")})
    note = "other splits are left out: extra"
    check(named, ["Train-0.png", "Train-1.png"], None, note)
    check(named, ["Test-0.png", "Test-1.png"], None, note, split="test")
    shard(named / "more-0.tar", {"0.png": content("0.png")})
    with pytest.raises(DataError, match=r"in two ways: some tar files are named like splits, but more-0\.tar are not"):
        opened(named)
    inner = tmp_path / "inner"
    shard(inner / "x-0.tar", {name: content(name) for name in files("train", "test")})
    shard(inner / "x-1.tar", {"train/cat/9.png": content("train/cat/9.png")})
    check(inner, [*files("train"), "train/cat/9.png"], [*LABELS, 0])
    check(inner, files("test"), LABELS, split="test")
    with pytest.raises(UsageError, match="has no splits"):
        shard(tmp_path / "plain" / "x-0.tar", {"0.png": content("0.png")})
        opened(tmp_path / "plain", "test")


def test_labels_of_samples_come_before_folders(tmp_path: Path) -> None:
    """Folders of a tar file with .cls labels are no classes, and no image beside them is left out."""
    names = ["a.png", "cat/0.png", "dog/1.png"]
    members = {name: content(name) for name in names}
    labels = {name.replace(".png", ".cls"): b"%d" % i for i, name in enumerate(names)}
    path = tmp_path / "x.tar"
    shard(path, dict(sorted((members | labels).items())))
    check(path, names, [0, 1, 2], classes=("0", "1", "2"))


CASES = Path(__file__).parents[2].parent / "shared" / "cases" / "make_cases.py"


@pytest.mark.skipif(not CASES.exists(), reason="the cases beside the project are not here")
def test_cases_beside_the_project(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(CASES), str(tmp_path)], check=True)
    for name, expected in json.loads((tmp_path / "expected.json").read_text()).items():
        for split in ("train", "test"):
            if split not in expected:
                continue
            lines: list[str] = []
            dataset = open_dataset(
                tmp_path / name, image_size=16, channels=3, split=split, cache=tmp_path / "cache", report=lines.append
            )
            assert len(dataset.images) == expected[split], name
            if "classes" in expected:
                assert list(dataset.classes or ()) == expected["classes"], name
                assert f"{len(expected['classes'])} classes: {', '.join(expected['classes'])}" in lines
            if "labels" in expected:
                assert dataset.labels is not None and dataset.labels.tolist() == expected["labels"], name
            assert any(expected.get("note", "") in line for line in lines), name
