"""Small packs, and what they decode to."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastddpm.data.image import Preprocessing
from fastddpm.data.pack.format import Pack, Store
from fastddpm.data.pack.writer import write_pack
from fastddpm.data.readers.source import EncodedImage, ImageSource


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """uint8 (H, W, 3) or (H, W) as an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def numbered(count: int, size: int = 8) -> np.ndarray:
    """Random images uint8 (N, 3, S, S); the number of each is in its first pixels, so that order can be read off."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    numbers = np.arange(count)
    pixels[:, :, 0, 0] = np.stack([numbers % 256, numbers // 256, 255 - numbers % 256], 1)
    return pixels


def numbers_of(pixels: np.ndarray) -> list[int]:
    """The numbers of images of `numbered`, with a check that each image is one of them."""
    first = pixels[:, :, 0, 0].astype(int)
    assert (first[:, 0] + first[:, 2] == 255).all()
    numbers: list[int] = (first[:, 0] + 256 * first[:, 1]).tolist()
    return numbers


def collection_of(
    files: Sequence[bytes], labels: Sequence[int | None] | None = None, name: str = "files"
) -> ImageSource:
    """Encoded files as a source, named 0, 1, .."""

    def items() -> Iterator[EncodedImage]:
        for i, data in enumerate(files):
            yield EncodedImage(str(i), None if labels is None else labels[i], lambda data=data: data)  # type: ignore[misc]

    return ImageSource(name, len(files), [], items)


def packed(path: Path, pixels: np.ndarray, labels: Sequence[int] | None = None, store: Store = "fitted") -> Pack:
    """A pack of images uint8 (N, 3, S, S)."""
    files = [encoded(image.transpose(1, 2, 0)) for image in pixels]
    preprocessing = Preprocessing(pixels.shape[-1], 3)
    return write_pack(collection_of(files, labels), path, preprocessing, store=store, report=print)
