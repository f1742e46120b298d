"""CIFAR-10 as its authors distribute it: Python batches or binary batches, in a directory or a tar.gz."""

import io
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import DataError

IMAGE_SIZE = 32
_PIXELS = 3 * IMAGE_SIZE * IMAGE_SIZE
_MAX_BATCH_BYTES = 256 * 2**20
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_BATCH = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")

# What a pickled NumPy array and the strings beside it are made of; nothing else is ever called.
_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): __import__("codecs").encode,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of arrays, numbers, strings, lists and dictionaries; refuses any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def find_batches(source: Path) -> dict[str, Callable[[], bytes]] | None:
    """CIFAR-10's batch files by name, each with how to read it; None if `source` is something else."""
    if source.is_dir():
        for folder in (source, *(source / name for name in _FOLDERS)):
            files = {path.name: path for path in _listed(folder) if _BATCH.fullmatch(path.name)}
            if files:
                return {name: _reader(path) for name, path in files.items()}
        return None
    if source.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _tar_batches(source)
    return None


def read_batches(batches: dict[str, Callable[[], bytes]], split: str, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of "train" or "test"; DataError for a damaged set."""
    suffix = ".bin" if any(name.endswith(".bin") for name in batches) else ""
    wanted = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    missing = [name + suffix for name in wanted if name + suffix not in batches]
    if missing:
        raise DataError(f"{source} lacks {', '.join(missing)}; a whole CIFAR-10 has {', '.join(wanted)}")
    read = _parse_binary if suffix else _parse_pickle
    parts = [read(batches[name + suffix](), f"{source}: {name + suffix}") for name in wanted]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        if path.stat().st_size > _MAX_BATCH_BYTES:
            raise DataError(f"{path} is larger than any CIFAR-10 batch")
        return path.read_bytes()

    return read


def _tar_batches(source: Path) -> dict[str, Callable[[], bytes]]:
    """Members are read into memory by name and never extracted, so their paths and links cannot lead anywhere."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                name = Path(member.name).name
                if not member.isreg() or not _BATCH.fullmatch(name):
                    continue
                if member.size > _MAX_BATCH_BYTES:
                    raise DataError(f"{source}: {member.name} is larger than any CIFAR-10 batch")
                file = archive.extractfile(member)
                assert file is not None
                found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{source} cannot be read as a tar file: {error}") from error
    if not found:
        raise DataError(f"{source} holds no CIFAR-10 batch (data_batch_1, ..); other tar files are not supported")
    return {name: (lambda data=data: data) for name, data in found.items()}  # type: ignore[misc]


def _parse_binary(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if len(data) % (1 + _PIXELS) or not data:
        raise DataError(f"{where}: {len(data)} bytes are not whole records of {1 + _PIXELS}; it is truncated")
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return _checked(records[:, 1:], records[:, 0].astype(np.int64), where)


def _parse_pickle(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise DataError(f"{where} is not a CIFAR-10 batch of arrays and lists: {error}") from error
    return _checked(pixels, labels, where)


def _checked(pixels: np.ndarray, labels: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise DataError(f"{where}: data must be uint8 (N, {_PIXELS}); got {pixels.dtype} {pixels.shape}")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{where}: labels must be {len(pixels)} integers in 0..9")
    return pixels.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), labels.astype(np.int64)
