"""Count the images of a source, find bad and equal ones, and verify packs.

`scan` reads a source, `survey` some of its headers; `faults` verifies that a pack still has the bytes and pixels that
were written.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from fastddpm.errors import DataError, StorageError
from fastddpm.runtime.progress import announced, discard

from .dataset import Checksum
from .image import Brightness, Levels, Preprocessing, decode, fitted, open_picture, read_header
from .ingest import Problems, Report, map_images
from .pack.format import TRAILER, Pack
from .readers.source import EncodedImage, ImageSource

OTHER = "other"
LOOKED_AT = 2000  # images whose headers `survey` reads
_MAX_SIZES = 1000
_MAX_CLASSES = 100_000
_SHOWN_PAIRS = 20
_READ_BYTES = 2**22  # bytes of a pack that are read and hashed at a time

# Equal images, found in bounded memory

_ROW = np.dtype([("number", "<u8"), ("high", "<u8"), ("low", "<u8")])
_DIGEST_BYTES = 16
_AT_ONCE = 2**20  # digests sorted at a time: about 100 MB, sorting included
_BLOCK = 2**16  # rows of the temporary file that are read at a time


def digest(image: Image.Image) -> bytes:
    """Return a 128-bit digest of an image's size and its pixels as RGB."""
    pixels = image.convert("RGB").tobytes()
    return blake2b(pixels, digest_size=_DIGEST_BYTES, salt=b"%dx%d" % image.size).digest()


class Duplicates:
    """The digests of images, kept in an unnamed temporary file of 24 bytes per image."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._count = 0

    def __enter__(self) -> "Duplicates":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def add(self, number: int, digest: bytes) -> None:
        """Add an image by its number and digest. Raises StorageError if the temporary file cannot be written."""
        try:
            self._file.write(number.to_bytes(8, "little") + digest)
        except OSError as error:
            raise StorageError(f"cannot write a temporary file in {tempfile.gettempdir()}: {error.strerror}") from error
        self._count += 1

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield (first, later) for each image that equals an earlier one: the number of the first equal one, its own.

        The file is read once for every 2^20 images. Each pass sorts one range of digests; digests are evenly spread,
        so the ranges hold about equally many.
        """
        parts = -(-self._count // _AT_ONCE)
        for part in range(parts):
            rows = self._in_range(part, parts)
            rows = rows[np.lexsort((rows["number"], rows["low"], rows["high"]))]
            new = np.append(True, (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1]))
            first = np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
            yield from zip(rows["number"][first[~new]].tolist(), rows["number"][~new].tolist(), strict=True)

    def _in_range(self, part: int, parts: int) -> np.ndarray:
        """Read the rows whose digests lie in the range `part` of `parts` equal ranges."""
        self._file.seek(0)
        chosen = [np.empty(0, _ROW)]
        while data := self._file.read(_BLOCK * _ROW.itemsize):
            rows = np.frombuffer(data, _ROW)
            chosen.append(rows[(rows["high"] >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part])
        return np.concatenate(chosen)


# The contents of a source


@dataclass
class Findings:
    """The result of `scan` or `survey`.

    Counts of good images: `kinds` by "FORMAT MODE", `sizes` by "WIDTHxHEIGHT" (beyond 1,000 sizes by "other"), `sides`
    by the pixels of the shorter side, `classes` by label (`survey`: of all images). `class_names`: in the order of
    labels, empty if there are none. `smallest` and `largest`: pixels of the shorter side. `converted`: good images that
    a background was needed for (`scan`). `mixture`: why images of 32 bits do not go together, or empty. `problems`: the
    message about bad images. `duplicates`: number of images that equal an earlier one, None if they were not compared;
    `equal`: up to 20 of them as (first, later) names.
    """

    source: str
    images: int
    good: int = 0
    encoded_bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    smallest: int = 0
    largest: int = 0
    classes: Counter[int] = field(default_factory=Counter)
    class_names: list[str] = field(default_factory=list)
    bad: int = 0
    converted: int = 0
    mixture: str = ""
    problems: str = ""
    duplicates: int | None = None
    equal: list[tuple[str, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Seen:
    """What `scan` keeps of a good image. `digest` is empty if images are not compared."""

    kind: str
    size: tuple[int, int]
    num_bytes: int
    digest: bytes
    levels: Levels


def scan(
    image_source: ImageSource,
    *,
    preprocessing: Preprocessing | None = None,
    background: str | None = None,
    duplicates: bool = True,
    full_list: Path,
    report: Report,
) -> Findings:
    """Decode every image and count images, kinds, sizes, classes, bad images and, with `duplicates`, equal ones.

    Images are decoded at their own size, on `background` if one is given (see `Preprocessing`); with `preprocessing`
    they must also be usable by it. Equality is that of
    size and pixels, by a 128-bit digest. Memory, beside the source's own list of images: 16 encoded images and one
    decoded image per processor, the counts of 1,000 sizes and of the classes, 100 problems (if there are more, all are
    written to `full_list`), and at most 100 MB for comparing.
    """
    found = _nothing_yet(image_source)
    brightness = Brightness()
    problems = Problems(image_source, full_list, report)

    def look(item: EncodedImage) -> _Seen:
        data = item.read()
        picture = open_picture(data, background if preprocessing is None else preprocessing.background)
        if preprocessing is not None:
            fitted(picture, preprocessing)
        pixels = digest(picture.image) if duplicates else b""
        return _Seen(f"{picture.format} {picture.mode}", picture.image.size, len(data), pixels, picture.levels)

    with Duplicates() as digests:
        for number, item, seen in map_images(image_source, look, problems, title="reading"):
            _count(found, seen)
            _count_class(found, item)
            brightness.add(seen.levels)
            found.converted += seen.levels.converted
            if duplicates:
                digests.add(number, seen.digest)
        found.bad = problems.count
        advice = brightness.note()
        found.notes += (advice,) if advice else ()
        found.mixture = brightness.mixture() or ""
        found.problems = problems.message() if problems.count else ""
        if duplicates:
            _compare(found, digests, image_source)
    return found


def survey(image_source: ImageSource, *, looked_at: int = LOOKED_AT) -> Findings:
    """Read the headers of `looked_at` images, evenly spread over the source, and count the classes of all.

    Takes a small part of the time of `scan`, and sees neither damage behind the header nor equal images. `good` and
    `bad` are numbers of headers. Memory: 16 encoded images per processor.
    """
    found = _nothing_yet(image_source)
    step = max(1, -(-image_source.count // looked_at))

    def some() -> Iterator[EncodedImage]:
        for number, item in enumerate(image_source.items()):
            _count_class(found, item)
            if number % step == 0:
                yield item

    def look(item: EncodedImage) -> _Seen:
        data = item.read()
        header = read_header(data)
        return _Seen(f"{header.format} {header.mode}", header.size, len(data), b"", Levels())

    part = replace(image_source, count=-(-image_source.count // step), items=some)
    problems = Problems(part, Path(os.devnull), discard)  # the decoder lists them
    for _, _, seen in map_images(part, look, problems, title="reading headers"):
        _count(found, seen)
    found.bad = problems.count
    problems.close()
    return found


def _nothing_yet(image_source: ImageSource) -> Findings:
    return Findings(
        image_source.name,
        image_source.count,
        class_names=list(image_source.classes or ()),
        notes=image_source.notes,
    )


def _count(found: Findings, seen: _Seen) -> None:
    found.good += 1
    found.encoded_bytes += seen.num_bytes
    found.kinds[seen.kind] += 1
    size = "{}x{}".format(*seen.size)
    found.sizes[size if size in found.sizes or len(found.sizes) < _MAX_SIZES else OTHER] += 1
    side = min(seen.size)
    found.sides[side] += 1
    found.smallest = side if found.good == 1 else min(found.smallest, side)
    found.largest = max(found.largest, side)


def _count_class(found: Findings, item: EncodedImage) -> None:
    if item.label is not None and (item.label in found.classes or len(found.classes) < _MAX_CLASSES):
        found.classes[item.label] += 1


def _compare(found: Findings, digests: Duplicates, image_source: ImageSource) -> None:
    """Count the equal images and name up to 20 of them; the names are read from the source again."""
    found.duplicates = 0
    pairs: list[tuple[int, int]] = []
    with announced("looking for equal images"):
        for pair in digests.pairs():
            found.duplicates += 1
            if len(pairs) < _SHOWN_PAIRS:
                pairs.append(pair)
        if pairs:
            wanted = {number for pair in pairs for number in pair}
            items = enumerate(islice(image_source.items(), max(wanted) + 1))
            names = {number: item.name for number, item in items if number in wanted}
            found.equal = [(names[first], names[later]) for first, later in pairs]


# Verification of a pack


def faults(pack: Pack, *, full_list: Path, report: Report) -> list[str]:
    """Verify every byte and every pixel of a pack; return a message per fault, an empty list if it is whole.

    Raises DataError if the pack cannot be read.
    """
    found = []
    with announced(f"reading the bytes of {pack.path}"):
        whole = _sha256(pack) == pack.sha256
    if not whole:
        found.append(f"{pack.path}: its bytes are not the ones that were written: their SHA-256 differs")
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
            f"{pack.path}: its pixels are not the ones that were packed. If no other fault is listed, the decoder has "
            f"changed: JPEG and lossy WebP may differ by one level between versions (packed with {pack.decoder}, "
            f"decoded with pillow {pillow_version}). Pack the images again"
        )
    return found


def _sha256(pack: Pack) -> str:
    """Return the SHA-256 of all bytes before the trailer."""
    digest = hashlib.sha256()
    try:
        with pack.path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - TRAILER.size
            while left > 0 and (block := file.read(min(_READ_BYTES, left))):
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise DataError(f"{pack.path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
