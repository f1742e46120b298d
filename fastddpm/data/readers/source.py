"""The encoded images that every reader yields, and rules for names and sizes of files that readers share."""

import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastddpm.data.image import SUFFIXES
from fastddpm.errors import DataError
from fastddpm.storage.reading import read_bytes

EXTENSIONS = tuple(extension for extensions in SUFFIXES.values() for extension in extensions)
MAX_ENCODED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class EncodedImage:
    """One encoded image: `name` for messages, class `label` or None, and `read`, which raises OSError or ValueError."""

    name: str
    label: int | None
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ImageSource:
    """The encoded images of a source: `items()` yields `count` of them, in a fixed order.

    `listing`: JSON values that change when the files do, for the cache's key. `notes`: lines about files that were
    seen but are not read. `classes`: names of the classes, in the order of their labels; None if there are none, or if
    labels are numbers without names.
    """

    name: str
    count: int
    listing: list[Any]
    items: Callable[[], Iterator[EncodedImage]]
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


def is_image(path: PurePosixPath) -> bool:
    """Return whether the name has an image's extension, in any case, and no part of the path is hidden."""
    return path.suffix.lower() in EXTENSIONS and not is_hidden(path)


def is_hidden(path: PurePosixPath) -> bool:
    """Return whether a part of the path starts with a dot, or is __MACOSX, which macOS adds to zip files."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)


def left_alone(endings: Counter[str]) -> tuple[str, ...]:
    """Return a note about the files that are not read because of their extensions; empty without any."""
    if not endings:
        return ()
    return (f"{endings.total()} files are not read, because only {', '.join(EXTENSIONS)} are: {counted(endings)}",)


def counted(endings: Counter[str]) -> str:
    """Return the five most frequent extensions with their numbers, as in "4 .txt, 1 without extension"."""
    shown = ", ".join(
        f"{count} {ending if ending.isprintable() else repr(ending)}" if ending else f"{count} without extension"
        for ending, count in endings.most_common(5)
    )
    return shown + (", .." if len(endings) > 5 else "")


def status_of(files: Iterable[Path]) -> list[Any]:
    """Return the names, sizes and modification times of a few files, for `ImageSource.listing`."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def read_file(path: Path, limit: int = MAX_ENCODED_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises ValueError if the file is larger than `limit` bytes or not a regular file, whose reading could block.
    """
    return read_bytes(path, limit)


def check_regular(path: Path) -> None:
    """Raise DataError if `path` is not a regular file, because opening a pipe or a device could block or never end."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not regular:
        raise DataError(f"{path} is not a regular file; remove it, or replace it by the file that belongs there")


def check_size(num_bytes: int, limit: int = MAX_ENCODED_BYTES) -> None:
    """Raise ValueError if an encoded image has more than `limit` bytes."""
    if num_bytes > limit:
        raise ValueError(f"{num_bytes:,} bytes; at most {limit:,} are read")
