"""Pictures: grids and animations of uint8 images, written whole or not at all."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

GRID_PIXELS = 512  # small images are enlarged until the grid is about this wide
_BACKGROUND = 128


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Floats in [-1, 1], (N, C, H, W), as uint8: clipped, then rounded to the nearest of 256 levels.

    Rounding, not truncation, which would darken every image by half a level. Raises ValueError for NaN.
    """
    if bool(torch.isnan(x).any()):
        raise ValueError("images hold NaN; the network's weights are damaged or training diverged")
    return ((x.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None, *, padding: int = 2, scale: int | None = None) -> Image.Image:
    """Images, uint8 (N, C, H, W) with C of 1 or 3, row by row in one picture.

    `columns`: the smallest square that holds them unless given. `scale`: each pixel becomes a square of
    scale x scale; chosen so that the grid is about 512 pixels wide unless given. `padding`: pixels between
    images, after scaling. Raises ValueError for other shapes or no image.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid takes uint8 (N, 1 or 3, H, W), N > 0; got {images.dtype} {images.shape}")
    num, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    scale = scale or max(1, GRID_PIXELS // (columns * width))
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    height, width = height * scale, width * scale
    canvas = np.full(
        (rows * (height + padding) - padding, columns * (width + padding) - padding, channels), _BACKGROUND, np.uint8
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + padding), i % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG beside `path` and rename it there."""
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def save_animation(frames: Sequence[Image.Image], path: Path, *, duration_ms: int = 80, hold_ms: int = 2000) -> None:
    """Write an endlessly repeated GIF that rests on its last frame; ValueError without frames.

    Grey frames keep their levels exactly; colour frames share the 256 colours that suit the last one.
    """
    if not frames:
        raise ValueError("an animation needs at least one frame")
    if frames[0].mode != "L":
        palette = frames[-1].quantize(256, method=Image.Quantize.MEDIANCUT)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    temporary = path.with_name(f".{path.name}.tmp")
    durations = [duration_ms] * (len(frames) - 1) + [hold_ms]
    # Frames that look alike are kept, so that time passes evenly.
    frames[0].save(
        temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False
    )
    os.replace(temporary, path)
