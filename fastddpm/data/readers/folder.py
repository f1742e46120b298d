"""Read images from a folder and the folders below it, walked in order without keeping all names in memory."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

from fastddpm.errors import DataError

from .labels import LABEL_FILES, MAX_LISTS, with_listed_labels
from .layout import SplitSelection, choose
from .source import EncodedImage, ImageSource, is_hidden, is_image, left_alone, read_file

_NAMED_LINKS = 5
_MAX_LINKS = 10_000  # links to folders that are followed; links to links could lead to any number


@dataclass(frozen=True)
class _Entry:
    """A file, a folder to enter, a link that leads back (`is_loop`), or a folder that cannot be listed (`failure`).

    `path` is relative to the root.
    """

    path: PurePosixPath
    is_folder: bool = False
    is_loop: bool = False
    failure: OSError | None = None


def folder_source(folder: Path, split: str) -> ImageSource:
    """Return the images below `folder`, sorted by path, with the split and labels of `layout.choose`.

    Links to files and folders are followed, except those that lead back into a folder that holds them, which a note
    names. A list of labels (`labels.py`) replaces class folders. A folder that cannot be listed counts as an image that
    cannot be read. The folder is walked again for each purpose, so memory holds the names in one folder and its parents
    at a time. Raises DataError if there is no image.
    """
    others: Counter[str] = Counter()
    loops: list[str] = []
    lists: list[PurePosixPath] = []
    num_loops = num_failures = 0

    def images() -> Iterator[PurePosixPath]:
        nonlocal num_loops, num_failures
        for entry in _walk(folder):
            if entry.failure:
                num_failures += 1
            elif entry.is_loop:
                num_loops += 1
                if num_loops <= _NAMED_LINKS:
                    loops.append(str(entry.path))
            elif is_image(entry.path):
                yield entry.path
            elif entry.path.name in LABEL_FILES and len(lists) < MAX_LISTS:
                lists.append(entry.path)
            else:
                others[entry.path.suffix.lower()] += 1

    def all_images() -> Iterator[PurePosixPath]:
        return (entry.path for entry in _walk(folder) if _is_image(entry))

    choice = choose(images(), split, folder, others=others)
    choice = with_listed_labels(choice, lists, lambda path, limit: read_file(folder / path, limit), all_images, folder)
    notes = tuple(note.text for note in choice.notes) + left_alone(others)
    if num_loops:
        notes += (f"{num_loops} links lead back to a folder that holds them and are not followed: {', '.join(loops)}",)

    def items() -> Iterator[EncodedImage]:
        for entry in _chosen(folder, choice):
            if entry.failure:
                yield EncodedImage(str(entry.failure.filename), None, _failing(entry.failure))
            else:
                yield EncodedImage(str(entry.path), choice.label(entry.path), _reader(folder / entry.path))

    listing = [choice.count, num_failures, choice.classes, _digest(folder, choice, lists)]
    return ImageSource(str(folder), choice.count + num_failures, listing, items, notes, choice.classes)


def _walk(folder: Path) -> Iterator[_Entry]:
    """Yield everything below `folder` that is not hidden, in the order of sorted paths, following links to folders.

    Raises DataError for more than 10,000 links to folders.
    """
    stack = [_listed(folder, PurePosixPath())]
    above = [_identity(folder)]  # the folders that are being listed
    num_links = 0
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            above.pop()
        elif entry.is_folder:
            identity = _identity(folder / entry.path)
            if identity is not None and identity in above:
                yield _Entry(entry.path, is_loop=True)
                continue
            if os.path.islink(folder / entry.path):
                num_links += 1
                if num_links > _MAX_LINKS:
                    raise DataError(f"{folder} has more than {_MAX_LINKS:,} links to folders; replace links by folders")
            stack.append(_listed(folder, entry.path))
            above.append(identity)
        else:
            yield entry


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder, which are the same by every link; None if they cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _listed(folder: Path, here: PurePosixPath) -> Iterator[_Entry]:
    """Yield the content of a folder, sorted by name."""
    names: list[str] = []
    folders: set[str] = set()
    try:
        with os.scandir(folder / here) as found:
            for entry in found:
                if is_hidden(PurePosixPath(entry.name)):
                    continue
                names.append(entry.name)
                if _is_folder(entry):
                    folders.add(entry.name)
    except OSError as error:
        yield _Entry(here, failure=error)
        return
    names.sort()
    for name in names:
        yield _Entry(here / name, is_folder=name in folders)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: reading it as a file will raise the error
        return False


def _is_image(entry: _Entry) -> bool:
    return not (entry.failure or entry.is_loop) and is_image(entry.path)


def _chosen(folder: Path, choice: SplitSelection) -> Iterator[_Entry]:
    """Yield the images of the split, and the folders that cannot be listed."""
    for entry in _walk(folder):
        if entry.failure or (_is_image(entry) and choice.takes(entry.path)):
            yield entry


def _digest(folder: Path, choice: SplitSelection, lists: list[PurePosixPath]) -> str:
    """Return the sha256 over the names, sizes and modification times of the images and the lists of labels."""
    digest = hashlib.sha256()
    for entry in chain(map(_Entry, lists), _chosen(folder, choice)):
        try:
            if entry.failure:
                raise entry.failure
            status = os.stat(folder / entry.path)
            facts = f"{entry.path}\0{status.st_size}\0{status.st_mtime_ns}\0"
        except OSError as error:
            facts = f"{entry.path}\0{error.errno}\0"
        digest.update(facts.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _reader(path: Path) -> Callable[[], bytes]:
    return lambda: read_file(path)


def _failing(error: OSError) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error

    return read
