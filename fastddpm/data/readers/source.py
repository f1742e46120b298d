"""Encoded images, wherever they lie: what a reader of folders, archives or tables gives to the decoder."""

import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastddpm.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_ENCODED_BYTES = 256 * 2**20
_SPLITS = frozenset({"train", "test", "val", "valid", "validation"})
_SPLIT = re.compile(r"(train|test|validation|valid|val)[-._]")


@dataclass(frozen=True)
class EncodedImage:
    """One encoded image: a name for messages, its class or None, and how to read it (raises OSError, ValueError)."""

    name: str
    label: int | None
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ImageSource:
    """Images to decode: `items` yields `count` of them, in a fixed order.

    `listing` (of JSON values) changes when the files do. `notes` say what was seen and left alone.
    """

    name: str
    count: int
    listing: list[Any]
    items: Callable[[], Iterator[EncodedImage]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitSelection:
    """Which paths are images of the split, how many there are, and the number of each class."""

    split: str | None
    classes: dict[str, int]
    count: int

    def takes(self, path: PurePosixPath) -> bool:
        """Whether an image at `path` belongs to the split."""
        return self.split is None or _top(path, 0) == self.split

    def label(self, path: PurePosixPath) -> int | None:
        """The class of an image of the split."""
        return self.classes.get(_top(path, 0 if self.split is None else 1))


def choose(paths: Iterable[PurePosixPath], split: str, where: Path) -> SplitSelection:
    """What to take of the images at `paths`, which are read once and not kept.

    If all lie in folders named as splits are (train, test, val), only those of `split` count, else all do.
    Classes number the first-level folders in sorted order when there are at least two and every image lies in one.
    Raises DataError when there is no image.
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
    """The folder at `depth` that `path` lies in, or ""."""
    return path.parts[depth] if len(path.parts) > depth + 1 else ""


def is_image(path: PurePosixPath) -> bool:
    """Whether the name ends like an image's, in either case, and nothing on its path is hidden."""
    return path.suffix.lower() in EXTENSIONS and not is_hidden(path)


def is_hidden(path: PurePosixPath) -> bool:
    """Whether a part of the path starts with a dot, or is what macOS adds to zip files."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)


def left_alone(endings: Counter[str]) -> tuple[str, ...]:
    """A note about files that are not read because of their endings, or nothing."""
    if not endings:
        return ()
    kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in endings.most_common(5))
    return (f"{endings.total()} files are left alone, for only {', '.join(EXTENSIONS)} are read: {kinds}",)


def split_files(files: list[Path], split: str, folder: Path, ending: str) -> list[Path]:
    """The files of the split, where files are named by splits (train-00000.tar, test.parquet), else all of them.

    Raises DataError when there are only other splits, or files of one kind in several folders.
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
    """Names, sizes and times of a few files, for `Collection.listing`."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def read_file(path: Path, limit: int = MAX_ENCODED_BYTES) -> bytes:
    """The bytes of a regular file. Raises ValueError for another kind, whose reading could block, or a larger one."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    check_size(status.st_size, limit)
    return path.read_bytes()


def check_size(num_bytes: int, limit: int = MAX_ENCODED_BYTES) -> None:
    """Raises ValueError for an encoded image of more bytes than are read."""
    if num_bytes > limit:
        raise ValueError(f"{num_bytes:,} bytes; at most {limit:,} are read")
