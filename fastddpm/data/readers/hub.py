"""Read data sets of the Hugging Face hub by name. The `datasets` library is imported only when it is used."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError, UsageError

from .source import EncodedImage, ImageSource, check_size, read_file
from .splits import any_split_kind

PREFIX = "hf:"
_IMAGES = ("image", "img")
_LABELS = ("label", "labels")


def hub_source(source: str, split: str) -> ImageSource:
    """Return the images of "hf:NAME" or "hf:NAME:SPLIT", in the data set's order, with its integer labels if any.

    The library downloads the data set if it is not cached; nothing else in fastddpm downloads. Raises UsageError if
    the library or the name is missing, and DataError if the data set cannot be loaded or has no image column.
    """
    name, _, named = source.removeprefix(PREFIX).partition(":")
    if split == "test" and named and any_split_kind(re.split(r"[^\w]", named)[0]) not in ("test", "val"):
        raise UsageError(f"{source} names the split {named}, which is not test; leave out :{named} or --split test")
    split = named or split
    if not name:
        raise UsageError(f"{source!r} names no data set: hf:NAME or hf:NAME:SPLIT, as in hf:uoft-cs/cifar10:train")
    try:
        import datasets
    except ImportError as error:
        raise UsageError("data sets of the hub need datasets: pip install 'fastddpm[hf]'") from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library and its dependencies raise many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"datasets cannot load {name!r}, split {split!r}: {reason}") from error
    image = next((column for column in _IMAGES if column in table.column_names), None)
    if image is None:
        columns = ", ".join(table.column_names)
        raise DataError(f"{source} has columns {columns}; images are expected in the column image or img")
    label = next((column for column in _LABELS if column in table.column_names), None)
    table = table.select_columns([image, *([label] if label else [])])
    table = table.cast_column(image, datasets.Image(decode=False))

    def items() -> Iterator[EncodedImage]:
        for number, row in enumerate(table):
            yield EncodedImage(f"row {number}", _class(row.get(label)), _reader(row[image]))

    return ImageSource(source, len(table), [str(table._fingerprint), split], items, classes=_names(table, label))


def _names(table: Any, label: str | None) -> tuple[str, ...] | None:
    """Return the names of the classes, None if the data set has none."""
    names = getattr((getattr(table, "features", None) or {}).get(label), "names", None)
    return tuple(map(str, names)) if names else None


def _class(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _reader(value: Any) -> Callable[[], bytes]:
    def read() -> bytes:
        if not isinstance(value, dict) or (value.get("bytes") is None and not value.get("path")):
            raise ValueError("the row is empty")
        data = value.get("bytes")
        if data is None:
            return read_file(Path(value["path"]))
        check_size(len(data))
        return bytes(data)

    return read
