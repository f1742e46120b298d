"""log.jsonl of a run: a line of numbers for each logged step. Damage to it never stops a run."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError, StorageError
from fastddpm.runtime.progress import log
from fastddpm.storage.documents import parse_json
from fastddpm.storage.files import open_to_append, set_aside, write_whole
from fastddpm.storage.reading import check_size, open_regular

Record = dict[str, Any]
_MAX_LINE_BYTES = 2**16
_MAX_BYTES = 2**30
_LISTS = ("loss_by_t", "accuracy_by_t")


class JsonLines:
    """An append-only log.jsonl. On resume, lines after `resume_step` are dropped first.

    Lines that cannot be read are dropped, too, with a line to `report`, and the file as it was is kept beside it as
    log.jsonl.damaged; so is anything in its place that is not a regular file. Raises `StorageError` if the file cannot
    be written.
    """

    def __init__(self, path: Path, resume_step: int | None = None, report: Callable[[str], None] = log) -> None:
        self.path = path
        if resume_step is not None and path.is_file():
            _drop_lines(path, resume_step, report)
        self._file = open_to_append(path, report)

    def write(self, record: Record) -> None:
        """Append one record and flush it. Raises `StorageError` if it cannot be written."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every record was flushed; only a record that could not be written is left
            self._file.close()


def read_log(path: Path) -> list[Record]:
    """Return the records of a log, in order, without lines that are incomplete or damaged.

    A record is {"step": int, "loss_by_t": list, NAME: number}; values may be None. Raises `DataError` if there is no
    file to read.
    """
    return [record for _, record in _lines(path) if record is not None]


def read_log_thinned(path: Path, most: int) -> tuple[list[Record], int]:
    """Return about `most` records of a log at most, evenly spread and with the last two lines, and its number of lines.

    Only their lines are parsed, so a long log is read in little time; `read_log` says what a record is. Raises
    `DataError` if there is no file to read.
    """
    count = sum(1 for _ in _raw_lines(path))
    every = max(1, -(-count // most))
    lines = (line for i, (line, whole) in enumerate(_raw_lines(path)) if whole and (i % every == 0 or i >= count - 2))
    return [record for line in lines if (record := _record(line)) is not None], count


def _drop_lines(path: Path, resume_step: int, report: Callable[[str], None]) -> None:
    """Rewrite the log without the lines after `resume_step` and those that are damaged."""
    kept, damaged = [], 0
    try:
        for line, record in _lines(path):
            if record is not None and record["step"] <= resume_step:
                kept.append(line)
            # A short line without an end: a run was killed as it wrote it.
            damaged += record is None and (line.endswith(b"\n") or len(line) == _MAX_LINE_BYTES)
    except DataError as error:
        report(f"{error}; a new log begins, and the old one is {set_aside(path).name} beside it")
        return
    if damaged:
        before = set_aside(path)
        report(f"{damaged} damaged lines of {path} are left out; the file as it was is {before.name} beside it")
    write_whole(path, lambda temporary: temporary.write_bytes(b"".join(kept)))


def _lines(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """Yield each line with its record, None if it is damaged. Raises `DataError` if the file cannot be read."""
    for line, whole in _raw_lines(path):
        record = _record(line) if whole else None
        yield line if record is None or line.endswith(b"\n") else line + b"\n", record


def _raw_lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield each line, at most its first 64 KiB, and whether that is all of it. Raises `DataError` as `_lines` does."""
    try:
        with open_regular(path) as file:
            check_size(file, _MAX_BYTES)
            while line := file.readline(_MAX_LINE_BYTES):
                end = line
                while len(end) == _MAX_LINE_BYTES and not end.endswith(b"\n"):
                    end = file.readline(_MAX_LINE_BYTES)
                yield line, end is line
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path} cannot be read: {reason}") from error


def _record(line: bytes) -> Record | None:
    """Return the record of a line, or None if the line is not one."""
    try:
        value = parse_json(line, "a line")
    except DataError:
        return None
    if not isinstance(value, dict) or type(value.get("step")) is not int or not 0 <= value["step"] < 10**12:
        return None
    for name, field in value.items():
        items = field if name in _LISTS and field is not None else [field]
        if not isinstance(items, list) or not all(item is None or _is_number(item) for item in items):
            return None
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
