"""Decode one encoded image to uint8 pixels, or say why it cannot be used."""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, ImageOps, UnidentifiedImageError, features

from fastddpm.errors import refuse
from fastddpm.runtime.image_size import ImageSize, image_size, sides

Resize = Literal["none", "area", "lanczos"]
RESIZES = ("none", "area", "lanczos")
SUFFIXES = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    **({"TIFF": (".tif", ".tiff")} if features.check("libtiff") else {}),
    **({"AVIF": (".avif",)} if features.check("avif") else {}),
}
"""File name extensions by format; TIFF and AVIF only if the installed Pillow reads them."""
FORMATS = tuple(SUFFIXES)
MAX_PIXELS = 64_000_000
_FILTERS = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_OTHER_COLOURS = ("CMYK", "LAB", "YCbCr", "HSV")
_FEW_BITS = {"1": 255, "L;2": 85, "L;4": 17}  # what the samples of a PNG are multiplied by
_TRANSPARENT = "it has transparent pixels; flatten it onto a background, as --background white does"


class BadImageError(Exception):
    """An image cannot be used; the message gives the reason and, if there is one, the remedy."""


@dataclass(frozen=True)
class Preprocessing:
    """The size and channels C (1 or 3) that every image is decoded to, and how other sizes are resized.

    `image_size`: height and width in pixels, or (height, width). `resize`: "none" refuses other sizes. "area" and
    "lanczos" crop to the largest centred square, or rectangle of that shape (if the margin is odd, the smaller half is
    cut at the left or top), and scale it, up or down, with that antialiasing filter (Pillow's BOX and LANCZOS).

    `background`: a colour, by name or as "#rrggbb", on which transparent images are put; images in CMYK, LAB, YCbCr and
    HSV are then converted to RGB, and 32-bit greys to 8 bits. None refuses these images. Raises UsageError for a colour
    that is unknown or transparent itself.
    """

    image_size: ImageSize
    channels: int
    resize: Resize = "none"
    background: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", image_size(self.image_size))
        check_background(self.background)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of a decoded image."""
        return self.channels, *sides(self.image_size)


def check_background(background: str | None) -> None:
    """Raise UsageError unless `background` is None or an opaque colour."""
    try:
        opaque = background is None or len(ImageColor.getrgb(background)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        refuse([f'the background must be the name of a colour, as in white, or "#rrggbb"; got {background!r:.100}'])


class Levels(NamedTuple):
    """How the stored values of an image became 8 bits.

    `peak`: the largest value of an image with 16 bits per channel, in 0..65535 (of colour at most 255 too high, as
    Pillow keeps the high byte); None for 8 bits, and for 32 bits if there is a background. `top`: the value of white
    that was taken for 32 bits (`_scaled`); None for other images and for black ones. `converted`: whether it took a
    background to convert the image.
    """

    peak: int | None = None
    top: int | None = None
    converted: bool = False


@dataclass(frozen=True)
class Picture:
    """A decoded image file: `format` and `mode` as stored, and `image` in mode L or RGB with EXIF rotation applied."""

    format: str
    mode: str
    image: Image.Image
    levels: Levels


def decode(data: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Decode `data` to uint8 (C, H, W), with EXIF rotation applied. An animation gives its first frame.

    Grey is repeated for 3 channels. 16-bit grey is scaled to 8 bits and rounded; of 16-bit colour Pillow keeps the
    high byte. Raises BadImageError if the file is damaged, not an image, too large or of another size, for colour when
    C is 1, and without `background` for transparency and CMYK, because how to convert them is its owner's choice.
    """
    return as_planes(fitted(open_picture(data, preprocessing.background), preprocessing), preprocessing)


class Brightness:
    """The largest value of all 16-bit images of a set, from which a scale of fewer bits is recognised.

    `tops`: how many images of 32 bits were taken to have each value of white.
    """

    def __init__(self) -> None:
        self.count = 0
        self.peak = 0
        self.tops: Counter[int] = Counter()

    def add(self, levels: Levels) -> None:
        """Add an image; without effect if it has 8 bits."""
        if levels.peak is not None:
            self.count += 1
            self.peak = max(self.peak, levels.peak)
        if levels.top is not None:
            self.tops[levels.top] += 1

    def mixture(self) -> str | None:
        """Return why the images of 32 bits cannot be used together, None if they can: each has its own brightness."""
        if len(self.tops) < 2:
            return None
        groups = ", ".join(f"{number:,} with values up to {top:,}" for top, number in sorted(self.tops.items()))
        return (
            f"its images of 32 bits do not say what white is: {groups}. Scaled each to its own range, dark ones would "
            "become bright; convert all to 8 or 16 bits by one rule first"
        )

    def note(self) -> str | None:
        """Return a line of advice if the images use less than half of the range of 16 bits, else None."""
        if not self.count or self.peak > 65535 // 2:
            return None
        bits = max(1, self.peak.bit_length())
        return (
            f"{self.count:,} images have 16 bits, but their largest value is {self.peak:,} of 65,535, so they will be "
            f"dark. If they hold {bits}-bit data, multiply their values by {65535 // (2**bits - 1)} first"
        )


@dataclass(frozen=True)
class Header:
    """What the header of an image file says: format, mode, and the size (width, height) before any EXIF rotation."""

    format: str
    mode: str
    size: tuple[int, int]


def read_header(data: bytes) -> Header:
    """Read the header of an encoded image, without its pixels. Raises BadImageError if there is none."""
    with _reasons(), _open(data) as image:
        return Header(image.format or "", image.mode, image.size)


def open_picture(data: bytes, background: str | None = None) -> Picture:
    """Decode `data` at its own size, on the `background` of `Preprocessing`. Raises BadImageError as `decode` does."""
    with _reasons(), _open(data) as image:
        stored = image.format or "", image.mode
        deep_colour = any(";16" in str(tile.args) for tile in image.tile) and image.mode not in _SIXTEEN_BITS
        _scale_transparent_value(image)
        image.load()
        guess = background is not None and image.mode in ("I", "F") and image.format != "PNG"  # of 32 bits
        peak = None if guess else _largest(image, deep_colour)
        upright = ImageOps.exif_transpose(image)
        if image.mode in _SIXTEEN_BITS or (image.mode == "F" and background is not None):
            grey, top = _scaled(upright, background, guess=guess)
            return Picture(*stored, grey, Levels(peak, top, converted=image.mode == "F" or grey.mode == "RGB"))
        converted, needed = _eight_bits(upright, background)
        return Picture(*stored, converted, Levels(peak, None, needed))


def _scale_transparent_value(image: ImageFile.ImageFile) -> None:
    """Give the transparent grey or colour of a PNG the scale of its pixels, which Pillow leaves as stored.

    Pixels of 1, 2 and 4 bits are scaled to 8; of 16-bit colour the high bytes are kept, and compared. Some versions of
    Pillow scale the value of 1 bit themselves.
    """
    value, stored = image.info.get("transparency"), str(image.tile[0].args) if image.tile else ""
    if isinstance(value, int) and stored in _FEW_BITS:
        image.info["transparency"] = min(255, value * _FEW_BITS[stored])
    elif isinstance(value, tuple) and stored.startswith("RGB;16"):
        image.info["transparency"] = tuple(sample >> 8 for sample in value)


def fitted(picture: Picture, preprocessing: Preprocessing) -> Image.Image:
    """Convert a picture to the channels (mode L or RGB) and size of `preprocessing`.

    Raises BadImageError as `decode` does.
    """
    with _reasons():
        return fit(_to_channels(picture.image, preprocessing.channels), preprocessing)


def fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Crop and resize an image to the size of `preprocessing`.

    Raises BadImageError if it has another size and `resize` is "none".
    """
    height, width = sides(preprocessing.image_size)
    size = (width, height)
    if image.size == size:
        return image
    if preprocessing.resize == "none":
        raise BadImageError(f"{image.width}x{image.height}, expected {width}x{height}; --resize area crops and resizes")
    # The largest rectangle of that shape in whole pixels, and at least one of them.
    across = max(1, min(image.width, image.height * width // height))
    down = max(1, min(image.height, image.width * height // width))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.resize(size, _FILTERS[preprocessing.resize], box=(left, top, left + across, top + down))


def as_planes(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Return an image that has the size and channels of `preprocessing` as uint8 (C, H, W)."""
    channels, height, width = preprocessing.shape
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


@contextmanager
def _open(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """Open an encoded image, of which only the header is read yet."""
    if not data:
        raise BadImageError("the file is empty")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise BadImageError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are decoded")
        yield image


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn any exception inside the block into a BadImageError that gives the reason."""
    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"its header claims far more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # a damaged file can raise nearly anything
        if "MAX_TEXT" in str(error):
            raise BadImageError("it carries more text than Pillow reads; save it without its text chunks") from error
        raise BadImageError(f"damaged: {str(error) or type(error).__name__}") from error


def _eight_bits(image: Image.Image, background: str | None) -> tuple[Image.Image, bool]:
    """Convert at most 8 bits per channel to mode L or RGB, without a background only if that loses nothing.

    Also returns whether the background was needed. Raises BadImageError if it cannot be done.
    """
    mode = image.mode
    if mode in _OTHER_COLOURS and background is not None:
        return _to_rgb(image), True
    if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"):
        advice = "" if background is not None else ", or let --background white do it"
        raise BadImageError(
            f"its colour mode is {mode}, whose conversion needs a colour profile; convert it to RGB{advice}"
        )
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        transparent = rgba.getchannel("A").getextrema() != (255, 255)
        if transparent:
            if background is None:
                raise BadImageError(_TRANSPARENT)
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba)
        return rgba.convert("RGB"), transparent
    return image.convert("L" if mode in ("1", "L") else "RGB"), False


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert another colour space to sRGB: LAB, and CMYK that has a colour profile, by that, the rest by Pillow."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif image.mode == "CMYK" and profile and features.check("littlecms2"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        except (OSError, ImageCms.PyCMSError):  # a damaged profile says nothing; the pixels are whole
            return image.convert("RGB")
    else:
        return image.convert("RGB")
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # None is for a conversion in place
    return converted


def _largest(image: Image.Image, deep_colour: bool) -> int | None:
    """Return the largest value of an image with 16 bits per channel, None for another."""
    if image.mode in _SIXTEEN_BITS:
        return int(np.asarray(image).max())
    if deep_colour:
        return 255 + 256 * max(int(band.getextrema()[1]) for band in image.split()[:3])  # type: ignore[arg-type]
    return None


def _scaled(image: Image.Image, background: str | None, *, guess: bool) -> tuple[Image.Image, int | None]:
    """Scale grey of 16 or 32 bits to 8, rounded to nearest. Pillow's own conversion would clip it to 255.

    16 bits are 0 to 65535. A file of 32 bits does not say its range: with a background (`guess`) it is taken as the
    smallest that holds the values, of 0 to 1 (floats), 0 to 255 and 0 to 65535. That one is returned, too, unless all
    values are 0; `Brightness` refuses a set that would mix them.
    """
    values = np.asarray(image).astype(np.float64 if image.mode == "F" else np.int64)
    tops = ((1, 255, 65535) if image.mode == "F" else (255, 65535)) if guess else (65535,)
    top = next((top for top in tops if values.max() <= top), None)
    if top is None or not values.min() >= 0:
        found = "NaN" if np.isnan(values).any() else f"{values.min():g} to {values.max():g}"
        ranges = "0 to " + " or 0 to ".join(map(str, tops)) if guess else "16 bits, 0 to 65535"
        raise BadImageError(f"its values are {found}; expected {ranges}")
    scaled = values * 255 / top + 0.5 if image.mode == "F" else (values * 255 + top // 2) // top
    grey = Image.fromarray(scaled.astype(np.uint8))
    guessed = top if guess and values.max() > 0 else None
    transparent = values == image.info.get("transparency", -1)
    if not transparent.any():
        return grey, guessed
    if background is None:
        raise BadImageError(_TRANSPARENT)
    flat = Image.composite(Image.new("RGB", grey.size, background), grey.convert("RGB"), Image.fromarray(transparent))
    return flat, guessed


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    if channels == 3:
        return image.convert("RGB")
    if image.mode == "L":
        return image
    pixels = np.asarray(image)
    if (pixels[..., :1] != pixels).any():
        raise BadImageError("it is in colour; the model has 1 channel: use --image-channels 3, or grey images")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0]))
