"""Read CIFAR-10 as its authors distribute it: Python or binary batches, in a directory or a tar.gz."""

import gzip
import io
import itertools
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from fastddpm.errors import DataError

from .pickles import read_pickle
from .source import read_file
from .tar import Tar

IMAGE_SIZE = 32
_PIXELS = 3 * IMAGE_SIZE * IMAGE_SIZE
_MAX_BATCH_BYTES = 64 * 2**20  # a batch is 31 MB
_MAX_TAR_BYTES = 512 * 2**20  # the unpacked archive is 186 MB
_MAX_PADDING = 2**20
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_BATCH = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")

Batches = dict[str, Callable[[], bytes]]
"""CIFAR-10's batch files: a function that reads the file, by its name."""


def find_batches(source: Path) -> Batches | None:
    """Find CIFAR-10's batch files at `source`; return None if `source` is something else.

    Raises DataError if `source` is a .tar.gz without batch files, or damaged.
    """
    if source.is_dir():
        for folder in (source, *(source / name for name in _FOLDERS)):
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            files = {path.name: path for path in paths if _BATCH.fullmatch(path.name)}
            if files:
                return {name: _file_reader(path) for name, path in files.items()}
        return None
    name = source.name.lower()
    if name.endswith((".tar.gz", ".tgz")) or (name.endswith(".tar") and _starts_with_a_batch(source)):
        return _tar_batches(source)
    return None


def read_batches(batches: Batches, split: str, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) of the split "train" or "test".

    Raises DataError if a batch file is missing or damaged.
    """
    suffix = ".bin" if any(name.endswith(".bin") for name in batches) else ""
    stems = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    wanted = [stem + suffix for stem in stems]
    missing = [name for name in wanted if name not in batches]
    if missing:
        raise DataError(f"{source} lacks {', '.join(missing)}; {split} images of CIFAR-10 are in {', '.join(wanted)}")
    parse = _parse_binary if suffix else _parse_pickle
    parts = [parse(batches[name](), f"{source}: {name}") for name in wanted]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _file_reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return read_file(path, _MAX_BATCH_BYTES)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise DataError(f"{path} cannot be read: {error}") from error

    return read


class _Unpadded(io.RawIOBase):
    """A stream that raises OSError after _MAX_PADDING zeros that are read one by one, as gzip skips zeros at its end.

    A file that grew to gigabytes of zeros would otherwise take hours.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._zeros = file, 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._zeros = self._zeros + 1 if data == b"\0" else 0
        if self._zeros > _MAX_PADDING:
            raise OSError(f"more than {_MAX_PADDING:,} zeros follow its end")
        return data


class _Bounded(io.RawIOBase):
    """A stream that raises OSError after _MAX_TAR_BYTES, which bounds all that headers and members can unpack to."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, _MAX_TAR_BYTES

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {_MAX_TAR_BYTES:,} bytes")
        return data


def _starts_with_a_batch(source: Path) -> bool:
    """Return whether a batch is among the first 8 members; CIFAR-10 has eight files."""
    try:
        return any(_BATCH.fullmatch(member.path.name) for member in itertools.islice(Tar(source).members(), 8))
    except DataError:
        return False  # the tar reader will raise the same error


def _tar_batches(source: Path) -> Batches:
    """Read the batches of a tar file into memory.

    Nothing is extracted, so members' paths and links cannot reach other files.
    """
    found: dict[str, bytes] = {}
    try:
        with source.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = _Bounded(gzip.GzipFile(fileobj=_Unpadded(raw)) if packed else raw)  # type: ignore[arg-type]
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    if member.isreg() and _BATCH.fullmatch(Path(member.name).name):
                        found[Path(member.name).name] = _member(archive, member, source)
            while stream.read(2**20):  # to the end, where gzip verifies its checksum
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source} cannot be read as a tar file: {error}") from error
    if not found:
        raise DataError(f"{source} holds no CIFAR-10 batch (data_batch_1, ..); for other images make it a .tar or .zip")
    return {name: (lambda data=data: data) for name, data in found.items()}  # type: ignore[misc]


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, source: Path) -> bytes:
    if member.size > _MAX_BATCH_BYTES:
        raise DataError(f"{source}: {member.name} has {member.size:,} bytes; a batch has at most {_MAX_BATCH_BYTES:,}")
    file = archive.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


def _parse_binary(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if len(data) % (1 + _PIXELS):
        raise DataError(f"{where}: {len(data)} bytes are not whole records of {1 + _PIXELS}; it is truncated")
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return _checked(records[:, 1:], records[:, 0].astype(np.int64), where)


def _parse_pickle(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = read_pickle(data)
        pixels, labels = np.asarray(batch["data"]), batch["labels"]
        if isinstance(labels, list):
            if not all(type(label) is int for label in labels):  # nested lists of references could unfold to any size
                raise ValueError("labels are not integers")
            labels = np.array(labels, dtype=np.int64)
        return _checked(pixels, np.asarray(labels), where)
    except DataError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise DataError(f"{where} is not a CIFAR-10 batch of arrays and lists: {error or type(error)}") from error


def _checked(pixels: np.ndarray, labels: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) of a batch. Raises DataError if they are invalid."""
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        raise DataError(f"{where}: data must be uint8 (N, {_PIXELS}), N > 0; got {pixels.dtype} {pixels.shape}")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{where}: labels must be {len(pixels)} integers in 0..9")
    return pixels.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), labels.astype(np.int64)
