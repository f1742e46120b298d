"""Labels from a list beside the images: dataset.json of EDM and StyleGAN, metadata.jsonl and .csv of Hugging Face."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fastddpm.errors import DataError
from fastddpm.storage.documents import MAX_JSON_BYTES, parse_json

from .layout import Note, SplitSelection
from .splits import listed

LABEL_FILES = ("dataset.json", "metadata.jsonl", "metadata.csv")
MAX_LIST_BYTES = 256 * 2**20
MAX_LISTS = 64  # label files that are remembered
_MAX_LINE_BYTES = 2**16
_MAX_ENTRY = 4096  # characters of [name, label]
_COLUMNS = ("label", "labels", "class")
_FILE_COLUMNS = ("file_name", "image")
_MAX_CLASSES = 2**31
_ENTRIES = re.compile(r'\s*\{\s*"labels"\s*:\s*\[\s*')
_SHOWN = 3


@dataclass(frozen=True)
class _List:
    """Labels by file name, numbers or names of classes; `labels` is None if the list has none."""

    labels: dict[str, int | str] | None

    def names(self) -> tuple[str, ...] | None:
        """Return the names of the classes, sorted; None if labels are numbers."""
        names = {label for label in (self.labels or {}).values() if isinstance(label, str)}
        return tuple(sorted(names)) or None

    def numbered(self, names: tuple[str, ...] | None, folder: PurePosixPath, where: Path) -> dict[str, int] | None:
        """Return the labels, by path below the data, as numbers, those in `names` for names."""
        if self.labels is None:
            return None
        order = {name: i for i, name in enumerate(names or ())}
        found: dict[str, int] = {}
        for name, label in self.labels.items():
            if isinstance(label, str) == (names is None):
                raise DataError(f"{where} has numbers and names as labels; use one of them")
            path = str(folder / name)
            if path in found:
                raise DataError(f"{where} lists {name} twice")
            found[path] = order[label] if isinstance(label, str) else label
        return found


def with_listed_labels(
    choice: SplitSelection,
    lists: Iterable[PurePosixPath],
    read: Callable[[PurePosixPath, int], bytes],
    paths: Callable[[], Iterable[PurePosixPath]],
    where: Path,
) -> SplitSelection:
    """Return the selection with the labels of a list in the split's folder or above; unchanged if there is no list.

    `lists`: paths of the files named like lists. `read`: returns a file of at most so many bytes, or raises ValueError
    or OSError. `paths`: iterates over all images. Raises DataError for two lists, a list that is damaged or too large,
    and if images or entries lack their counterpart.
    """
    base = choice.base
    lists = list(lists)
    above = [path for path in lists if path.parent.parts == base[: len(path.parent.parts)]]
    if not above:
        if not lists:
            return choice
        note = Note(-1, f"{lists[0]} is not read, because lists of labels are expected above the class folders")
        return replace(choice, notes=(*choice.notes, note))
    if len(above) > 1:
        raise DataError(f"{where} has several lists of labels: {', '.join(map(str, above))}; keep one of them")
    (file,) = above
    found = _read(file, read, where)
    if found is None:
        note = Note(-1, f"{file} gives no labels: it names no files, or has no column {', '.join(_COLUMNS)}")
        return replace(choice, notes=(*choice.notes, note))
    extra: list[str] = []
    names = found.names()
    if names is not None and choice.train_base is not None and len(file.parent.parts) >= len(choice.split_base):
        trained = PurePosixPath(*choice.train_base, *file.parts[len(choice.split_base) :])
        of_training = _read(trained, read, where) if trained in lists else None
        trained_names = (of_training.names() if of_training else None) or ()
        extra = sorted(set(names) - set(trained_names))
        names = trained_names
    numbers = None if extra else found.numbered(names, file.parent, where / file)
    split_base = max(choice.split_base, file.parent.parts, key=len)
    notes = [note for note in choice.notes if note.depth < len(split_base)]
    if extra:
        text = f"read without labels, because {file} has classes that the training split lacks: {listed(extra)}"
        notes.insert(0, Note(-1, text))
    else:
        notes.append(Note(-1, f"labels are those of {file}" if numbers else f"{file} has no labels"))
    chosen = SplitSelection(
        split_base, split_base, names if numbers else None, 0, tuple(notes), listed={} if numbers is None else numbers
    )
    return replace(chosen, count=_checked(chosen, paths(), where / file, labelled=numbers is not None))


def _read(file: PurePosixPath, read: Callable[[PurePosixPath, int], bytes], where: Path) -> _List | None:
    try:
        data = read(file, MAX_LIST_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{where / file} cannot be read: {error}") from error
    return _parsed(data, file.name, where / file)


def _checked(choice: SplitSelection, paths: Iterable[PurePosixPath], where: Path, *, labelled: bool) -> int:
    """Return the number of images of the split. Raises DataError for images or entries without counterpart."""
    assert choice.listed is not None
    count = 0
    unlisted: list[str] = []
    num_unlisted = 0
    seen: set[str] = set()
    for path in paths:
        taken = choice.takes(path)
        count += taken
        if str(path) in choice.listed:
            seen.add(str(path))
        elif taken and labelled:
            num_unlisted += 1
            if len(unlisted) < _SHOWN:
                unlisted.append(str(path))
    problems = []
    if num_unlisted:
        problems.append(f"{num_unlisted:,} images are not in it ({listed(unlisted, num_unlisted)})")
    num_missing = len(choice.listed) - len(seen)
    if num_missing:
        missing = [name for name in choice.listed if name not in seen][:_SHOWN]
        problems.append(f"{num_missing:,} of its entries have no image ({listed(missing, num_missing)})")
    if problems:
        raise DataError(f"{where} does not fit the images: {' and '.join(problems)}; mend the list or the images")
    return count


def _parsed(data: bytes, name: str, where: Path) -> _List | None:
    """Parse a list; None if it has no column of labels. Raises DataError if it is damaged."""
    if name == "dataset.json":
        return _dataset_json(data, where)
    rows = _json_rows(data, where) if name.endswith(".jsonl") else _csv_rows(data, where)
    labels: dict[str, int | str] = {}
    column: str | None = None
    file_column: str | None = None
    for number, row in enumerate(rows, 1):
        if number == 1:
            column = next((key for key in _COLUMNS if key in row), None)
            file_column = next((key for key in _FILE_COLUMNS if key in row), None)
        if column is None or file_column is None:
            return None
        file = row.get(file_column)
        if not isinstance(file, str) or not file:
            raise DataError(f"{where}: row {number} has no {file_column}")
        _add(labels, file, row.get(column), where)
    if name.endswith(".csv") and labels and all(re.fullmatch(r"\d{1,10}", str(label)) for label in labels.values()):
        labels = {file: int(label) for file, label in labels.items()}
    return _List(labels) if labels else None


def _add(labels: dict[str, int | str], file: str, label: Any, where: Path) -> None:
    if type(label) not in (int, str) or label == "" or (type(label) is int and not 0 <= label < _MAX_CLASSES):
        raise DataError(
            f"{where}: the label of {file[:200]!r} is {str(label)[:50]!r}; expected a number below 2^31, or the "
            "name of a class"
        )
    if file in labels:
        raise DataError(f"{where} lists {file[:200]!r} twice")
    labels[file] = label


def _dataset_json(data: bytes, where: Path) -> _List | None:
    """Read {"labels": [[name, label], ..]}, {"labels": {name: label, ..}} or {"labels": null}."""
    labels: dict[str, int | str] = {}
    if len(data) > MAX_JSON_BYTES:
        entries: Iterable[Any] = _streamed(data, where)
    else:
        document = parse_json(data, where)
        if not isinstance(document, dict) or not ("labels" in document or _by_name(document)):
            return None
        found = document.get("labels", document)
        if found is None:
            return _List(None)
        entries = found.items() if isinstance(found, dict) else found
        if isinstance(found, str) or not isinstance(found, (dict, list)):
            raise DataError(f"{where}: labels must be a list of [name, label]")
    for entry in entries:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            raise DataError(f"{where}: expected [name, label]; got {str(entry)[:100]}")
        _add(labels, str(PurePosixPath(entry[0])), entry[1], where)
    return _List(labels)


def _by_name(document: dict[str, Any]) -> bool:
    """Return whether a document is a table of labels by file name itself."""
    return bool(document) and all(type(label) is int for label in document.values())


def _streamed(data: bytes, where: Path) -> Iterator[Any]:
    """Yield the entries of {"labels": [[name, label], ..]}, one at a time, since parsed JSON is many times larger."""
    try:
        text = data.decode("utf-8")
        start = _ENTRIES.match(text)
        if start is None:
            raise ValueError(f'a file of more than {MAX_JSON_BYTES:,} bytes must begin with {{"labels": [')
        decoder, place = json.JSONDecoder(), start.end()
        separator = re.compile(r"\s*([,\]])\s*")
        while True:
            entry, length = decoder.raw_decode(text[place : place + _MAX_ENTRY])
            yield entry
            after = separator.match(text, place + length)
            if after is None:
                raise ValueError(f"no , or ] at character {place + length:,}")
            place = after.end()
            if after[1] == "]":
                break
        if not re.fullmatch(r"\s*\}\s*", text[place : place + 1000]):
            raise ValueError("labels must be its only key")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid: {error}") from error


def _json_rows(data: bytes, where: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(io.BytesIO(data), 1):
        if line.strip():
            if len(line) > _MAX_LINE_BYTES:
                raise DataError(f"{where}: line {number} has {len(line):,} bytes; at most {_MAX_LINE_BYTES:,} are read")
            row = parse_json(line, f"{where}, line {number}")
            if not isinstance(row, dict):
                raise DataError(f"{where}: line {number} is not an object")
            yield row


def _csv_rows(data: bytes, where: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV file; the csv module itself refuses fields of more than 128 KiB."""
    try:
        reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""), strict=True)
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise ValueError("a column is given twice")
        for row in reader:
            if row:
                if len(row) != len(header):
                    raise ValueError(f"line {reader.line_num} has {len(row)} fields; expected {len(header)}")
                yield dict(zip(header, row, strict=True))
    except (csv.Error, ValueError) as error:
        raise DataError(f"{where}: not valid CSV: {error}") from error
