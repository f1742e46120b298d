"""The cache of decoded or packed images on disk, so that a source is decoded or packed once."""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from fastddpm.errors import DataError, StorageError

from .dataset import Dataset, checksum
from .image import Preprocessing
from .ingest import Report, decode_all
from .pack.format import ENDING, open_pack
from .pack.writer import write_pack
from .readers.source import ImageSource

_VERSION = 2
_VERIFY_ALL_BYTES = 2**30
_SAMPLE = 1024  # images that are verified of an entry larger than _VERIFY_ALL_BYTES


def default_directory() -> Path:
    """Return $XDG_CACHE_HOME/fastddpm. Without that variable: ~/.cache/fastddpm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"


def decoded(
    image_source: ImageSource, preprocessing: Preprocessing, *, skip_bad: bool, directory: Path, report: Report
) -> Dataset:
    """Return the source's images as an array from the cache in `directory`, decoding them into it if needed.

    An entry is `<key>/images.npy`, `labels.npy` and `meta.json`. The key covers the source's path, file sizes and
    times, and `preprocessing`. An entry appears whole, by a rename, even if several processes write it. Opening one
    verifies its checksum, over all images up to 1 GiB and over 1,024 images of a larger entry. A damaged entry is made
    again, and if the cache cannot be written the images are decoded in memory; `report` gets a line about either.
    Raises DataError as `decode_all` does.
    """
    for note in image_source.notes:
        report(f"{image_source.name}: {note}")
    entry = directory / _key(image_source, preprocessing, skip_bad)
    dataset = _open(entry, image_source.name, preprocessing, report)
    if dataset is not None:
        return dataset
    full_list = directory / f"{entry.name}.problems.txt"
    images: list[np.ndarray] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return _make(entry, image_source, preprocessing, skip_bad, full_list, report)
    except OSError as error:
        report(
            f"cache {directory} cannot be written ({error.strerror or error}); decoding in memory for this process only"
        )
    labels, _ = decode_all(
        image_source, preprocessing, images.append, skip_bad=skip_bad, report=report, full_list=full_list
    )
    return Dataset.of(np.stack(images), labels, image_source.name)


def packed(
    image_source: ImageSource, preprocessing: Preprocessing, *, skip_bad: bool, directory: Path, report: Report
) -> Dataset:
    """Return the source's images from a pack (`pack/format.py`) in `directory`, writing it if needed.

    Used for data sets that are too large to keep decoded. Raises DataError as `write_pack` does, and StorageError if
    the pack cannot be written.
    """
    for note in image_source.notes:
        report(f"{image_source.name}: {note}")
    path = directory / f"{_key(image_source, preprocessing, skip_bad)}{ENDING}"
    if path.exists():
        try:
            return replace(open_pack(path).dataset(), name=image_source.name)
        except DataError as error:
            report(f"{error}; packing again")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cache {directory} cannot be made: {error.strerror or error}") from error
    pack = write_pack(image_source, path, preprocessing, skip_bad=skip_bad, report=report)
    return replace(pack.dataset(), name=image_source.name)


class _Rows:
    """A uint8 .npy file that images are appended to; its header gets their number at the end.

    It is written and not memory-mapped, because then a full disk raises OSError instead of SIGBUS.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._file = path.open("wb")
        self._shape = shape
        self._num = 0
        self._header()

    def append(self, image: np.ndarray) -> None:
        self._file.write(image.tobytes())
        self._num += 1

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                start = self._data
                self._file.seek(0)
                self._header()
                assert self._data == start  # NumPy leaves room for the first dimension to grow
        finally:
            self._file.close()

    def _header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._num, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._data = self._file.tell()


def _make(
    entry: Path,
    image_source: ImageSource,
    preprocessing: Preprocessing,
    skip_bad: bool,
    full_list: Path,
    report: Report,
) -> Dataset:
    """Decode into a temporary directory beside `entry` and rename it.

    Raises OSError if it cannot be written or read back.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent))
    try:
        with _Rows(temporary / "images.npy", preprocessing.shape) as rows:
            labels, num_bad = decode_all(
                image_source, preprocessing, rows.append, skip_bad=skip_bad, report=report, full_list=full_list
            )
        if labels is not None:
            np.save(temporary / "labels.npy", labels)
        images = np.load(temporary / "images.npy", mmap_mode="r", allow_pickle=False)
        meta = {
            "source": image_source.name,
            "rule": asdict(preprocessing),
            "left_out": num_bad,
            "checksum": checksum(images, labels),
            "sample": _sample_checksum(images, labels),
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        dataset = _open(temporary, image_source.name, preprocessing, lambda _: None)
        if dataset is None:
            raise OSError("the entry just written cannot be read back")
        try:
            os.rename(temporary, entry)
        except OSError:  # an entry exists: another process has just made it, or it is damaged
            if _open(entry, image_source.name, preprocessing, lambda _: None) is None:
                _replace(entry, temporary)
        return dataset  # its memory map stays valid after the file is renamed or removed
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(entry: Path, temporary: Path) -> None:
    """Move a damaged entry aside, put the new one in its place, and remove the damaged one."""
    aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent))
    try:
        with suppress(OSError):  # another process is replacing it at the same time; its entry is equivalent
            os.rename(entry, aside / "damaged")
            os.rename(temporary, entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _key(image_source: ImageSource, preprocessing: Preprocessing, skip_bad: bool) -> str:
    identity = [_VERSION, str(Path(image_source.name).resolve()), image_source.listing, asdict(preprocessing), skip_bad]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _sample_checksum(images: np.ndarray, labels: np.ndarray | None) -> str:
    """Return the checksum of at least 1,024 evenly spaced images (all of fewer) and of all labels."""
    return checksum(images[:: max(1, len(images) // _SAMPLE)], labels)


def _open(entry: Path, name: str, preprocessing: Preprocessing, report: Report) -> Dataset | None:
    """Open and verify an entry; None if it does not exist or, after a line to `report`, if it is damaged."""
    if not os.path.exists(entry):
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text())
        images = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = None
        if (entry / "labels.npy").exists():
            labels = np.load(entry / "labels.npy", allow_pickle=False)
        if images.dtype != np.uint8 or images.shape[1:] != preprocessing.shape or not len(images):
            raise ValueError(f"it holds {images.dtype} {images.shape}")
        if labels is not None and (labels.dtype != np.int64 or labels.shape != images.shape[:1]):
            raise ValueError(f"it holds {labels.dtype} {labels.shape} labels for {len(images)} images")
        whole = images.nbytes <= _VERIFY_ALL_BYTES
        if (checksum if whole else _sample_checksum)(images, labels) != meta["checksum" if whole else "sample"]:
            raise ValueError("its checksum differs")
        if meta["left_out"]:
            report(f"{meta['left_out']} images of {name} are left out, as --skip-bad asks")
        return Dataset(images, labels, name, meta["checksum"])
    except Exception as error:  # a damaged header can raise nearly anything
        report(f"cache entry {entry} is damaged ({error or type(error).__name__}); decoding again")
        return None
