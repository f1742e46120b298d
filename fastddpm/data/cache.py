"""Decoded once: a source of encoded images as an array on disk, checked whenever it is opened."""

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
_SAMPLE = 1024  # images of a larger entry that are verified


def default_directory() -> Path:
    """$XDG_CACHE_HOME/fastddpm, or ~/.cache/fastddpm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"


def decoded(
    image_source: ImageSource, preprocessing: Preprocessing, *, skip_bad: bool, directory: Path, report: Report
) -> Dataset:
    """The source's images, from the cache in `directory`, or decoded into it now.

    An entry is `<key>/images.npy`, `labels.npy` and `meta.json`; the key covers the path, sizes and times of the
    source and the rule. It appears by a rename, whole, whoever else writes it. A damaged one (an array of up to
    1 GiB is read whole to know, of a larger one 1,024 images) is made again; where none can be written the images
    are decoded in memory; `report` is told of both. Raises DataError as `decode_all` does.
    """
    for note in image_source.notes:
        report(f"{image_source.name}: {note}")
    entry = directory / _key(image_source, preprocessing, skip_bad)
    made = _open(entry, image_source.name, preprocessing, report)
    if made is not None:
        return made
    full_list = directory / f"{entry.name}.problems.txt"
    images: list[np.ndarray] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return _make(entry, image_source, preprocessing, skip_bad, full_list, report)
    except OSError as error:
        report(
            f"cache {directory} cannot be written ({error.strerror or error}); decoding in memory, for this run only"
        )
    labels, _ = decode_all(
        image_source, preprocessing, images.append, skip_bad=skip_bad, report=report, full_list=full_list
    )
    return Dataset.of(np.stack(images), labels, image_source.name)


def packed(
    image_source: ImageSource, preprocessing: Preprocessing, *, skip_bad: bool, directory: Path, report: Report
) -> Dataset:
    """The source's images as a pack (`packing.py`) in `directory`, made now unless it is there.

    For what is too large to keep decoded. Raises DataError as `write_pack` does, StorageError where it cannot be
    written.
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
    made = write_pack(image_source, path, preprocessing, skip_bad=skip_bad, report=report)
    return replace(made.dataset(), name=image_source.name)


class _Rows:
    """A uint8 .npy file that images are appended to, their number known at the end.

    Written rather than mapped, so that a full disk is an OSError and not a SIGBUS.
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
    """Decode into a directory beside the entry and rename it. OSError: it cannot be written, or not read back."""
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
            "sample": _sampled(images, labels),
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        made = _open(temporary, image_source.name, preprocessing, lambda _: None)
        if made is None:
            raise OSError("what was just written cannot be read back")
        try:
            os.rename(temporary, entry)
        except OSError:  # there is one: made by another process in the meantime, and as good as this one, or damaged
            if _open(entry, image_source.name, preprocessing, lambda _: None) is None:
                _replace(entry, temporary)
        return made  # its mapping outlives the name of the file
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(entry: Path, temporary: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent))
    try:
        with suppress(OSError):  # another process is replacing it at this moment, and its entry will do
            os.rename(entry, aside / "damaged")
            os.rename(temporary, entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _key(image_source: ImageSource, preprocessing: Preprocessing, skip_bad: bool) -> str:
    identity = [_VERSION, str(Path(image_source.name).resolve()), image_source.listing, asdict(preprocessing), skip_bad]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _sampled(images: np.ndarray, labels: np.ndarray | None) -> str:
    return checksum(images[:: max(1, len(images) // _SAMPLE)], labels)


def _open(entry: Path, name: str, preprocessing: Preprocessing, report: Report) -> Dataset | None:
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
            raise ValueError(f"it holds {labels.dtype} {labels.shape} labels of {len(images)} images")
        whole = images.nbytes <= _VERIFY_ALL_BYTES
        if (checksum if whole else _sampled)(images, labels) != meta["checksum" if whole else "sample"]:
            raise ValueError("its checksum differs")
        if meta["left_out"]:
            report(f"{meta['left_out']} images of {name} are left out, as --skip-bad asks")
        return Dataset(images, labels, name, meta["checksum"])
    except Exception as error:  # a damaged header can raise nearly anything
        report(f"cache entry {entry} is damaged ({error or type(error).__name__}); decoding again")
        return None
