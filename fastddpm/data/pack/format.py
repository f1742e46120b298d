"""A pack: encoded images in one file, which training decodes in any order.

    magic         8 bytes
    images        encoded, one after the other
    index         offset uint64, length uint32, CRC-32 uint32 of each; then, if there are labels, int64 of each
    description   JSON: version, rule, count, checksum of the pixels, SHA-256 of the index, ..
    trailer       where the description starts, its length, its SHA-256, that of all bytes before the trailer, magic

All numbers are little-endian. The checksum of the pixels is that of the same images decoded into an array
(`dataset.checksum`), so a run may go on with either.
"""

import hashlib
import json
import os
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastddpm.data.dataset import Dataset
from fastddpm.data.image import RESIZES, BadImageError, Preprocessing, decode
from fastddpm.data.readers.source import MAX_ENCODED_BYTES, EncodedImage, ImageSource
from fastddpm.errors import DataError

# The images of a pack, decoded when they are asked for.

INDEX = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])


class PackedImages:
    """Like a uint8 array (N, C, S, S) to index, but decoded from `path` at every access.

    `index`: where each encoded image lies, dtype `INDEX` (N,). `preprocessing`: what they are decoded to. An index is
    a number, a slice or an array of numbers; DataError names an image that is damaged.
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
        """Of the decoded images."""
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
        """An image as it is stored; BadImageError if it is not what was written."""
        return read_record(self._descriptor, self.index[number])


def read_record(descriptor: int, row: Any) -> bytes:
    """The encoded image that a row of the index names; BadImageError if it is not what was written."""
    data = os.pread(descriptor, int(row["length"]), int(row["offset"]))
    if len(data) != row["length"] or zlib.crc32(data) != row["crc32"]:
        raise BadImageError("its checksum differs from what was written")
    return data


def damaged(path: Path, number: int, reason: object) -> str:
    """What to say about an image of a pack that cannot be decoded."""
    return f"{path}: image {number}: {reason}; python -m fastddpm.data verify {path} lists all that is damaged"


Store = Literal["fitted", "original"]
STORES = ("fitted", "original")
ENDING = ".fdpack"
MAGIC = b"FDPACK01"
VERSION = 1
TRAILER = struct.Struct("<QQ32s32s8s")
_MAX_DESCRIPTION_BYTES = 2**16
MAX_SIZE = 8192


@dataclass(frozen=True)
class Pack:
    """An opened pack. `preprocessing`, `store`, `decoder`: how it was made. `labels`: int64 (N,) or None. `sha256`: of
    its bytes, `checksum`: of its pixels (`dataset.checksum`).

    Stored "fitted", every image has the rule's size; "original", files are as they came, and training resizes.
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

    def __len__(self) -> int:
        return len(self.index)

    def images(self) -> PackedImages:
        """uint8 (N, C, S, S), decoded when indexed."""
        return PackedImages(self.path, self.index, decoding(self.preprocessing, self.store))

    def dataset(self) -> Dataset:
        """The images, decoded when indexed, with their labels."""
        return Dataset(self.images(), self.labels, str(self.path), self.checksum)

    def image_source(self) -> ImageSource:
        """The images as they are stored, named by their numbers."""
        images = self.images()

        def items() -> Iterator[EncodedImage]:
            for number in range(len(self)):
                label = None if self.labels is None else int(self.labels[number])
                yield EncodedImage(f"image {number}", label, _reader(images, number))

        return ImageSource(str(self.path), len(self), [self.sha256], items)


def _reader(images: PackedImages, number: int) -> Callable[[], bytes]:
    return lambda: images.encoded(number)


def decoding(preprocessing: Preprocessing, store: Store) -> Preprocessing:
    """What the images of a pack made by `preprocessing` are decoded by."""
    return Preprocessing(preprocessing.image_size, preprocessing.channels) if store == "fitted" else preprocessing


def open_pack(path: Path) -> Pack:
    """A pack, its description and index verified; DataError for another file, or a damaged one.

    Images are verified when they are read, and all bytes by `verify.faults`.
    """
    try:
        with path.open("rb") as file:
            return _opened(path, file.fileno())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is no pack, or damaged ({reason}); pack the images anew") from error


def _opened(path: Path, descriptor: int) -> Pack:
    end = os.fstat(descriptor).st_size - TRAILER.size
    if end < len(MAGIC) or os.pread(descriptor, len(MAGIC), 0) != MAGIC:
        raise ValueError("it does not start as one")
    start, length, text_sha256, sha256, magic = TRAILER.unpack(os.pread(descriptor, TRAILER.size, end))
    if magic != MAGIC or start + length != end or length > _MAX_DESCRIPTION_BYTES:
        raise ValueError("its end is missing")
    text = os.pread(descriptor, length, start)
    if hashlib.sha256(text).digest() != text_sha256:
        raise ValueError("the description's checksum differs")
    said = json.loads(text)
    preprocessing, store = _rule(said)
    index, labels = _index(descriptor, said, start)
    return Pack(
        path, preprocessing, store, index, labels,
        checksum=_of(str, said, "checksum"), sha256=sha256.hex(),
        source=_of(str, said, "source"), left_out=_of(int, said, "left_out"), decoder=_of(str, said, "decoder"),
    )  # fmt: skip


def _rule(said: Any) -> tuple[Preprocessing, Store]:
    if _of(int, said, "version") != VERSION:
        raise ValueError(f"it is of version {said['version']}; this fastddpm reads {VERSION}")
    preprocessing = _of(dict, said, "rule")
    size, channels, resize = (
        _of(int, preprocessing, "image_size"),
        _of(int, preprocessing, "channels"),
        _of(str, preprocessing, "resize"),
    )
    store = _of(str, said, "store")
    if not 1 <= size <= MAX_SIZE or channels not in (1, 3) or resize not in RESIZES or store not in STORES:
        raise ValueError(f"images of {channels} channels and size {size}, resized by {resize!r}, stored {store!r}")
    return Preprocessing(size, channels, resize), store


def _index(descriptor: int, said: Any, end: int) -> tuple[np.ndarray, np.ndarray | None]:
    count, labelled = _of(int, said, "count"), _of(bool, said, "labels")
    num_bytes = count * (INDEX.itemsize + 8 * labelled)
    start = end - num_bytes
    if count < 1 or start < len(MAGIC):
        raise ValueError(f"it cannot hold {count} images")
    data = os.pread(descriptor, num_bytes, start)
    if len(data) != num_bytes or hashlib.sha256(data).hexdigest() != said["index_sha256"]:
        raise ValueError("the index's checksum differs")
    index = np.frombuffer(data, INDEX, count)
    first, last = int(index["offset"].min()), int(index["offset"].max())
    ends = index["offset"] + index["length"]  # cannot wrap round where the offsets lie inside the file
    if first < len(MAGIC) or max(last, int(ends.max())) > start or index["length"].max() > MAX_ENCODED_BYTES:
        raise ValueError("its index points elsewhere")
    labels = np.frombuffer(data, "<i8", count, count * INDEX.itemsize).astype(np.int64) if labelled else None
    if labels is not None and (labels.min() < 0 or labels.max() >= 2**31):
        raise ValueError(f"its labels are {labels.min()} to {labels.max()}")
    return index, labels


def _of(kind: type, said: Any, name: str) -> Any:
    if type(said) is not dict or type(said[name]) is not kind:
        raise ValueError(f"{name} is not what is expected there")
    return said[name]
