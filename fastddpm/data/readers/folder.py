"""Read images from a folder and the folders below it, walked in order without keeping all names in memory."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .source import EncodedImage, ImageSource, SplitSelection, choose, is_hidden, is_image, left_alone, read_file

_NAMED_LINKS = 5


@dataclass(frozen=True)
class _Entry:
    """A file, a link to a folder, or a folder that cannot be listed (`failure`); `path` is relative to the root."""

    path: PurePosixPath
    is_link: bool = False
    failure: OSError | None = None


def folder_source(folder: Path, split: str) -> ImageSource:
    """Return the images below `folder`, sorted by path, with the split and labels of `source.choose`.

    Links to files are read; links to folders are not followed, and a note says so. A folder that cannot be listed
    counts as an image that cannot be read. The folder is walked again for each purpose, so memory holds the names in
    one folder and its parents at a time. Raises DataError if there is no image.
    """
    others: Counter[str] = Counter()
    links: list[str] = []
    num_links = num_failures = 0

    def images() -> Iterator[PurePosixPath]:
        nonlocal num_links, num_failures
        for entry in _walk(folder):
            if entry.failure:
                num_failures += 1
            elif entry.is_link:
                num_links += 1
                if num_links <= _NAMED_LINKS:
                    links.append(str(entry.path))
            elif is_image(entry.path):
                yield entry.path
            else:
                others[entry.path.suffix.lower()] += 1

    choice = choose(images(), split, folder)
    notes = left_alone(others)
    if num_links:
        notes += (f"{num_links} links to folders are not followed: {', '.join(links)}",)

    def items() -> Iterator[EncodedImage]:
        for entry in _chosen(folder, choice):
            if entry.failure:
                yield EncodedImage(str(entry.failure.filename), None, _failing(entry.failure))
            else:
                yield EncodedImage(str(entry.path), choice.label(entry.path), _reader(folder / entry.path))

    listing = [choice.count, num_failures, _digest(folder, choice)]
    return ImageSource(str(folder), choice.count + num_failures, listing, items, notes)


def _walk(folder: Path) -> Iterator[_Entry]:
    """Yield everything below `folder` that is not hidden, in the order of sorted paths."""
    stack = [_listed(folder, PurePosixPath())]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif isinstance(entry, PurePosixPath):
            stack.append(_listed(folder, entry))
        else:
            yield entry


def _listed(folder: Path, here: PurePosixPath) -> Iterator[_Entry | PurePosixPath]:
    """Yield the content of a folder, sorted by name: entries, and the paths of folders to enter."""
    names: list[str] = []
    folders: set[str] = set()
    links: set[str] = set()
    try:
        with os.scandir(folder / here) as found:
            for entry in found:
                if is_hidden(PurePosixPath(entry.name)):
                    continue
                names.append(entry.name)
                if _is_folder(entry):
                    (links if entry.is_symlink() else folders).add(entry.name)
    except OSError as error:
        yield _Entry(here, failure=error)
        return
    names.sort()
    for name in names:
        yield here / name if name in folders else _Entry(here / name, is_link=name in links)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: reading it as a file will raise the error
        return False


def _chosen(folder: Path, choice: SplitSelection) -> Iterator[_Entry]:
    """Yield the images of the split, and the folders that cannot be listed."""
    for entry in _walk(folder):
        if entry.failure or (not entry.is_link and is_image(entry.path) and choice.takes(entry.path)):
            yield entry


def _digest(folder: Path, choice: SplitSelection) -> str:
    """Return the sha256 over the names, sizes and modification times of the images."""
    digest = hashlib.sha256()
    for entry in _chosen(folder, choice):
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
