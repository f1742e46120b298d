"""Write a source of images as a pack (`format.py`). Every image is decoded once, so that bad ones are found."""

import functools
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import __version__ as pillow_version

from fastddpm.data.dataset import Checksum, checksum
from fastddpm.data.image import Brightness, Levels, Preprocessing, as_planes, fitted, open_picture
from fastddpm.data.ingest import Labels, Problems, Report, map_images, raise_or_report, refuse_mixture
from fastddpm.data.readers.source import EncodedImage, ImageSource
from fastddpm.errors import StorageError
from fastddpm.runtime.progress import announced
from fastddpm.storage.files import hold, temporary_beside

from .format import (
    INDEX,
    MAGIC,
    MAX_DESCRIPTION_BYTES,
    TRAILER,
    VERSION,
    Pack,
    PackedImages,
    Store,
    decoding,
    open_pack,
)


def write_pack(
    image_source: ImageSource,
    path: Path,
    preprocessing: Preprocessing,
    *,
    store: Store = "fitted",
    skip_bad: float = False,
    report: Report,
) -> Pack:
    """Write the pack `path` from a source and open it. The file appears under its name only when it is complete.

    store "fitted": an image of the right size keeps its bytes, unless its pixels are fewer bytes; any other is cropped
    and resized, and stored as PNG. store "original": every image keeps its bytes.

    Raises DataError that lists all bad images, which `skip_bad` leaves out instead (up to that share of them, see
    `raise_or_report`), and StorageError if the file cannot be written. Memory, in addition to the source's list of
    images: 16 images per processor, encoded and decoded, and about 60 bytes per packed image.
    """
    labels = Labels(image_source.name)
    problems = Problems(image_source, path.with_name(f"{path.name}.problems.txt"), report)
    pixels = Checksum((image_source.count, *preprocessing.shape))
    work = functools.partial(_record, preprocessing=preprocessing, store=store)
    brightness = Brightness()
    with _Writer(path) as writer:
        for _, item, (data, planes, levels) in map_images(image_source, work, problems, title="packing"):
            writer.append(data)
            labels.append(item.label)
            pixels.add(planes)
            brightness.add(levels)
        raise_or_report(problems, len(labels), skip_bad=skip_bad, report=report)
        refuse_mixture(brightness, image_source)
        if advice := brightness.note():
            report(f"{image_source.name}: {advice}")
        classes = labels.array()
        if len(labels) == image_source.count:
            value = pixels.result(classes)
        else:  # a checksum starts with the number of images, and some were left out
            with announced("reading the images that were packed again", report):
                value = checksum(writer.images(decoding(preprocessing, store)), classes)
        writer.close(
            classes,
            {
                "source": image_source.name,
                "rule": asdict(preprocessing),
                "store": store,
                "left_out": problems.count,
                "checksum": value,
                "decoder": f"pillow {pillow_version}",
                "classes": _described(image_source.classes),
            },
        )
        writer.publish()
    return open_pack(path)


def _described(classes: tuple[str, ...] | None) -> list[str] | None:
    """Return the names of the classes for the description; None if they would take more than half of its limit."""
    if classes is None or len(json.dumps(classes, indent=1)) > MAX_DESCRIPTION_BYTES // 2:
        return None
    return list(classes)


def _record(item: EncodedImage, preprocessing: Preprocessing, store: Store) -> tuple[bytes, np.ndarray, Levels]:
    """Return the bytes to store for an image, its pixels, uint8 (C, S, S), and `Picture.levels`."""
    data = item.read()
    picture = open_picture(data, preprocessing.background)
    image = fitted(picture, preprocessing)
    planes = as_planes(image, preprocessing)
    if store == "original" or (picture.image.size == image.size and len(data) <= planes.nbytes):
        return data, planes, picture.levels
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), planes, picture.levels


class _Writer:
    """Write a pack to a temporary file beside `path`, and rename it when it is complete. Raises StorageError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.temporary = temporary_beside(path)
        self._index = bytearray()
        self._digest = hashlib.sha256()
        self._at = 0

    def __enter__(self) -> "_Writer":
        with _storing(self._path):
            self._file = self.temporary.open("wb")
            hold(self._file.fileno())
            self._write(MAGIC)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with suppress(OSError):  # a full disk, which was reported already
            self._file.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def append(self, data: bytes) -> None:
        """Append an encoded image."""
        self._index += struct.pack("<QII", self._at, len(data), zlib.crc32(data))
        with _storing(self._path):
            self._write(data)

    def images(self, preprocessing: Preprocessing) -> PackedImages:
        """Return the images appended so far, to be read back."""
        with _storing(self._path):
            self._file.flush()
        return PackedImages(self.temporary, np.frombuffer(bytes(self._index), INDEX), preprocessing)

    def close(self, labels: np.ndarray | None, description: dict[str, Any]) -> None:
        """Write index, description and trailer, which complete the temporary file."""
        index = bytes(self._index) + (b"" if labels is None else labels.astype("<i8").tobytes())
        said = {
            "version": VERSION,
            **description,
            "count": len(self._index) // INDEX.itemsize,
            "labels": labels is not None,
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }
        text = json.dumps(said, indent=1).encode()
        with _storing(self._path):
            self._write(index)
            start = self._at
            self._write(text)
            ends = start, len(text), hashlib.sha256(text).digest(), self._digest.digest(), MAGIC
            self._file.write(TRAILER.pack(*ends))
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Rename the temporary file to `path`."""
        with _storing(self._path):
            os.replace(self.temporary, self._path)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._at += len(data)


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
