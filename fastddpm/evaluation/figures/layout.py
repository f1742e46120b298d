"""Lay out pictures: panels of images side by side, with labels, as PNG or GIF."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastddpm.sampling.images import grid, labelled, save_animation, save_png, to_uint8

# In pixels: the approximate width of a picture, the least width of an image in it, and the gap between panels.
_WIDTH, _LEAST, _GAP = 640, 40, 10


@dataclass(frozen=True, eq=False)
class Panel:
    """A grid of images, `cells`, uint8 (R, K, C, H, W), and `texts`, one above each of the K columns."""

    cells: np.ndarray
    texts: Sequence[str]


def save_panels(panels: Sequence[Panel], path: Path, rows: Sequence[str] = ()) -> Path:
    """Write a PNG of `panels` side by side, with the texts `rows` at the left of the rows, and return its path."""
    side = panels[0].cells.shape[-1]
    columns = sum(panel.cells.shape[1] for panel in panels)
    scale = max(_WIDTH // (columns * side), -(-_LEAST // side), 1)
    pictures = [
        labelled(
            panel.cells.reshape(-1, *panel.cells.shape[2:]), panel.cells.shape[1], column_labels=panel.texts,
            row_labels=() if i else rows, scale=scale,
        )
        for i, panel in enumerate(panels)
    ]  # fmt: skip
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    canvas, left = Image.new(pictures[0].mode, (width, pictures[0].height), "white"), 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + _GAP
    save_png(canvas, path)
    return path


def save_frames(frames: Sequence[np.ndarray], path: Path, columns: int | None = None) -> Path:
    """Write a GIF of frames, each a grid of images uint8 (N, C, H, W), and return its path.

    `columns`: images in a row. Default: as many as make the grid about square.
    """
    save_animation([grid(images, columns) for images in frames], path)
    return path


def levels(x: np.ndarray) -> np.ndarray:
    """Convert states, float32 (.., C, H, W), to uint8, clipped to [-1, 1] and rounded as by `to_uint8`."""
    return to_uint8(torch.from_numpy(x).flatten(0, -4)).reshape(x.shape)
