"""The format of a pack: one file of encoded images, which training decodes in any order.

    magic         8 bytes
    images        encoded, one after the other
    index         for each image: offset uint64, length uint32, CRC-32 uint32; then, if there are labels, int64 labels
    description   JSON: version, rule (size, channels, resize), count, checksum of the pixels, SHA-256 of the index, ..
    trailer       offset uint64, length uint64 and SHA-256 of the description, SHA-256 of all bytes before it, magic

All numbers are little-endian. The checksum of the pixels equals that of the same images decoded into an array
(`dataset.checksum`), so a run can be resumed with either. A stored zip takes 23 times the memory for its index
(docs/measurements/data-libraries.md).
"""

import hashlib
import os
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastddpm.data.dataset import Dataset, class_names
from fastddpm.data.image import RESIZES, BadImageError, Preprocessing, decode
from fastddpm.data.readers.source import MAX_ENCODED_BYTES, EncodedImage, ImageSource
from fastddpm.errors import DataError
from fastddpm.runtime.image_size import ImageSize, sides
from fastddpm.storage.documents import parse_json
from fastddpm.storage.reading import open_regular

INDEX = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])


class PackedImages:
    """Images of a pack that are indexed like a uint8 array (N, C, H, W) and decoded at every access.

    `path`: the pack. `index`: place, length and CRC-32 of each encoded image, dtype `INDEX` (N,). `preprocessing`: the
    size and channels they are decoded to. Takes a number, a slice or an array of numbers. Raises DataError that names a
    damaged image.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, index: np.ndarray, preprocessing: Preprocessing) -> None:
        self.path, self.index, self.preprocessing = path, index, preprocessing
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.preprocessing.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all images, decoded."""
        return len(self.index) * int(np.prod(self.preprocessing.shape))

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = np.asarray(self.index[key])
        images = np.empty((rows.size, *self.preprocessing.shape), np.uint8)
        for place, row in enumerate(rows.ravel()):
            try:
                images[place] = decode(read_record(self._descriptor, row), self.preprocessing)
            except (BadImageError, OSError) as error:
                number = int(np.arange(len(self))[key].ravel()[place])
                raise DataError(damaged(self.path, number, error)) from error
        return images.reshape(*rows.shape, *self.preprocessing.shape)

    def encoded(self, number: int) -> bytes:
        """Return an image's encoded bytes. Raises BadImageError if they are not the bytes that were written."""
        return read_record(self._descriptor, self.index[number])


def read_record(descriptor: int, row: Any) -> bytes:
    """Return the encoded image at a row of the index.

    Raises BadImageError if its length or CRC-32 differs from the row.
    """
    data = os.pread(descriptor, int(row["length"]), int(row["offset"]))
    if len(data) != row["length"] or zlib.crc32(data) != row["crc32"]:
        raise BadImageError("its checksum differs from what was written")
    return data


def damaged(path: Path, number: int, reason: object) -> str:
    """Return the error message for an image of a pack that cannot be decoded."""
    return f"{path}: image {number}: {reason}; python -m fastddpm.data verify {path} lists all that is damaged"


Store = Literal["fitted", "original"]
STORES = ("fitted", "original")
ENDING = ".fdpack"
MAGIC = b"FDPACK01"
VERSION = 1
TRAILER = struct.Struct("<QQ32s32s8s")
MAX_DESCRIPTION_BYTES = 2**16
MAX_SIZE = 8192


@dataclass(frozen=True)
class Pack:
    """An open pack.

    `preprocessing`, `store`, `decoder`: how it was made. `store` "fitted": every image has the size of `preprocessing`;
    "original": files are unchanged, and training crops and resizes them. `labels`: int64 (N,) or None. `checksum`: of
    the pixels (`dataset.checksum`). `sha256`: of all bytes before the trailer. `left_out`: bad images of `source`.
    `classes`: names of the classes, in the order of their labels; None if the source gave none.
    """

    path: Path
    preprocessing: Preprocessing
    store: Store
    index: np.ndarray
    labels: np.ndarray | None
    checksum: str
    sha256: str
    source: str
    left_out: int
    decoder: str
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def images(self) -> PackedImages:
        """Return the images, uint8 (N, C, S, S), which are decoded when indexed."""
        return PackedImages(self.path, self.index, decoding(self.preprocessing, self.store))

    def dataset(self) -> Dataset:
        """Return the images, which are decoded when indexed, with their labels."""
        return Dataset(
            self.images(), self.labels, str(self.path), self.checksum, class_names(self.labels, self.classes)
        )

    def image_source(self) -> ImageSource:
        """Return the encoded images as a source, named by their numbers."""
        images = self.images()

        def items() -> Iterator[EncodedImage]:
            for number in range(len(self)):
                label = None if self.labels is None else int(self.labels[number])
                yield EncodedImage(f"image {number}", label, _reader(images, number))

        return ImageSource(str(self.path), len(self), [self.sha256], items, classes=self.classes)


def _reader(images: PackedImages, number: int) -> Callable[[], bytes]:
    return lambda: images.encoded(number)


def decoding(preprocessing: Preprocessing, store: Store) -> Preprocessing:
    """Return the preprocessing that decodes the images of a pack that was made with `preprocessing` and `store`."""
    return replace(preprocessing, resize="none") if store == "fitted" else preprocessing


def open_pack(path: Path) -> Pack:
    """Open a pack and verify its description and index. Raises DataError for another file, or a damaged one.

    Images are verified when they are read, and all bytes by `inspect.faults`.
    """
    try:
        with open_regular(path) as file:
            return _opened(path, file.fileno())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is no pack, or damaged ({reason}); pack the images again") from error


def _opened(path: Path, descriptor: int) -> Pack:
    end = os.fstat(descriptor).st_size - TRAILER.size
    if end < len(MAGIC) or os.pread(descriptor, len(MAGIC), 0) != MAGIC:
        raise ValueError("it does not start like a pack")
    start, length, text_sha256, sha256, magic = TRAILER.unpack(os.pread(descriptor, TRAILER.size, end))
    if magic != MAGIC or start + length != end or length > MAX_DESCRIPTION_BYTES:
        raise ValueError("its end is missing")
    text = os.pread(descriptor, length, start)
    if hashlib.sha256(text).digest() != text_sha256:
        raise ValueError("the description's checksum differs")
    said = parse_json(text, "its description")
    preprocessing, store = _rule(said)
    index, labels = _index(descriptor, said, start)
    return Pack(
        path, preprocessing, store, index, labels,
        checksum=_of(str, said, "checksum"), sha256=sha256.hex(),
        source=_of(str, said, "source"), left_out=_of(int, said, "left_out"), decoder=_of(str, said, "decoder"),
        classes=_classes(said),
    )  # fmt: skip


def _classes(said: Any) -> tuple[str, ...] | None:
    """Return the names of the classes, which packs of older versions and of large numbers of classes lack."""
    names = said.get("classes")
    if names is None:
        return None
    if type(names) is not list or not all(type(name) is str for name in names):
        raise ValueError("its classes are no list of names")
    return tuple(names)


def _rule(said: Any) -> tuple[Preprocessing, Store]:
    if _of(int, said, "version") != VERSION:
        raise ValueError(f"it is of version {said['version']}; this fastddpm reads {VERSION}")
    preprocessing = _of(dict, said, "rule")
    size, channels, resize = (
        _size(preprocessing["image_size"]),
        _of(int, preprocessing, "channels"),
        _of(str, preprocessing, "resize"),
    )
    store = _of(str, said, "store")
    if (
        not all(1 <= side <= MAX_SIZE for side in sides(size))
        or channels not in (1, 3)
        or resize not in RESIZES
        or store not in STORES
    ):
        raise ValueError(f"images of {channels} channels and size {size}, resized by {resize!r}, stored {store!r}")
    background = said["rule"].get("background")  # packs of older versions lack it
    if background is not None and type(background) is not str:
        raise ValueError("background is not of the type str")
    return Preprocessing(size, channels, resize, background), store


def _size(said: Any) -> ImageSize:
    """Return an image size: an integer, or a list of height and width."""
    if isinstance(said, list) and [type(side) for side in said] == [int, int]:
        return said[0], said[1]
    if type(said) is not int:
        raise ValueError("image_size is neither of the type int nor a list of two")
    return said


def _index(descriptor: int, said: Any, end: int) -> tuple[np.ndarray, np.ndarray | None]:
    count, labelled = _of(int, said, "count"), _of(bool, said, "labels")
    num_bytes = count * (INDEX.itemsize + 8 * labelled)
    start = end - num_bytes
    if count < 1 or start < len(MAGIC):
        raise ValueError(f"it cannot hold {count} images")
    data = os.pread(descriptor, num_bytes, start)
    if len(data) != num_bytes or hashlib.sha256(data).hexdigest() != said["index_sha256"]:
        raise ValueError("the index's checksum differs")
    index = np.frombuffer(data, INDEX, count).copy()  # a view would keep the labels in memory twice
    first, last = int(index["offset"].min()), int(index["offset"].max())
    ends = index["offset"] + index["length"]  # no overflow: the offsets are checked to lie inside the file
    if first < len(MAGIC) or max(last, int(ends.max())) > start or index["length"].max() > MAX_ENCODED_BYTES:
        raise ValueError("its index points elsewhere")
    labels = np.frombuffer(data, "<i8", count, count * INDEX.itemsize).astype(np.int64) if labelled else None
    if labels is not None and (labels.min() < 0 or labels.max() >= 2**31):
        raise ValueError(f"its labels are {labels.min()} to {labels.max()}")
    return index, labels


def _of(kind: type, said: Any, name: str) -> Any:
    if type(said) is not dict or type(said[name]) is not kind:
        raise ValueError(f"{name} is not of the type {kind.__name__}")
    return said[name]
