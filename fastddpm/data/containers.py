"""Collections of encoded images: folders, zip files, parquet tables."""

import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastddpm.errors import DataError, UsageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_MAX_ENCODED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Item:
    """One encoded image: a name for messages, its class or None, and how to read it (raises OSError, ValueError)."""

    name: str
    label: int | None
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Collection:
    """Images to decode. `listing` changes when the files do; `items` yields `count` of them, in a fixed order."""

    name: str
    count: int
    listing: list[Any]
    items: Callable[[], Iterator[Item]]


def folder_collection(folder: Path) -> Collection:
    """All images below `folder`, sorted by path. Classes are the first-level folders when every image lies in one.

    Linked folders are not followed. Raises DataError when there is no image.
    """
    paths: list[Path] = []
    for directory, subdirectories, names in os.walk(folder, followlinks=False):
        subdirectories.sort()
        paths += [Path(directory) / name for name in names if _is_image_name(name)]
    relative = sorted(PurePosixPath(path.relative_to(folder).as_posix()) for path in paths)
    if not relative:
        raise DataError(f"{folder} holds no images; files ending in {', '.join(EXTENSIONS)} are read")
    labels = _labels(relative)
    listing = []
    for path in relative:
        try:
            status = (folder / path).stat()
            listing.append([str(path), status.st_size, status.st_mtime_ns])
        except OSError:
            listing.append([str(path), -1, -1])

    def items() -> Iterator[Item]:
        for path in relative:
            yield Item(str(path), labels.get(path), _file_reader(folder / path))

    return Collection(str(folder), len(relative), listing, items)


def zip_collection(path: Path) -> Collection:
    """All images in a zip file, by the same rules as a folder; members are read in memory, never extracted."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} cannot be read as a zip file: {error}") from error
    members = {
        PurePosixPath(info.filename): info
        for info in archive.infolist()
        if not info.is_dir() and _is_image_name(PurePosixPath(info.filename).name) and "__MACOSX" not in info.filename
    }
    if not members:
        raise DataError(f"{path} holds no images; members ending in {', '.join(EXTENSIONS)} are read")
    names = sorted(members)
    labels = _labels(names)

    def reader(info: zipfile.ZipInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            if info.file_size > _MAX_ENCODED_BYTES:
                raise ValueError(f"{info.file_size:,} bytes unpacked; at most {_MAX_ENCODED_BYTES:,} are read")
            try:
                return archive.read(info)
            except (
                RuntimeError,
                NotImplementedError,
                zipfile.BadZipFile,
            ) as error:  # encrypted, unknown method, damaged
                raise ValueError(str(error)) from error

        return read

    def items() -> Iterator[Item]:
        for name in names:
            yield Item(str(name), labels.get(name), reader(members[name]))

    status = path.stat()
    return Collection(str(path), len(names), [status.st_size, status.st_mtime_ns], items)


def parquet_collection(files: list[Path]) -> Collection:
    """Rows of parquet files in the Hugging Face layout: `img` or `image` (struct{bytes} or bytes), perhaps `label`."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError("reading parquet needs pyarrow: pip install 'fastddpm[parquet]'") from error
    try:
        tables = [parquet.ParquetFile(path) for path in files]
    except Exception as error:  # pyarrow's own errors, OSError
        raise DataError(f"{files[0].parent} cannot be read as parquet: {error}") from error
    columns = tables[0].schema_arrow.names
    image_column = next((name for name in ("img", "image") if name in columns), None)
    if image_column is None:
        raise DataError(f"{files[0]} has columns {', '.join(columns)}; images are expected in img or image")
    label_column = next((name for name in ("label", "labels") if name in columns), None)
    wanted = [image_column] + ([label_column] if label_column else [])

    def items() -> Iterator[Item]:
        for path, table in zip(files, tables, strict=True):
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                images = batch.column(image_column).to_pylist()
                labels = batch.column(label_column).to_pylist() if label_column else [None] * len(images)
                for image, label in zip(images, labels, strict=True):
                    yield Item(f"{path.name} row {row}", label, _row_reader(image))
                    row += 1

    listing = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    name = str(files[0] if len(files) == 1 else files[0].parent)
    return Collection(name, sum(table.metadata.num_rows for table in tables), listing, items)


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _labels(paths: list[PurePosixPath]) -> dict[PurePosixPath, int]:
    if any(len(path.parts) < 2 for path in paths):
        return {}
    classes = {name: i for i, name in enumerate(sorted({path.parts[0] for path in paths}))}
    return {path: classes[path.parts[0]] for path in paths}


def _file_reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        if not path.is_file():  # a pipe or a device would block
            raise ValueError("not a regular file")
        if path.stat().st_size > _MAX_ENCODED_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes; at most {_MAX_ENCODED_BYTES:,} are read")
        return path.read_bytes()

    return read


def _row_reader(value: Any) -> Callable[[], bytes]:
    def read() -> bytes:
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("the row holds no bytes")
        return data

    return read
