"""Whether a pack is what was written: every byte of it, and every pixel."""

import hashlib
import os
from pathlib import Path

from PIL import __version__ as pillow_version

from fastddpm.errors import DataError

from .dataset import Checksum
from .decode import decode
from .decoding import each
from .pack import TRAILER, Pack
from .problems import Problems, Report

_BLOCK = 2**22


def faults(pack: Pack, *, full_list: Path, report: Report) -> list[str]:
    """What is wrong with a pack, nothing if it is whole. DataError if it cannot be read."""
    found = []
    if _sha256(pack) != pack.sha256:
        found.append(f"{pack.path}: its bytes are not those that were written: their SHA-256 differs")
    images, collection = pack.images(), pack.collection()
    pixels = Checksum(images.shape)
    problems = Problems(collection, full_list, report)
    for _, _, image in each(collection, lambda item: decode(item.read(), images.rule), problems, title="verifying"):
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
