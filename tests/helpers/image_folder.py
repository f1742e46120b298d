"""A folder of thirty images in three classes, what it decodes to, and how to open it."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm.data import Dataset, open_dataset
from fastddpm.data.dataset import checksum

PIXELS = np.random.default_rng(8).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
PLANES = PIXELS.transpose(0, 3, 1, 2)
Load = Callable[..., Dataset]


def opener(cache: Path, image_size: int) -> Load:
    """`open_dataset` for colour images of one size, with a cache of its own and without its lines."""

    def opened(source: Path, **options: object) -> Dataset:
        wanted = {"image_size": image_size, "channels": 3, "cache": cache, "report": lambda _: None} | options
        return open_dataset(source, **wanted)  # type: ignore[arg-type]

    return opened


def without_classes(lines: list[str]) -> list[str]:
    """The lines that were reported, but for the one that names the classes whenever data are opened."""
    return [line for line in lines if "classes: " not in line]


def png(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Thirty images in three classes."""
    root = tmp_path / "images"
    for i, pixels in enumerate(PIXELS):
        path = root / f"{i // 10}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return root


@pytest.fixture
def load(source: Path, tmp_path: Path) -> Load:
    def opened(**options: object) -> Dataset:
        wanted = {"source": source, "image_size": 8, "channels": 3, "cache": tmp_path / "cache"} | options
        return open_dataset(**wanted)  # type: ignore[arg-type]

    return opened


def check(dataset: Dataset) -> None:
    np.testing.assert_array_equal(dataset.images, PLANES)
    assert dataset.labels is not None and dataset.labels.tolist() == [i // 10 for i in range(30)]
    assert dataset.checksum == checksum(PLANES, np.arange(30) // 10)
