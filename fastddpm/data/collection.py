"""Encoded images, wherever they lie: what a reader of folders, zip files or parquet gives to the decoder."""

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


@dataclass(frozen=True)
class Item:
    """One encoded image: a name for messages, its class or None, and how to read it (raises OSError, ValueError)."""

    name: str
    label: int | None
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Collection:
    """Images to decode: `items` yields `count` of them, in a fixed order.

    `listing` (of JSON values) changes when the files do. `notes` say what was seen and left alone.
    """

    name: str
    count: int
    listing: list[Any]
    items: Callable[[], Iterator[Item]]
    notes: tuple[str, ...] = ()


def is_image(path: PurePosixPath) -> bool:
    """Whether the name ends like an image's, in either case, and nothing on its path is hidden."""
    return path.suffix.lower() in EXTENSIONS and not is_hidden(path)


def is_hidden(path: PurePosixPath) -> bool:
    """Whether a part of the path starts with a dot, or is what macOS adds to zip files."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)


def left_alone(paths: Iterable[PurePosixPath]) -> tuple[str, ...]:
    """A note about files that are not read because of their names, or nothing."""
    endings = Counter(path.suffix.lower() or "without ending" for path in paths)
    if not endings:
        return ()
    kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
    return (f"{endings.total()} files are left alone, for only {', '.join(EXTENSIONS)} are read: {kinds}",)


def choose(paths: Iterable[PurePosixPath], split: str, where: Path) -> list[tuple[PurePosixPath, int | None]]:
    """The images of the split, sorted by path, each with its label.

    If all lie in folders named as splits are (train, test, val), only those of `split` count, else all do.
    Labels number the first-level folders in sorted order when there are at least two and every image lies in one.
    Raises DataError when there is no image.
    """
    chosen = sorted(paths)
    if not chosen:
        raise DataError(f"{where} holds no images; files ending in {', '.join(EXTENSIONS)} are read")
    depth = 0
    if _tops(chosen, 0) <= _SPLITS:
        chosen, splits, depth = [path for path in chosen if path.parts[0] == split], _tops(chosen, 0), 1
        if not chosen:
            raise DataError(f"{where} has no images in {split}/; it has {', '.join(sorted(splits))}")
    classes = {name: i for i, name in enumerate(sorted(_tops(chosen, depth)))}
    if len(classes) < 2 or "" in classes:
        return [(path, None) for path in chosen]
    return [(path, classes[path.parts[depth]]) for path in chosen]


def _tops(paths: list[PurePosixPath], depth: int) -> set[str]:
    """The folders at `depth` that the images lie in; "" for those that lie in none."""
    return {path.parts[depth] if len(path.parts) > depth + 1 else "" for path in paths}


def read_file(path: Path, limit: int = MAX_ENCODED_BYTES) -> bytes:
    """The bytes of a regular file. Raises ValueError for another kind, whose reading could block, or a larger one."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > limit:
        raise ValueError(f"{status.st_size:,} bytes; at most {limit:,} are read")
    return path.read_bytes()
