"""metrics.json: several commands add to it at once, and damage to it is one message."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastddpm.errors import DataError
from fastddpm.evaluation.report import Report
from fastddpm.pretrained.scores import FILE

RECORD: dict[str, Any] = {"value": 1.5, "num_images": 4, "data": {"name": "digits"}}


def opened(out: Path) -> Report:
    context: Any = SimpleNamespace(
        out=out, name="mnist", steps=7,
        sampler=SimpleNamespace(settings=lambda: {"network": "ab" * 32}),
    )  # fmt: skip
    return Report(context, Path("run"))


def found(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / FILE).read_text())
    return document


def test_two_commands_at_once_lose_nothing(tmp_path: Path) -> None:
    """Both have read the file before either writes."""
    one, two = opened(tmp_path), opened(tmp_path)
    one.add("train", "is", RECORD)
    two.add("train", "fid", RECORD)
    one.add("test", "is", RECORD)
    assert {part: sorted(found(tmp_path)[part]) for part in ("train", "test")} == {
        "train": ["fid", "is"],
        "test": ["is"],
    }
    assert all(f"| {name} |" in one.table() for name in ("is, train", "is, test")) and "fid, train" in one.table()


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    def add(number: int) -> None:
        report = opened(tmp_path)
        for i in range(10):
            report.add("train", f"{number}-{i}", RECORD)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found(tmp_path)["train"]) == 40


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda document: [], "must hold a JSON object"),
        (lambda document: {}, "does not name its network"),
        (lambda document: document | {"checkpoint": 5}, "does not name its network"),
        (lambda document: document | {"checkpoint": {"network": 5}}, "does not name its network"),
        (lambda document: document | {"train": [1]}, "train holds no results by name"),
        (lambda document: document | {"test": {"is": 1}}, "test holds no results by name"),
        (lambda document: document | {"train": {"is": {}}}, "train has no valid is"),
        (lambda document: document | {"train": {"is": RECORD | {"value": "x"}}}, "train has no valid is"),
        (lambda document: document | {"train": {"is": RECORD | {"value": 10**400}}}, "an integer of 401 digits"),
        (lambda document: document | {"train": {"is": RECORD | {"data": 1}}}, "train has no valid is"),
        (lambda document: document | {"train": {"bpd": RECORD}}, "train has no valid bpd"),
        (lambda document: document | {"pictures": 1}, "pictures holds no results by name"),
    ],
)
def test_a_damaged_file_is_one_error(change: Any, problem: str, tmp_path: Path) -> None:
    opened(tmp_path).add("train", "is", RECORD)
    (tmp_path / FILE).write_text(json.dumps(change(found(tmp_path))))
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(DataError, match=rf"{problem}.*choose another --out"):
        opened(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
