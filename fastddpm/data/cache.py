"""The cache of decoded or packed images on disk, so that a source is decoded or packed once."""

import hashlib
import json
import os
import secrets
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.storage.documents import parse_json
from fastddpm.storage.files import sweep, temporary_beside, temporary_directory

from .dataset import Dataset, checksum, class_names
from .image import Preprocessing
from .ingest import Report, decode_all
from .pack.format import ENDING, open_pack
from .pack.writer import write_pack
from .readers.source import ImageSource, check_regular, read_file

_VERSION = 4
_VERIFY_ALL_BYTES = 2**30
_MAX_META_BYTES = 2**21
_SAMPLE = 1024  # images that are verified of an entry larger than _VERIFY_ALL_BYTES


def default_directory() -> Path:
    """Return $XDG_CACHE_HOME/fastddpm. Without that variable: ~/.cache/fastddpm.

    Raises UsageError if the user has no home directory either, as in a container with an unknown user id.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"
    except RuntimeError as error:
        raise UsageError("this user has no home directory for the cache; set XDG_CACHE_HOME to a directory") from error


def decoded(
    image_source: ImageSource, preprocessing: Preprocessing, *, skip_bad: float, directory: Path, report: Report
) -> Dataset:
    """Return the source's images as an array from the cache in `directory`, decoding them into it if needed.

    An entry is `<key>/images.npy`, `labels.npy` and `meta.json`. The key covers the source's path, file sizes and
    times, and `preprocessing`. An entry appears whole, by a rename, even if several processes write it. Opening one
    verifies its checksum, over all images up to 1 GiB and over 1,024 images of a larger entry. A damaged entry is made
    again, and if the cache cannot be written the images are decoded in memory; `report` gets a line about either. What
    killed processes left unfinished in `directory` is removed first. Raises DataError as `decode_all` does.
    """
    for note in image_source.notes:
        report(f"{image_source.name}: {note}")
    sweep(directory)
    entry = directory / _key(image_source, preprocessing, skip_bad)
    dataset = _open(entry, image_source, preprocessing, report)
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
    labels, _, advice = decode_all(
        image_source, preprocessing, images.append, skip_bad=skip_bad, report=report, full_list=full_list
    )
    if advice:
        report(f"{image_source.name}: {advice}")
    return Dataset.of(np.stack(images), labels, image_source.name, class_names(labels, image_source.classes))


def packed(
    image_source: ImageSource, preprocessing: Preprocessing, *, skip_bad: float, directory: Path, report: Report
) -> Dataset:
    """Return the source's images from a pack (`pack/format.py`) in `directory`, writing it if needed.

    Used for data sets that are too large to keep decoded. Raises DataError as `write_pack` does, and StorageError if
    the pack cannot be written.
    """
    for note in image_source.notes:
        report(f"{image_source.name}: {note}")
    sweep(directory)
    path = directory / f"{_key(image_source, preprocessing, skip_bad)}{ENDING}"
    if path.exists():
        try:
            return _named(open_pack(path).dataset(), image_source)
        except DataError as error:
            report(f"{error}; packing again")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cache {directory} cannot be made: {error.strerror or error}") from error
    pack = write_pack(image_source, path, preprocessing, skip_bad=skip_bad, report=report)
    return _named(pack.dataset(), image_source)


def _named(dataset: Dataset, image_source: ImageSource) -> Dataset:
    """Return a pack's data set with the name and the class names of its source."""
    classes = class_names(dataset.labels, image_source.classes)
    return replace(dataset, name=image_source.name, classes=classes)


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
    skip_bad: float,
    full_list: Path,
    report: Report,
) -> Dataset:
    """Decode into a temporary directory beside `entry` and rename it.

    Raises OSError if it cannot be written or read back.
    """
    with _temporary(entry.parent) as temporary:
        with _Rows(temporary / "images.npy", preprocessing.shape) as rows:
            labels, num_bad, advice = decode_all(
                image_source, preprocessing, rows.append, skip_bad=skip_bad, report=report, full_list=full_list
            )
        if labels is not None:
            np.save(temporary / "labels.npy", labels)
        images = np.load(temporary / "images.npy", mmap_mode="r", allow_pickle=False)
        meta = {
            "source": image_source.name,
            "rule": asdict(preprocessing),
            "left_out": num_bad,
            "advice": advice,
            "classes": class_names(labels, image_source.classes),
            "checksum": checksum(images, labels),
            "sample": _sample_checksum(images, labels),
        }
        meta["meta"] = _meta_checksum(meta)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        dataset = _open(temporary, image_source, preprocessing, lambda _: None)
        if dataset is None:
            raise OSError("the entry just written cannot be read back")
        if advice:
            report(f"{image_source.name}: {advice}")
        try:
            os.rename(temporary, entry)
        except OSError:  # an entry exists: another process has just made it, or it is damaged
            if _open(entry, image_source, preprocessing, lambda _: None) is None:
                _replace(entry, temporary)
        return dataset  # its memory map stays valid after the file is renamed or removed


def _temporary(directory: Path) -> AbstractContextManager[Path]:
    """Provide a new directory in `directory`, removed after the block."""
    return temporary_directory(temporary_beside(directory / f"entry-{secrets.token_hex(4)}"))


def _replace(entry: Path, temporary: Path) -> None:
    """Move a damaged entry aside, put the new one in its place, and remove the damaged one."""
    # Another process may be replacing it at the same time; its entry is equivalent.
    with _temporary(entry.parent) as aside, suppress(OSError):
        os.rename(entry, aside / "damaged")
        os.rename(temporary, entry)


def _key(image_source: ImageSource, preprocessing: Preprocessing, skip_bad: float) -> str:
    identity = [_VERSION, str(Path(image_source.name).resolve()), image_source.listing, asdict(preprocessing)]
    identity.append(float(skip_bad))
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _sample_checksum(images: np.ndarray, labels: np.ndarray | None) -> str:
    """Return the checksum of at least 1,024 evenly spaced images (all of fewer) and of all labels."""
    return checksum(images[:: max(1, len(images) // _SAMPLE)], labels)


def _meta_checksum(meta: dict[str, Any]) -> str:
    """Return the checksum of all other fields of meta.json."""
    others = {name: value for name, value in meta.items() if name != "meta"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _open(entry: Path, image_source: ImageSource, preprocessing: Preprocessing, report: Report) -> Dataset | None:
    """Open and verify an entry; None if it does not exist or, after a line to `report`, if it is damaged."""
    if not os.path.exists(entry):
        return None
    try:
        meta = parse_json(read_file(entry / "meta.json", _MAX_META_BYTES), "meta.json")
        if meta.get("meta") != _meta_checksum(meta):
            raise ValueError("meta.json is not as it was written")
        check_regular(entry / "images.npy")
        images = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = None
        if (entry / "labels.npy").exists():
            check_regular(entry / "labels.npy")
            labels = np.load(entry / "labels.npy", allow_pickle=False)
        if images.dtype != np.uint8 or images.shape[1:] != preprocessing.shape or not len(images):
            raise ValueError(f"it holds {images.dtype} {images.shape}")
        if labels is not None and (labels.dtype != np.int64 or labels.shape != images.shape[:1]):
            raise ValueError(f"it holds {labels.dtype} {labels.shape} labels for {len(images)} images")
        whole = images.nbytes <= _VERIFY_ALL_BYTES
        if (checksum if whole else _sample_checksum)(images, labels) != meta["checksum" if whole else "sample"]:
            raise ValueError("its checksum differs")
        classes = class_names(labels, image_source.classes)
        if meta["classes"] != (None if classes is None else list(classes)):
            raise ValueError("its class names differ")
        if meta["left_out"]:
            report(f"{meta['left_out']} images of {image_source.name} are left out, because they cannot be used")
        if meta["advice"]:
            report(f"{image_source.name}: {meta['advice']}")
        return Dataset(images, labels, image_source.name, meta["checksum"], classes)
    except Exception as error:  # a damaged header can raise nearly anything
        report(f"cache entry {entry} is damaged ({error or type(error).__name__}); decoding again")
        return None
