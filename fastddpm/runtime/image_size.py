"""The size of images: one number if height and width are equal, otherwise (height, width). Imports no torch."""

from collections.abc import Sequence
from typing import Any

ImageSize = int | tuple[int, int]


def image_size(value: Any) -> Any:
    """Return (height, width), also as a list, in the one form that an image size has; other values as they are."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0] if value[0] == value[1] else tuple(value)
    return value


def sides(size: ImageSize) -> tuple[int, int]:
    """Return (height, width)."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: ImageSize | Sequence[int], times: str = "x") -> str:
    """Return a size as text, width first, as sizes of pictures are written: 640x480."""
    height, width = (size, size) if isinstance(size, int) else size
    return f"{width}{times}{height}"
