"""What is in a source: how many images, of which kinds and sizes, which cannot be used, which are equal."""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from fastddpm.errors import DataError, StorageError

from .dataset import Checksum
from .image import Preprocessing, decode, fitted, open_picture
from .ingest import Problems, Report, map_images
from .pack.format import TRAILER, Pack
from .readers.source import EncodedImage, ImageSource

# Which images of a very long row are equal, in memory that does not grow with it.

_ROW = np.dtype([("number", "<u8"), ("high", "<u8"), ("low", "<u8")])
_DIGEST_BYTES = 16
_AT_ONCE = 2**20  # digests sorted at a time, about 100 MB with what sorting takes
_BLOCK = 2**16


def digest(image: Image.Image) -> bytes:
    """128 bits that name an image by its size and its pixels as RGB."""
    pixels = image.convert("RGB").tobytes()
    return blake2b(pixels, digest_size=_DIGEST_BYTES, salt=b"%dx%d" % image.size).digest()


class Duplicates:
    """Digests of images as they come, kept in a file without a name: 24 bytes for each."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._count = 0

    def __enter__(self) -> "Duplicates":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def add(self, number: int, digest: bytes) -> None:
        """An image and its digest; StorageError when there is no room for temporary files."""
        try:
            self._file.write(number.to_bytes(8, "little") + digest)
        except OSError as error:
            raise StorageError(f"cannot write a temporary file in {tempfile.gettempdir()}: {error.strerror}") from error
        self._count += 1

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(first, later) for each image that equals an earlier one: the numbers of the first of its kind, and its own.

        The file is read once for each 2^20 images; digests are evenly spread, so each time takes about as many.
        """
        parts = -(-self._count // _AT_ONCE)
        for part in range(parts):
            rows = self._within(part, parts)
            rows = rows[np.lexsort((rows["number"], rows["low"], rows["high"]))]
            new = np.append(True, (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1]))
            first = np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
            yield from zip(rows["number"][first[~new]].tolist(), rows["number"][~new].tolist(), strict=True)

    def _within(self, part: int, parts: int) -> np.ndarray:
        """The rows whose digests lie in a part of all possible ones."""
        self._file.seek(0)
        chosen = [np.empty(0, _ROW)]
        while data := self._file.read(_BLOCK * _ROW.itemsize):
            rows = np.frombuffer(data, _ROW)
            chosen.append(rows[(rows["high"] >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part])
        return np.concatenate(chosen)


_MAX_SIZES = 1000
_MAX_CLASSES = 100_000
_SHOWN_PAIRS = 20
OTHER = "other"


@dataclass
class Findings:
    """What `scan` found.

    Of good images, `kinds` counts "FORMAT MODE", `sizes` "WIDTHxHEIGHT" (beyond 1,000 sizes "other"), `classes` labels;
    `smallest` and `largest` are pixels of the shorter side. `duplicates`: images that equal an earlier one; `equal`
    names some with the first of their kind.
    """

    source: str
    images: int
    good: int = 0
    encoded_bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    smallest: int = 0
    largest: int = 0
    classes: Counter[int] = field(default_factory=Counter)
    bad: int = 0
    problems: str = ""
    duplicates: int | None = None
    equal: list[tuple[str, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Seen:
    """An image that can be used."""

    kind: str
    size: tuple[int, int]
    num_bytes: int
    digest: bytes


def scan(
    image_source: ImageSource,
    *,
    preprocessing: Preprocessing | None = None,
    duplicates: bool = True,
    full_list: Path,
    report: Report,
) -> Findings:
    """Decode every image, at its own size or by `preprocessing`, and count.

    Equal are images whose pixels are, at their own size, by a 128-bit digest. Memory, beside what lists the source:
    16 encoded images and a decoded one for each processor, counts of 1,000 sizes and of the classes, 20 problems (if
    there are more, all go to `full_list`), and at most 100 MB to find what is equal.
    """
    found = Findings(image_source.name, image_source.count, notes=image_source.notes)
    problems = Problems(image_source, full_list, report)

    def look(item: EncodedImage) -> _Seen:
        data = item.read()
        picture = open_picture(data)
        if preprocessing is not None:
            fitted(picture, preprocessing)
        name = digest(picture.image) if duplicates else b""
        return _Seen(f"{picture.format} {picture.mode}", picture.image.size, len(data), name)

    with Duplicates() as before:
        for number, item, seen in map_images(image_source, look, problems, title="reading"):
            _count(found, item, seen)
            if duplicates:
                before.add(number, seen.digest)
        found.bad = problems.count
        found.problems = problems.message() if problems.count else ""
        if duplicates:
            _compare(found, before, image_source)
    return found


def _count(found: Findings, item: EncodedImage, seen: _Seen) -> None:
    found.good += 1
    found.encoded_bytes += seen.num_bytes
    found.kinds[seen.kind] += 1
    size = "{}x{}".format(*seen.size)
    found.sizes[size if size in found.sizes or len(found.sizes) < _MAX_SIZES else OTHER] += 1
    side = min(seen.size)
    found.smallest = side if found.good == 1 else min(found.smallest, side)
    found.largest = max(found.largest, side)
    if item.label is not None and (item.label in found.classes or len(found.classes) < _MAX_CLASSES):
        found.classes[item.label] += 1


def _compare(found: Findings, before: Duplicates, image_source: ImageSource) -> None:
    found.duplicates = 0
    pairs: list[tuple[int, int]] = []
    for pair in before.pairs():
        found.duplicates += 1
        if len(pairs) < _SHOWN_PAIRS:
            pairs.append(pair)
    if pairs:
        wanted = {number for pair in pairs for number in pair}
        items = enumerate(islice(image_source.items(), max(wanted) + 1))
        names = {number: item.name for number, item in items if number in wanted}
        found.equal = [(names[first], names[later]) for first, later in pairs]


# Whether a pack is what was written: every byte of it, and every pixel.

_BLOCK = 2**22


def faults(pack: Pack, *, full_list: Path, report: Report) -> list[str]:
    """What is wrong with a pack, nothing if it is whole. DataError if it cannot be read."""
    found = []
    if _sha256(pack) != pack.sha256:
        found.append(f"{pack.path}: its bytes are not those that were written: their SHA-256 differs")
    images, image_source = pack.images(), pack.image_source()
    pixels = Checksum(images.shape)
    problems = Problems(image_source, full_list, report)
    for _, _, image in map_images(
        image_source, lambda item: decode(item.read(), images.preprocessing), problems, title="verifying"
    ):
        pixels.add(image)
    if problems.count:
        found.append(problems.message())
    elif pixels.result(pack.labels) != pack.checksum:
        found.append(
            f"{pack.path}: its pixels are not those of the time of packing. Where the bytes are right, this is the "
            f"decoder: JPEG and lossy WebP may differ by a level between versions (packed with {pack.decoder}, this "
            f"is pillow {pillow_version}). Pack the images anew"
        )
    return found


def _sha256(pack: Pack) -> str:
    """Of all bytes before the trailer."""
    digest = hashlib.sha256()
    try:
        with pack.path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - TRAILER.size
            while left > 0 and (block := file.read(min(_BLOCK, left))):
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise DataError(f"{pack.path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
