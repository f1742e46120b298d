"""One encoded image to uint8 pixels, or the reason why not."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Resize = Literal["none", "area", "lanczos"]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 64_000_000
_FILTERS = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


class BadImageError(Exception):
    """Why an image cannot be used, and what to do about it."""


@dataclass(frozen=True)
class Rule:
    """What every image is turned into: its size, channels and, for other sizes, how.

    resize "area" and "lanczos" cut out the centre square and scale it with that antialiasing filter (Pillow's
    BOX and LANCZOS); "none" refuses other sizes.
    """

    image_size: int
    channels: int
    resize: Resize = "none"


def decode(data: bytes, rule: Rule) -> np.ndarray:
    """The image in `data`, uint8 (C, S, S). EXIF rotation is applied; of an animation the first frame counts.

    Raises BadImageError for what is damaged, not an image, too large, of another size, or cannot become C
    channels of 8 bits without a choice that is its owner's: real transparency, CMYK, colour for a grey model.
    """
    if not data:
        raise BadImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImageError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are decoded")
            image.load()
            pixels = _to_channels(_eight_bits(ImageOps.exif_transpose(image)), rule.channels)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"its header claims far more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise BadImageError(f"damaged: {str(error) or type(error).__name__}") from error
    return (
        np.asarray(_to_size(pixels, rule), dtype=np.uint8)
        .reshape(rule.image_size, rule.image_size, -1)
        .transpose(2, 0, 1)
    )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Mode L or RGB. 16-bit grey is scaled by 255/65535 and rounded, where Pillow's own conversion clips it."""
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError("32-bit integers; save it with 8 or 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if mode == "F":
        raise BadImageError("floating-point pixels; save it with 8 or 16 bits")
    if mode in ("CMYK", "LAB", "HSV", "YCbCr") and mode != "YCbCr":
        raise BadImageError(f"its colours are {mode}, which need a profile; convert it to RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            raise BadImageError("it has transparent pixels; flatten it onto a background")
        return rgba.convert("L" if mode in ("LA", "La") else "RGB")
    return image if mode in ("L", "RGB") else image.convert("L" if mode == "1" else "RGB")


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    if channels == 3:
        return image.convert("RGB")
    if image.mode == "RGB":
        pixels = np.asarray(image)
        if (pixels[..., :1] != pixels).any():
            raise BadImageError("it is in colour but the model is grey; use --image-channels 3, or grey images")
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0]))
    return image


def _to_size(image: Image.Image, rule: Rule) -> Image.Image:
    size = (rule.image_size, rule.image_size)
    if image.size == size:
        return image
    if rule.resize == "none":
        raise BadImageError(f"{image.width}x{image.height}, expected {size[0]}x{size[1]}; --resize area fits it")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize(size, _FILTERS[rule.resize], box=(left, top, left + side, top + side))
