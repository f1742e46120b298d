"""How pictures are laid out: blocks of images side by side, with texts, a file for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastddpm.sampling.images import grid, labelled, save_animation, save_png, to_uint8

# Pixels: how wide a picture is about, how wide an image in it is at least, and what is between two blocks.
_WIDTH, _LEAST, _GAP = 640, 40, 10


@dataclass(frozen=True, eq=False)
class Panel:
    """Columns of a picture that belong together: `cells`, uint8 (R, K, C, H, W), and a text above each column."""

    cells: np.ndarray
    texts: Sequence[str]


def save_panels(blocks: Sequence[Panel], path: Path, rows: Sequence[str] = ()) -> Path:
    """A PNG of `blocks` side by side, with texts left of `rows`; its path."""
    side = blocks[0].cells.shape[-1]
    columns = sum(block.cells.shape[1] for block in blocks)
    scale = max(_WIDTH // (columns * side), -(-_LEAST // side), 1)
    pictures = [
        labelled(
            block.cells.reshape(-1, *block.cells.shape[2:]), block.cells.shape[1], column_labels=block.texts,
            row_labels=() if i else rows, scale=scale,
        )
        for i, block in enumerate(blocks)
    ]  # fmt: skip
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    canvas, left = Image.new(pictures[0].mode, (width, pictures[0].height), "white"), 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + _GAP
    save_png(canvas, path)
    return path


def save_frames(frames: Sequence[np.ndarray], path: Path, columns: int | None = None) -> Path:
    """A GIF whose frames are grids of uint8 (N, C, H, W), square unless `columns` is given; its path."""
    save_animation([grid(images, columns) for images in frames], path)
    return path


def levels(x: np.ndarray) -> np.ndarray:
    """States, float32 (.., C, H, W), as uint8: clipped to [-1, 1] and rounded, as `figures.to_uint8` does."""
    return to_uint8(torch.from_numpy(x).flatten(0, -4)).reshape(x.shape)
