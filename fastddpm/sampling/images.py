"""Grids, PNG files and animations of uint8 images. A file is written whole or not at all."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features

from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.progress import announced
from fastddpm.storage.files import write_whole

GRID_PIXELS = 512  # small images are enlarged until the grid is about this wide
# Of an animation at most, so that browsers and repositories show it at once.
ANIMATION_BYTES = {".gif": 2_000_000, ".webp": 1_000_000}
_DARK = 32  # grey level around the pictures of an animation
_WEBP_QUALITIES = (80, 60, 40)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Convert floats in [-1, 1], (N, C, H, W), to uint8: clip, then round to the nearest of 256 levels.

    Level k stands for x = k / 127.5 - 1; this inverts the scaling of training images. Truncation instead of rounding
    would darken every image by half a level. Infinities are clipped. Raises `DataError`, a ValueError, for NaN, and
    `UsageError` for other shapes and dtypes.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise UsageError(f"images must be floats, (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    if bool(torch.isnan(x).any()):
        raise DataError("images contain NaN: the network's weights are damaged, or training diverged")
    # To float32 first: bfloat16 has only 8 bits for x + 1.
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def grid(
    images: np.ndarray,
    columns: int | None = None,
    *,
    padding: int = 2,
    scale: int | None = None,
    background: int = 128,
) -> Image.Image:
    """Arrange images, uint8 (N, C, H, W) with C = 1 or 3, row by row in one picture of mode L or RGB.

    `columns`: images in a row. Default: those of the smallest square grid. `scale`: side in pixels of the square that
    each pixel becomes. Default: enlarges small images until the grid is about 512 pixels wide. `padding`: pixels
    between images, after scaling, of the grey level `background`. Raises `UsageError` for other shapes, dtypes or
    ranges.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3) or not images.size:
        raise UsageError(f"a grid takes uint8 (N, 1 or 3, H, W), all sizes positive; got {images.dtype} {images.shape}")
    num, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(num)) if columns is None else columns
    if columns < 1 or padding < 0 or (scale is not None and scale < 1) or not 0 <= background <= 255:
        raise UsageError(
            f"a grid needs columns >= 1, scale >= 1, padding >= 0 and background in 0..255; "
            f"got {columns}, {scale}, {padding} and {background}"
        )
    rows = math.ceil(num / columns)
    scale = max(1, GRID_PIXELS // (columns * width)) if scale is None else scale
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    height, width = height * scale, width * scale
    canvas = np.full(
        (rows * (height + padding) - padding, columns * (width + padding) - padding, channels), background, np.uint8
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + padding), i % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def labelled(
    images: np.ndarray,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """Arrange `images` as `grid` does, with a text to the left of each row and above each column.

    Texts are black on white margins, centred on their row or column, and never begin left of the picture. Rows and
    columns beyond the texts given stay without one. `scale`: as for `grid`. Default: also enlarges images until a
    column is as wide as its text. Raises `UsageError` as `grid` does.
    """
    padding, margin = 2, 4
    font = ImageFont.load_default()
    if scale is None:
        widest = max((math.ceil(font.getlength(text)) for text in column_labels), default=0)
        scale = max(1, GRID_PIXELS // (columns * images.shape[-1]), math.ceil(widest / images.shape[-1]))
    picture = grid(images, columns, padding=padding, scale=scale)
    left = max((math.ceil(font.getlength(text)) + 2 * margin for text in row_labels), default=0)
    _, above, _, below = font.getbbox("0Ag|")
    top = math.ceil(below) + 2 * margin if column_labels else 0
    canvas = Image.new(picture.mode, (left + picture.width, top + picture.height), "white")
    canvas.paste(picture, (left, top))

    draw = ImageDraw.Draw(canvas)
    height, width = (side * scale + padding for side in images.shape[-2:])
    for i, text in enumerate(column_labels):
        before = left + i * width + (width - padding - font.getlength(text)) / 2
        draw.text((max(before, margin), margin), text, fill="black", font=font)
    for i, text in enumerate(row_labels):
        middle = top + i * height + (height - padding) / 2
        draw.text((margin, middle - (above + below) / 2), text, fill="black", font=font)
    return canvas


def beside(panels: Sequence[tuple[str, np.ndarray]], scale: int | None = None) -> Image.Image:
    """Return one picture, L or RGB, of grids side by side, each with a caption above it, light on dark grey.

    `panels`: caption and images, uint8 (N, C, H, W), all of one shape. `scale`: as for `grid`. Captions are cut at the
    edge of their grid. Raises `UsageError` as `grid` does.
    """
    font, margin = ImageFont.load_default(), 8
    grids = [grid(images, scale=scale, background=_DARK) for _, images in panels]
    width, height = grids[0].size
    top = math.ceil(font.getbbox("0Ag|")[3]) + 2 * margin
    size = (len(grids) * (width + margin) + margin, top + height + margin)
    canvas = Image.new(grids[0].mode, size, (_DARK,) * len(grids[0].getbands()))
    draw = ImageDraw.Draw(canvas)
    for i, ((caption, _), picture) in enumerate(zip(panels, grids, strict=True)):
        left = margin + i * (width + margin)
        while caption and font.getlength(caption) > width:
            caption = caption[:-1]
        draw.text((left, margin), caption, fill="white", font=font)
        canvas.paste(picture, (left, top))
    return canvas


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG. A reader of `path` finds the old file or the new one, never a part. Raises `StorageError`."""
    write_whole(path, lambda temporary: image.save(temporary, format="PNG"))


def animation_suffix() -> str:
    """Return the suffix of animations in the better format that Pillow writes here: ".webp", otherwise ".gif"."""
    return ".webp" if features.check("webp") else ".gif"


def save_animation(
    frames: Sequence[Image.Image],
    path: Path,
    *,
    duration_ms: int = 80,
    hold_ms: int = 2000,
    most_bytes: int | None = None,
) -> None:
    """Write a GIF or an animated WebP, by the suffix of `path`, that repeats endlessly and rests on its last frame.

    `frames` have one size and one mode: L or RGB. In a GIF grey levels stay exact and frames of mode RGB share 256
    colours; a WebP is lossy. `duration_ms`: time of a frame; `hold_ms`: time of the last one; 10 to 600,000 ms, stored
    in hundredths of a second in a GIF. Equal frames in a row are stored as one that lasts as long. If the file would be
    larger than `most_bytes` (default: 2 MB as GIF, 1 MB as WebP), a WebP gets a lower quality, and if that is not
    enough, half of the frames are left out, evenly and again until it is; the first, the last and the time stay. Raises
    `UsageError` for other frames, times and suffixes, and `StorageError`.
    """
    kinds = {(frame.mode, frame.size) for frame in frames}
    if len(kinds) != 1 or kinds.pop()[0] not in ("L", "RGB"):
        raise UsageError("an animation needs one or more frames of one size, all of mode L or all of mode RGB")
    if not all(10 <= duration <= 600_000 for duration in (duration_ms, hold_ms)):
        raise UsageError(f"a frame lasts 10 to 600,000 ms; got duration_ms {duration_ms} and hold_ms {hold_ms}")
    if path.suffix not in ANIMATION_BYTES:
        raise UsageError(f"an animation is written as .gif or .webp; got {path.name}")
    most_bytes = ANIMATION_BYTES[path.suffix] if most_bytes is None else most_bytes
    durations = [duration_ms] * (len(frames) - 1) + [hold_ms]
    with announced(f"writing {path}"):
        if path.suffix == ".gif" and frames[0].mode == "RGB":
            palette = _shared_palette(frames)
            frames = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
        data = _encoded(frames, durations, path.suffix, most_bytes)
        while len(data) > most_bytes and len(frames) > 2:
            kept = np.linspace(0, len(frames) - 1, max(2, len(frames) // 2)).round().astype(int).tolist()
            durations = [sum(durations[a:b]) for a, b in zip(kept, [*kept[1:], len(frames)], strict=True)]
            frames = [frames[i] for i in kept]
            data = _encoded(frames, durations, path.suffix, most_bytes)
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def _encoded(frames: Sequence[Image.Image], durations: Sequence[int], suffix: str, most_bytes: int) -> bytes:
    """Encode frames that last `durations` ms each; a WebP in the best quality that gives at most `most_bytes`."""
    first, *others = frames
    options = {"save_all": True, "append_images": others, "duration": list(durations), "loop": 0}
    if suffix == ".gif":
        return _saved(first, format="GIF", optimize=False, **options)
    for quality in _WEBP_QUALITIES:
        data = _saved(first, format="WEBP", quality=quality, method=2, **options)
        if len(data) <= most_bytes:
            break
    return data


def _saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def _shared_palette(frames: Sequence[Image.Image]) -> Image.Image:
    """Return an image whose palette of 256 colours covers the colours of the frames.

    It is computed from at most 8 frames, reduced to 128 pixels, for speed. Dithering reaches only colours between those
    of the palette, so coverage is better than Pillow's default, median cut: averaged over 4 x 4 pixels, the error of 40
    frames of 64 images is 2.3 levels (root mean square) instead of 10.
    """
    chosen = frames[:: -math.ceil(len(frames) / 8)]
    width, height = (min(side, 128) for side in chosen[0].size)
    mosaic = Image.new("RGB", (width, height * len(chosen)))
    for i, frame in enumerate(chosen):
        mosaic.paste(frame.resize((width, height), Image.Resampling.NEAREST), (0, i * height))
    return mosaic.quantize(256, method=Image.Quantize.MAXCOVERAGE)
