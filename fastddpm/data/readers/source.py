"""The encoded images that every reader yields, and rules for names, splits and classes that readers share."""

import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastddpm.data.image import SUFFIXES
from fastddpm.errors import DataError

EXTENSIONS = tuple(extension for extensions in SUFFIXES.values() for extension in extensions)
MAX_ENCODED_BYTES = 256 * 2**20
_SPLITS = frozenset({"train", "test", "val", "valid", "validation"})
_SPLIT = re.compile(r"(train|test|validation|valid|val)[-._]")


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


@dataclass(frozen=True)
class SplitSelection:
    """The images of a split, by their paths: the split's folder or None, numbers of class folders, image count."""

    split: str | None
    classes: dict[str, int]
    count: int

    def takes(self, path: PurePosixPath) -> bool:
        """Return whether the image at `path` belongs to the split."""
        return self.split is None or _top(path, 0) == self.split

    def label(self, path: PurePosixPath) -> int | None:
        """Return the class of an image of the split, None without classes."""
        return self.classes.get(_top(path, 0 if self.split is None else 1))


def choose(paths: Iterable[PurePosixPath], split: str, where: Path) -> SplitSelection:
    """Select the images of `split` among `paths`, which are iterated over once and not kept.

    If all images lie in folders named like splits (train, test, val, ..), only those in the folder `split` are
    selected; otherwise all are. Classes are the first-level folders, numbered in sorted order, if there are at least
    two and every image lies in one. Raises DataError if there is no image.
    """
    folders = Counter((_top(path, 0), _top(path, 1)) for path in paths)
    if not folders:
        raise DataError(f"{where} holds no images; files ending in {', '.join(EXTENSIONS)} are read")
    splits = {first for first, _ in folders}
    chosen: str | None = None
    if splits <= _SPLITS:
        chosen = split
        if split not in splits:
            raise DataError(f"{where} has no images in {split}/; it has {', '.join(sorted(splits))}")
        folders = Counter({key: count for key, count in folders.items() if key[0] == split})
    tops = {second if chosen else first for first, second in folders}
    labelled = len(tops) > 1 and "" not in tops
    classes = {name: i for i, name in enumerate(sorted(tops))} if labelled else {}
    return SplitSelection(chosen, classes, folders.total())


def _top(path: PurePosixPath, depth: int) -> str:
    """Return the name of the folder at `depth` in `path`, or "" if there is none."""
    return path.parts[depth] if len(path.parts) > depth + 1 else ""


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


def split_files(files: list[Path], split: str, folder: Path, ending: str) -> list[Path]:
    """Return the files of the split if any file is named by a split (train-00000.tar, test.parquet), else all files.

    Raises DataError if only other splits are there, or if the files lie in several folders.
    """
    folders = sorted({path.parent.name for path in files})
    if len(folders) > 1:
        raise DataError(f"{folder} has {ending} files in several folders; name one of {', '.join(folders)}")
    if not any(_SPLIT.match(path.name) for path in files):
        return files
    chosen = [path for path in files if (found := _SPLIT.match(path.name)) and found[1] == split]
    if not chosen:
        names = ", ".join(path.name for path in files[:10])
        raise DataError(f"{folder} has no {split}-*.{ending}; it has {names}")
    return chosen


def status_of(files: Iterable[Path]) -> list[Any]:
    """Return the names, sizes and modification times of a few files, for `ImageSource.listing`."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def read_file(path: Path, limit: int = MAX_ENCODED_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises ValueError if the file is larger than `limit` bytes or not a regular file, whose reading could block.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    check_size(status.st_size, limit)
    return path.read_bytes()


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
