"""Read LSUN as distributed: an LMDB of WebP files. The `lmdb` library is imported only when it is used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError, UsageError

from .lmdb_pages import read_meta, verify
from .source import MAX_ENCODED_BYTES, EncodedImage, ImageSource, check_regular, check_size, status_of

FILE = "data.mdb"


def lmdb_file(path: Path) -> Path | None:
    """Return the LMDB file that `path` names, itself or as a folder with data.mdb; None if it is not an LMDB."""
    if path.is_dir():
        return path / FILE if (path / FILE).is_file() else None
    return path if path.suffix.lower() in (".mdb", ".lmdb") else None


def lmdb_source(file: Path) -> ImageSource:
    """Return all values of an LMDB, in the order of their keys, without labels. Nothing is written, not even a lock.

    The file is opened again for each purpose, because an LMDB environment must not be shared between processes. Raises
    UsageError if the lmdb library is missing, and DataError if the file is not an LMDB, damaged or cut short. The
    library trusts the file, so that all pages but the values' are verified first.
    """
    environment = _opened(file, whole=True)
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


def _opened(file: Path, *, whole: bool = False) -> Any:
    """Open the environment, with `whole` after verifying all pages that lead to the values."""
    try:
        import lmdb
    except ImportError as error:
        raise UsageError("reading LSUN's LMDB needs lmdb: pip install 'fastddpm[lmdb]'") from error
    check_regular(file)
    meta = read_meta(file)
    if meta is not None and whole:  # otherwise the library says what is wrong
        verify(file, meta)
    try:
        return lmdb.open(
            str(file), subdir=False, readonly=True, create=False, lock=False, readahead=False, max_readers=1
        )
    except lmdb.Error as error:
        raise DataError(f"{file} cannot be read as LMDB: {error}") from error


def _item(key: bytes, value: memoryview) -> EncodedImage:
    """Return an image, copying its bytes, because `value` is valid only until the cursor moves on."""
    name = key.decode("ascii", "backslashreplace")
    size = len(value)
    data = bytes(value) if size <= MAX_ENCODED_BYTES else b""

    def read() -> bytes:
        check_size(size, MAX_ENCODED_BYTES)
        return data

    return EncodedImage(name, None, read)
