"""Images in a folder and the folders below it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .collection import Collection, Item, choose, is_hidden, is_image, left_alone, read_file


def folder_collection(folder: Path, split: str) -> Collection:
    """All images below `folder`; `collection.choose` tells which, in which order and with which labels.

    Links to files are read; links to folders are not followed, and a note says so. A folder that cannot be
    listed counts as an image that cannot be read. Raises DataError when there is no image.
    """
    files, links, failures = _walk(folder)
    images = choose([path for path in files if is_image(path)], split, folder)
    notes = left_alone(path for path in files if not is_image(path))
    if links:
        notes += (f"{len(links)} links to folders are not followed: {', '.join(map(str, links[:5]))}",)

    def items() -> Iterator[Item]:
        for error in failures:
            yield Item(str(error.filename), None, _failing(error))
        for path, label in images:
            yield Item(str(path), label, _reader(folder / path))

    listing = [_status(folder, path) for path, _ in images]
    listing += [[str(error.filename), error.errno, 0] for error in failures]
    return Collection(str(folder), len(listing), listing, items, notes)


def _walk(folder: Path) -> tuple[list[PurePosixPath], list[PurePosixPath], list[OSError]]:
    """Files and links to folders, relative to `folder` and none of them hidden, and folders that cannot be listed."""
    files: list[PurePosixPath] = []
    links: list[PurePosixPath] = []
    failures: list[OSError] = []
    for directory, subfolders, names in os.walk(folder, onerror=failures.append):
        here = PurePosixPath(Path(directory).relative_to(folder).as_posix())
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(PurePosixPath(name)))
        links += [here / name for name in subfolders if os.path.islink(os.path.join(directory, name))]
        files += [here / name for name in names if not is_hidden(PurePosixPath(name))]
    return files, links, failures


def _status(folder: Path, path: PurePosixPath) -> list[Any]:
    try:
        status = (folder / path).stat()
    except OSError as error:
        return [str(path), error.errno, 0]
    return [str(path), status.st_size, status.st_mtime_ns]


def _reader(path: Path) -> Callable[[], bytes]:
    return lambda: read_file(path)


def _failing(error: OSError) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error

    return read
