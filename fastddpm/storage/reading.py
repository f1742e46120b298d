"""Read files that may be damaged, forged or no files at all: regular files only, of bounded size. Imports no torch."""

import contextlib
import math
import os
import stat
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastddpm.errors import DataError

if TYPE_CHECKING:
    import numpy as np

_STORED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes; the others unpack without a bound on memory


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading. Raises `OSError`, and `ValueError` for a pipe, a device or a directory.

    Opening or reading those could block or never end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        yield file


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn `OSError` and `ValueError` inside the block into a `DataError` that names the file.

    A missing file stays `FileNotFoundError`, which callers answer in their own words.
    """
    try:
        yield
    except (FileNotFoundError, DataError):
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file. Raises `OSError`, and `ValueError` if it has more than `limit` bytes."""
    with open_regular(path) as file:
        return file.read(check_size(file, limit))


def check_size(file: BinaryIO, limit: int) -> int:
    """Return the bytes of an open file. Raises `ValueError` if it has more than `limit`."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise ValueError(f"{size:,} bytes; at most {limit:,} are read")
    return size


def read_arrays(path: Path, names: Collection[str], limit: int) -> "dict[str, np.ndarray]":
    """Return the arrays `names` of an .npz that may be damaged; those of at most `limit` bytes together are unpacked.

    No pickled objects are read. Raises `FileNotFoundError` if there is no file, and `DataError` for anything that
    cannot be read: a damaged archive, a missing array, or more bytes than `limit`.
    """
    import numpy as np

    with _archive(path) as (file, archive):
        size = 0
        for name in names:
            shape, dtype, num_bytes = _header(archive, name)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != num_bytes:
                raise ValueError(f"{name} is not {dtype} {shape} of {num_bytes:,} bytes")
            size += num_bytes
        if size > limit:
            raise ValueError(f"its arrays take {size:,} bytes; at most {limit:,} are read")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}


def read_headers(path: Path, names: Collection[str]) -> "dict[str, tuple[tuple[int, ...], np.dtype]]":
    """Return shape and dtype of those of the arrays `names` that an .npz holds. Raises as `read_arrays` does."""
    with _archive(path) as (_, archive):
        present = set(archive.namelist())
        return {name: _header(archive, name)[:2] for name in names if f"{name}.npy" in present}


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[tuple[BinaryIO, zipfile.ZipFile]]:
    """Open an .npz. Turns any error inside the block into `DataError`, except that there is no file."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield file, archive
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged directory or header can raise nearly anything
        raise DataError(f"{path} cannot be read ({_reason(error)})") from error


def _header(archive: zipfile.ZipFile, name: str) -> "tuple[tuple[int, ...], np.dtype, int]":
    """Return shape, dtype and number of bytes of an array, whose data are not read."""
    import numpy as np

    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in _STORED:
        raise ValueError(f"{member.filename} is compressed by method {member.compress_type}")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        return shape, dtype, member.file_size - file.tell()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}" if str(error) else type(error).__name__
