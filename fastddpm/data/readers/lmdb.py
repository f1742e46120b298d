"""Read LSUN as distributed: an LMDB of WebP files. The `lmdb` library is imported only when it is used."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError, UsageError

from .source import MAX_ENCODED_BYTES, EncodedImage, ImageSource, check_regular, check_size, status_of

FILE = "data.mdb"
# A file begins with two meta pages; the one of the later transaction holds. After the header of a page (16 bytes):
# magic, version, address, map size, two databases of 48 bytes, of which the first begins with the page size, last page,
# transaction.
_META = struct.Struct("<16x I I 8x 8x I 44x 48x Q Q")
_MAGIC = 0xBEEFC0DE
_PAGE_SIZES = tuple(2**i for i in range(8, 17))


def lmdb_file(path: Path) -> Path | None:
    """Return the LMDB file that `path` names, itself or as a folder with data.mdb; None if it is not an LMDB."""
    if path.is_dir():
        return path / FILE if (path / FILE).is_file() else None
    return path if path.suffix.lower() in (".mdb", ".lmdb") else None


def lmdb_source(file: Path) -> ImageSource:
    """Return all values of an LMDB, in the order of their keys, without labels. Nothing is written, not even a lock.

    The file is opened again for each purpose, because an LMDB environment must not be shared between processes. Raises
    UsageError if the lmdb library is missing, and DataError if the file is not an LMDB or is cut short. The library
    trusts the file: a malicious one may crash the process.
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
    check_regular(file)
    _check_length(file)
    try:
        return lmdb.open(
            str(file), subdir=False, readonly=True, create=False, lock=False, readahead=False, max_readers=1
        )
    except lmdb.Error as error:
        raise DataError(f"{file} cannot be read as LMDB: {error}") from error


def _check_length(file: Path) -> None:
    """Raise DataError if the file is shorter than its pages, because the library would crash when it reads beyond."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            first = opened.read(_META.size)
            if len(first) < _META.size or _META.unpack(first)[0] != _MAGIC:
                return  # not an LMDB: the library says so
            page_size = _META.unpack(first)[2]
            if page_size not in _PAGE_SIZES:
                raise DataError(f"{file} is damaged: its page size is {page_size:,} bytes")
            opened.seek(page_size)
            second = opened.read(_META.size)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    metas = [_META.unpack(data) for data in (first, second) if len(data) == _META.size]
    _, _, _, last_page, _ = max((meta for meta in metas if meta[0] == _MAGIC), key=lambda meta: meta[4])
    expected = (last_page + 1) * page_size
    if size < expected:
        raise DataError(
            f"{file} is cut short: it has {size:,} bytes of the {expected:,} that its last page needs; copy it again"
        )


def _item(key: bytes, value: memoryview) -> EncodedImage:
    """Return an image, copying its bytes, because `value` is valid only until the cursor moves on."""
    name = key.decode("ascii", "backslashreplace")
    size = len(value)
    data = bytes(value) if size <= MAX_ENCODED_BYTES else b""

    def read() -> bytes:
        check_size(size, MAX_ENCODED_BYTES)
        return data

    return EncodedImage(name, None, read)
