"""A damaged log stops nothing: what can be read of it stays, and the rest is kept beside it."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastddpm.errors import DataError
from fastddpm.training.run_log import JsonLines, read_log, read_log_thinned

GOOD: list[dict[str, Any]] = [
    {"step": 2, "loss": 0.5, "gradient_norm": None, "loss_by_t": [0.1, None]},
    {"step": 4, "loss": 0.25, "gradient_norm": 1, "loss_by_t": None},
    {"step": 6, "loss": 0.2, "gradient_norm": 2.0, "loss_by_t": [0.3, 0.2]},
]
BAD = [
    b"\xff\xfe\x00 garbage",
    b'{"step": ' + b"9" * 400 + b', "loss": 1.0}',
    b'{"step": 4, "loss": ' + b"9" * 400 + b"}",
    b"[" * 5000,
    b'{"step": "4", "loss": 1.0}',
    b'{"step": true, "loss": 1.0}',
    b'{"step": 4, "loss": "1.0"}',
    b'{"step": 4, "loss_by_t": [[1.0]]}',
    b'{"step": 4, "loss_by_t": 1.0}',
    b'{"step": 4, "loss": [1.0, 2.0]}',
    b'{"step": 4, "loss": {"a": 1}}',
    b'{"loss": 1.0}',
    b"4",
    b"x" * 300_000,
    b"",
]


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad[:24]))
def test_a_damaged_line_is_left_out_and_kept_beside(bad: bytes, tmp_path: Path) -> None:
    path, said = tmp_path / "log.jsonl", []
    before = lines(GOOD[0]) + bad + b"\n" + lines(*GOOD[1:])
    path.write_bytes(before)
    assert read_log(path) == GOOD
    log = JsonLines(path, 4, said.append)
    log.write({"step": 8, "loss": 0.125})
    log.close()
    assert read_log(path) == [*GOOD[:2], {"step": 8, "loss": 0.125}]
    assert len(said) == 1 and "1 damaged lines" in said[0] and "log.jsonl.damaged" in said[0]
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == before


def test_the_half_line_of_a_killed_run_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(lines(*GOOD) + b'{"step": 8, "lo')
    JsonLines(path, 6, pytest.fail).close()
    assert read_log(path) == GOOD and [item.name for item in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_record_without_its_end_of_line_stays(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(lines(*GOOD)[:-1])
    log = JsonLines(path, 6, pytest.fail)
    log.write({"step": 8})
    log.close()
    assert read_log(path) == [*GOOD, {"step": 8}]


IN_ITS_PLACE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
    "a dangling link": lambda path: os.symlink("/no/such/file", path),
}


@pytest.mark.parametrize("kind", IN_ITS_PLACE)
def test_what_is_no_log_is_set_aside(kind: str, tmp_path: Path) -> None:
    path, said = tmp_path / "log.jsonl", []
    IN_ITS_PLACE[kind](path)
    log = JsonLines(path, 4, said.append)
    log.write({"step": 6, "loss": 1.0})
    log.close()
    assert read_log(path) == [{"step": 6, "loss": 1.0}]
    assert len(said) == 1 and os.path.lexists(tmp_path / "log.jsonl.damaged")


def test_reading_what_is_no_log_is_one_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(DataError, match=r"log\.jsonl cannot be read: not a regular file"):
        read_log(tmp_path / "log.jsonl")


def test_a_log_grown_to_gigabytes_is_not_read(tmp_path: Path) -> None:
    path, said = tmp_path / "log.jsonl", []
    path.write_text('{"step": 1, "loss": 1.0}\n')
    os.truncate(path, 2**32)
    with pytest.raises(
        DataError, match=r"log\.jsonl cannot be read: 4,294,967,296 bytes; at most 1,073,741,824 are read"
    ):
        read_log(path)
    JsonLines(path, 1, said.append).close()
    assert len(said) == 1 and (tmp_path / "log.jsonl.damaged").exists() and path.stat().st_size == 0


@pytest.mark.parametrize(("count", "most"), [(10, 100), (100, 10), (101, 10), (7, 3), (1, 1)])
def test_a_thinned_log_is_even_and_ends_with_the_end(count: int, most: int, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(count)))
    records, lines = read_log_thinned(path, most)
    steps = [record["step"] for record in records]
    assert lines == count and len(steps) <= most + 2 and steps[-1] == count - 1
    assert len({b - a for a, b in itertools.pairwise(steps[:-1])}) <= 2
    path.write_bytes(path.read_bytes() + b'{"step": ')  # killed as it wrote
    assert read_log_thinned(path, most)[0][-1]["step"] == count - 1
    with pytest.raises(DataError, match="cannot be read"):
        read_log_thinned(tmp_path / "none", most)
