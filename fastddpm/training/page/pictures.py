"""The pictures of a run as data URIs of bounded size."""

import base64
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

from fastddpm.data.image import BadImageError, open_picture
from fastddpm.storage.reading import read_bytes

MOST_PREVIEWS = 12
_PREVIEW_SIDE = 400  # pixels a preview is reduced to; it is shown half as large
_GRID_SIDE = 1600
_SMALL_BYTES = {_PREVIEW_SIDE: 48 * 2**10, _GRID_SIDE: 512 * 2**10}  # of a file that is embedded as it is
_ANIMATION_BYTES = 2_000_000  # what save_animation writes at most
_MOST_BYTES = 2**26
_SHOWN = ("PNG", "JPEG", "WEBP", "GIF")  # formats that every browser shows
_PREVIEW = re.compile(r"step-([0-9]{8,12})\.png")


@dataclass(frozen=True)
class Embedded:
    """A picture as a data URI, with its size in pixels. `still`: its last frame, of an animation."""

    uri: str
    width: int
    height: int
    still: str = ""


def embedded_grid(path: Path) -> Embedded | None:
    """Return the grid in a file for a wide page; None if there is none. Raises `BadImageError`."""
    return _embedded(path, _GRID_SIDE)


def embedded_previews(run: Path) -> tuple[list[tuple[int, Embedded]], int, list[str]]:
    """Return (step, picture) of at most 12 previews of a run, evenly chosen, how many there are, and problems."""
    try:
        found = sorted(
            (int(match[1]), path) for path in (run / "previews").iterdir() if (match := _PREVIEW.fullmatch(path.name))
        )
    except OSError:
        return [], 0, []
    places = np.linspace(0, len(found) - 1, min(len(found), MOST_PREVIEWS)).round().astype(int)
    pictures, problems = [], []
    for place in places.tolist():
        step, path = found[place]
        try:
            picture = _embedded(path, _PREVIEW_SIDE)
        except BadImageError as error:
            problems.append(f"{path.name} cannot be shown: {error}.")
            continue
        if picture is not None:
            pictures.append((step, picture))
    return pictures, len(found), problems


def embedded_animation(run: Path) -> Embedded | None:
    """Return the animation denoising.webp or denoising.gif of a run, the newer one; None if there is none.

    Raises `BadImageError` if it cannot be read or has more than 2 MB.
    """
    paths = [path for suffix in (".webp", ".gif") if (path := run / f"denoising{suffix}").is_file()]
    if not paths:
        return None
    path = max(paths, key=lambda path: path.stat().st_mtime)
    data = _read(path, _ANIMATION_BYTES)
    picture = open_picture(data)
    if picture.format not in _SHOWN:
        raise BadImageError(f"a {picture.format}, not an animation")
    with Image.open(io.BytesIO(data)) as frames:
        try:
            frames.seek(getattr(frames, "n_frames", 1) - 1)
            last = frames.convert("RGB")
        except (OSError, EOFError, ValueError, SyntaxError) as error:
            raise BadImageError(f"damaged ({error})") from error
    still = _uri(*_encoded(last))
    return Embedded(_uri(data, picture.format), picture.image.width, picture.image.height, still)


def _embedded(path: Path, side: int) -> Embedded | None:
    """Return a picture of at most `side` pixels: the file as it is if it is small, otherwise encoded again."""
    if not path.is_file():
        return None
    data = _read(path, _MOST_BYTES)
    picture = open_picture(data)
    image = picture.image
    if len(data) > _SMALL_BYTES[side] or picture.format not in _SHOWN:
        factor = math.ceil(max(image.size) / side)
        image = image.reduce(factor) if factor > 1 else image
        return Embedded(_uri(*_encoded(image)), *image.size)
    return Embedded(_uri(data, picture.format), *image.size)


def _read(path: Path, limit: int) -> bytes:
    """Return the bytes of a file. Raises `BadImageError`."""
    try:
        return read_bytes(path, limit)
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error
    except ValueError as error:
        raise BadImageError(str(error)) from error


def _encoded(image: Image.Image) -> tuple[bytes, str]:
    name = "WEBP" if features.check("webp") else "JPEG"
    file = io.BytesIO()
    image.save(file, format=name, quality=85)
    return file.getvalue(), name


def _uri(data: bytes, name: str) -> str:
    return f"data:image/{name.lower()};base64,{base64.b64encode(data).decode()}"
