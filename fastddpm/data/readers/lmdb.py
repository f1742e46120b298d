"""LSUN as distributed: an LMDB of WebP files. lmdb is imported only here, and only when it is used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError, UsageError

from .source import MAX_ENCODED_BYTES, EncodedImage, ImageSource, check_size, status_of

FILE = "data.mdb"


def lmdb_file(path: Path) -> Path | None:
    """The file of an LMDB that `path` names, itself or as a folder with data.mdb in it; None if it is none."""
    if path.is_dir():
        return path / FILE if (path / FILE).is_file() else None
    return path if path.suffix.lower() in (".mdb", ".lmdb") else None


def lmdb_source(file: Path) -> ImageSource:
    """All values of an LMDB, in the order of their keys; no labels. Nothing is written, not even a lock.

    It is opened anew for each purpose: an environment must not be shared between processes. Raises UsageError without
    the lmdb library and DataError for another file. The library trusts what it reads: a file made to harm it may crash
    the process.
    """
    environment = _opened(file)
    try:
        count = environment.stat()["entries"]
    finally:
        environment.close()
    name = str(file.parent if file.name == FILE else file)

    def items() -> Iterator[EncodedImage]:
        import lmdb

        environment = _opened(file)
        try:
            with environment.begin(buffers=True) as transaction, transaction.cursor() as cursor:
                for key, value in cursor:
                    yield _item(bytes(key), value)
        except lmdb.Error as error:
            raise DataError(f"{name} is damaged: {error}") from error
        finally:
            environment.close()

    return ImageSource(name, count, status_of([file]), items)


def _opened(file: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UsageError("reading LSUN's LMDB needs lmdb: pip install 'fastddpm[lmdb]'") from error
    try:
        return lmdb.open(
            str(file), subdir=False, readonly=True, create=False, lock=False, readahead=False, max_readers=1
        )
    except lmdb.Error as error:
        raise DataError(f"{file} cannot be read as LMDB: {error}") from error


def _item(key: bytes, value: memoryview) -> EncodedImage:
    """An image; its bytes are copied now, for the memory map moves on."""
    name = key.decode("ascii", "backslashreplace")
    size = len(value)
    data = bytes(value) if size <= MAX_ENCODED_BYTES else b""

    def read() -> bytes:
        check_size(size)
        return data

    return EncodedImage(name, None, read)
