"""Images that cannot be used: every one is named with its reason, and `--skip-bad` goes on without them."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bad_images import listed, spoil
from helpers.image_folder import Load, check, load, png, source, without_classes
from helpers.packs import collection_of

from fastddpm.data.image import FORMATS
from fastddpm.data.ingest import Problems
from fastddpm.errors import DataError

__all__ = ["load", "source"]


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """locked.png cannot be opened; permissions would not stop a test that runs as root."""
    os_open = os.open

    def refuse(path: str | Path, *arguments: Any, **options: Any) -> int:
        if Path(path).name == "locked.png":
            raise PermissionError(13, "Permission denied", str(path))
        return os_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("locked")
def test_every_bad_image_is_listed_at_once(
    load: Load, source: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    reasons = spoil(source)
    with pytest.raises(DataError) as error:
        load()
    first, *_, advice = str(error.value).splitlines()
    assert first == f"14 of 44 images in {source} cannot be used:"
    assert advice == "mend or remove them, or use --skip-bad to go on without them"
    found = listed(str(error.value))
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name], name
    assert list((tmp_path / "cache").iterdir()) == []
    assert not recwarn.list


@pytest.mark.usefixtures("locked")
def test_skip_bad_reports_them_and_goes_on(load: Load, source: Path) -> None:
    reasons = spoil(source)
    lines: list[str] = []
    check(load(skip_bad=True, report=lines.append))
    text, classes = lines
    assert classes == "3 classes: 0, 1, 2"
    assert all(name in text for name in reasons) and text.endswith("left out, as --skip-bad asks")
    check(load(skip_bad=True, report=lines.append))
    assert without_classes(lines[2:]) == [f"14 images of {source} are left out, because they cannot be used"]


def test_no_usable_image_is_always_an_error(tmp_path: Path, load: Load) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"text")
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=r"(?s)1 of 1 images .* x\.png: not an image.*no image is left"):
            load(source=tmp_path / "bad", skip_bad=skip_bad)


def test_a_long_list_is_grouped_and_kept_in_a_file(load: Load, source: Path, tmp_path: Path) -> None:
    for i in range(25):
        (source / "1" / f"bad{i:02}.png").write_bytes(b"text")
    for i in range(1, 7):
        (source / "2" / f"size{i}.png").write_bytes(png(np.zeros((i, 9, 3), np.uint8)))
    (source / "2" / "alone.png").write_bytes(b"")
    unknown = f"not an image of a known format ({', '.join(FORMATS)})"
    with pytest.raises(DataError) as error:
        load()
    first, *lines, last, advice = str(error.value).splitlines()
    assert first == f"32 of 62 images in {source} cannot be used:" and advice.startswith("mend or remove them")
    sizes = [f"    2/size{i}.png: 9x{i}, expected 8x8; --resize area crops and resizes" for i in range(1, 6)]
    assert lines == [
        f"  25 images: {unknown}", *(f"    1/bad{i:02}.png" for i in range(5)), "    and 20 more",
        "  2/alone.png: the file is empty",
        "  6 images: .. expected 8x8; --resize area crops and resizes", *sizes, "    and 1 more",
    ]  # fmt: skip
    assert last.startswith("  the whole list is in ")
    kept = Path(last.split(" is in ")[1]).read_text().splitlines()
    assert kept[:25] == [f"1/bad{i:02}.png: {unknown}" for i in range(25)]
    assert kept[25:26] == ["2/alone.png: the file is empty"] and len(kept) == 32
    assert kept[31] == "2/size6.png: 9x6, expected 8x8; --resize area crops and resizes"
    # Where no file can be written, each is reported.
    (tmp_path / "file").write_bytes(b"")
    reported: list[str] = []
    with pytest.raises(DataError, match="the whole list is listed above"):
        load(cache=tmp_path / "file", report=reported.append)
    assert [line for line in reported if ".png: " in line] == kept


def test_very_many_reasons_are_counted(tmp_path: Path) -> None:
    problems = Problems(collection_of([b""] * 100), tmp_path / "list.txt", print)
    for i in range(30):
        problems.add(f"{i}.png", "reason " + "x" * i)
    text = problems.message()
    assert text.count(".png: ") == 20 and "\n  10 for other reasons\n" in text
    assert len((tmp_path / "list.txt").read_text().splitlines()) == 30


def test_a_file_larger_than_any_image_is_not_read(load: Load, source: Path) -> None:
    with (source / "0" / "film.png").open("wb") as file:
        file.truncate(2**28 + 1)  # a hole, which takes no space
    with pytest.raises(
        DataError, match=r"0/film\.png: cannot be read: 268,435,457 bytes; at most 268,435,456 are read"
    ):
        load()


def test_a_damaged_deflate_stream(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", bytes(1000))
    data = bytearray(path.read_bytes())
    data[30 + len("a.png")] = 0b111  # a block of type 3, which there is not
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png: cannot be read: Error -3 while decompressing"):
        load(source=path)


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
