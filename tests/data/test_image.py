"""Decoding one image: exact pixels for every kind of file that is taken, a reason for every one that is not."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from fastddpm.data.image import FORMATS, BadImageError, Brightness, Preprocessing, decode, open_picture

RNG = np.random.default_rng(3)
COLOUR = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)  # (H, W, C)
GREY = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
RGB, L = Preprocessing(32, 3), Preprocessing(32, 1)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG by hand, of rows that each start with their filter byte; nothing checks that they are enough."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + after
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def grey16(values: np.ndarray, *before: bytes) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, 0, rows, *before)


def with_alpha(mode: str, alpha: int) -> Image.Image:
    image = Image.fromarray(COLOUR if mode == "RGBA" else GREY).convert(mode)
    layer = Image.new("L", (32, 32), 255)
    layer.putpixel((31, 31), alpha)
    image.putalpha(layer)
    return image


def reason(data: bytes, preprocessing: Preprocessing = RGB) -> str:
    with pytest.raises(BadImageError) as error:
        decode(data, preprocessing)
    return str(error.value)


def planes(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) as (3, H, W), (H, W) repeated three times."""
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else np.stack([pixels] * 3)


PALETTE = Image.fromarray(COLOUR).quantize(16)
KINDS = {
    "RGB": (encoded(COLOUR), COLOUR),
    "L": (encoded(GREY), GREY),
    "BMP": (encoded(COLOUR, "BMP"), COLOUR),
    "lossless WebP": (encoded(COLOUR, "WEBP", lossless=True), COLOUR),
    "GIF": (encoded(GREY, "GIF"), GREY),
    "palette": (encoded(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "1 bit": (encoded(Image.fromarray(GREY > 99)), np.where(GREY > 99, 255, 0).astype(np.uint8)),
    "opaque RGBA": (encoded(with_alpha("RGBA", 255)), COLOUR),
    "opaque LA": (encoded(with_alpha("LA", 255)), GREY),
    "animated GIF": (encoded(GREY, "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)] * 3), GREY),
    "APNG": (encoded(COLOUR, "PNG", save_all=True, append_images=[Image.fromarray(255 - COLOUR)] * 3), COLOUR),
    "animated WebP": (
        encoded(COLOUR, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - COLOUR)]),
        COLOUR,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lossless_kinds_are_exact(kind: str) -> None:
    data, pixels = KINDS[kind]
    decoded = decode(data, RGB)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, planes(pixels))


@pytest.mark.parametrize("kind", ["L", "1 bit", "opaque LA", "animated GIF"])
def test_grey_for_a_grey_model(kind: str) -> None:
    data, pixels = KINDS[kind]
    np.testing.assert_array_equal(decode(data, L), pixels[None])


def test_colour_of_equal_channels_is_grey_and_other_colour_is_refused() -> None:
    np.testing.assert_array_equal(decode(encoded(np.stack([GREY] * 3, -1)), L), GREY[None])
    one_off = np.stack([GREY] * 3, -1)
    one_off[31, 31, 2] ^= 1
    assert reason(encoded(one_off), L) == (
        "it is in colour; the model has 1 channel: use --image-channels 3, or grey images"
    )


def test_jpeg_is_what_the_library_decodes() -> None:
    smooth = np.asarray(Image.fromarray(COLOUR[:4, :4]).resize((32, 32), Image.Resampling.BICUBIC))
    data = encoded(smooth, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode(data, RGB), planes(np.asarray(image)))
    assert np.abs(decode(data, RGB).astype(int) - planes(smooth)).mean() < 3


def test_sixteen_bits_are_scaled_and_rounded_not_clipped() -> None:
    values = np.linspace(0, 65535, 32 * 32).round().astype(np.int64).reshape(32, 32)
    expected = [round(v / 257) for v in values.ravel().tolist()]  # no ties: 257 is odd
    np.testing.assert_array_equal(decode(grey16(values), L).ravel(), expected)
    assert decode(grey16(values), L)[0, -1, -1] == 255 and decode(grey16(values), L)[0, 16, 0] == 128


@pytest.mark.parametrize("kind", ["TIFF", "AVIF"])
def test_formats_that_pillow_may_lack(kind: str) -> None:
    if kind not in FORMATS:
        pytest.skip(f"this Pillow does not read {kind}")
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    if kind == "AVIF":
        data = encoded(np.full((32, 32, 3), 90, np.uint8), kind)
        assert np.abs(decode(data, RGB).astype(int) - 90).max() <= 2
        return
    for options in ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}):
        np.testing.assert_array_equal(decode(encoded(COLOUR, kind, **options), RGB), planes(COLOUR))
    turned = decode(encoded(COLOUR, kind, exif=exif), RGB)
    np.testing.assert_array_equal(turned, planes(np.rot90(COLOUR, -1)))
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    np.testing.assert_array_equal(decode(encoded(values, kind), L)[0], (values.astype(int) * 255 + 32767) // 65535)
    for wrong in (values.astype(np.int32) * 2, -values.astype(np.int32)):
        assert "expected 16 bits, 0 to 65535" in reason(encoded(wrong, kind), L)
    assert "its colour mode is F" in reason(encoded(values.astype(np.float32), kind), L)


def test_the_largest_of_16_bit_values_is_noticed() -> None:
    values = np.zeros((32, 32), np.int64)
    values[3, 5] = 4095
    colour = np.zeros((32, 32, 3), np.int64)
    colour[3, 5, 1] = 4095
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    brightness = Brightness()
    brightness.add(open_picture(encoded(COLOUR)).levels)
    assert brightness.note() is None
    for data in (grey16(values), grey16(values // 2), png(32, 32, 16, 2, rows)):
        brightness.add(open_picture(data).levels)
    assert brightness.note() == (
        "3 images have 16 bits, but their largest value is 4,095 of 65,535, so they will be dark. If they hold 12-bit "
        "data, multiply their values by 16 first"
    )
    brightness.add(open_picture(grey16(values * 9)).levels)  # 36,855
    assert brightness.note() is None


def test_sixteen_bit_colour_keeps_the_high_byte() -> None:
    values = RNG.integers(0, 65536, (32, 32, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    np.testing.assert_array_equal(decode(png(32, 32, 16, 2, rows), RGB), planes(values >> 8))


ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encoded(COLOUR, exif=exif), RGB), planes(ORIENTATIONS[orientation](COLOUR)))


def test_real_transparency_is_reported() -> None:
    for image in (with_alpha("RGBA", 254), with_alpha("LA", 0)):
        assert "transparent" in reason(encoded(image))
    assert "transparent" in reason(encoded(PALETTE, transparency=int(np.asarray(PALETTE)[0, 0])))
    assert "transparent" in reason(encoded(GREY, transparency=int(GREY[0, 0])))
    assert "transparent" in reason(encoded(GREY, transparency=int(GREY[0, 0])), L)
    values = np.full((32, 32), 1000)
    assert "transparent" in reason(grey16(values, chunk(b"tRNS", struct.pack(">H", 1000))), L)
    np.testing.assert_array_equal(decode(grey16(values, chunk(b"tRNS", struct.pack(">H", 1001))), L), 4)
    # A transparent colour that no pixel has leaves the image opaque.
    unused = GREY | 1
    np.testing.assert_array_equal(decode(encoded(unused, transparency=0), L), unused[None])


RENAMED = {
    "EPS": encoded(COLOUR, "EPS"),
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "PSD": b"8BPS\x00\x01".ljust(100, b"\0"),
    "PPM": encoded(COLOUR, "PPM"),
    "text": b"this is not an image\n" * 10,
}


@pytest.mark.parametrize("kind", RENAMED)
def test_other_formats_are_refused_by_content(kind: str) -> None:
    assert reason(RENAMED[kind]) == f"not an image of a known format ({', '.join(FORMATS)})"


def test_an_empty_file_cmyk_and_wrong_sizes_have_their_reasons() -> None:
    assert reason(b"") == "the file is empty"
    assert "CMYK" in reason(encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG"))
    for width, height in ((64, 48), (1, 1), (1, 10000), (32, 33)):
        assert reason(encoded(np.zeros((height, width, 3), np.uint8))) == (
            f"{width}x{height}, expected 32x32; --resize area crops and resizes"
        )


@pytest.mark.parametrize(("width", "height"), [(65535, 65535), (12000, 12000), (8001, 8000), (1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_headers_are_refused_before_decoding(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert "64,000,000" in reason(png(width, height, 8, 2, b""), Preprocessing(32, 3, "area"))


def test_only_the_first_of_very_many_frames_is_read() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in COLOUR)
    control = struct.pack(">IIIIHHBB", 32, 32, 0, 0, 1, 10, 0, 0)
    later = zlib.compress(bytes(len(rows)))
    frames = b"".join(
        chunk(b"fcTL", struct.pack(">I", 2 * i + 1) + control) + chunk(b"fdAT", struct.pack(">I", 2 * i + 2) + later)
        for i in range(20_000)
    )
    data = png(
        32, 32, 8, 2, rows,
        chunk(b"acTL", struct.pack(">II", 20_001, 0)), chunk(b"fcTL", struct.pack(">I", 0) + control),
        after=frames,
    )  # fmt: skip
    np.testing.assert_array_equal(decode(data, RGB), planes(COLOUR))


TRUNCATABLE = {
    "PNG": encoded(COLOUR),
    "JPEG": encoded(COLOUR, "JPEG"),
    "WEBP": encoded(COLOUR, "WEBP", lossless=True),
    "BMP": encoded(COLOUR, "BMP"),
    "GIF": encoded(GREY, "GIF"),
}
WHOLE = {kind: decode(data, RGB) for kind, data in TRUNCATABLE.items()}


@given(kind=st.sampled_from(sorted(TRUNCATABLE)), part=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(kind: str, part: float) -> None:
    """A missing end marker and checksums may be forgiven, but then every pixel must be there."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = TRUNCATABLE[kind]
    data = data[: int(part * len(data))]
    try:
        decoded = decode(data, RGB)
    except BadImageError:
        return
    assert len(data) >= len(TRUNCATABLE[kind]) - 20  # a PNG's end chunk, the CRC before it and that of zlib
    np.testing.assert_array_equal(decoded, WHOLE[kind])


@given(position=st.integers(0, len(TRUNCATABLE["PNG"]) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_png_never_changes_a_pixel(position: int, bit: int) -> None:
    data = bytearray(TRUNCATABLE["PNG"])
    data[position] ^= 1 << bit
    try:
        decoded = decode(bytes(data), RGB)
    except BadImageError:
        return
    np.testing.assert_array_equal(decoded, WHOLE["PNG"])


@given(
    kind=st.sampled_from(sorted(TRUNCATABLE)), position=st.floats(0, 1, exclude_max=True), noise=st.binary(max_size=8)
)
def test_damage_gives_a_reason_or_pixels_never_another_error(kind: str, position: float, noise: bytes) -> None:
    data = bytearray(TRUNCATABLE[kind])
    start = int(position * len(data))
    data[start : start + len(noise)] = noise
    try:
        decoded = decode(bytes(data), Preprocessing(32, 3, "area"))
    except BadImageError as error:
        assert str(error)
        return
    assert decoded.shape == (3, 32, 32) and decoded.dtype == np.uint8


def filtered(pixels: np.ndarray, size: int, resize: str) -> np.ndarray:
    """Separable resampling in float64, (S, S, C) from a square: the definition of an antialiasing filter.

    Output i weighs input j by f((j + 1/2 - c) / scale), c = (i + 1/2) scale, where f is 1 on (-1/2, 1/2] for area
    and sinc(x) sinc(x/3) on (-3, 3) for lanczos, both stretched only when scaling down.
    """
    count = pixels.shape[0]
    scale = count / size
    stretch = max(scale, 1.0)
    offsets = (np.arange(count)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / stretch
    if resize == "area":
        weights = ((offsets > -0.5) & (offsets <= 0.5)).astype(np.float64)
    else:
        weights = np.where(np.abs(offsets) < 3, np.sinc(offsets) * np.sinc(offsets / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("ij,kl,jlc->ikc", weights, weights, pixels)


@pytest.mark.parametrize("resize", ["area", "lanczos"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 48), (33, 90), (40, 40), (20, 20)])
def test_resizing_crops_the_centre_and_filters(width: int, height: int, resize: str) -> None:
    corners = RNG.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))
    side = min(width, height)
    top, left = math.floor((height - side) / 2), math.floor((width - side) / 2)
    square = pixels[top : top + side, left : left + side].astype(np.float64)
    expected = filtered(square, 32, resize).clip(0, 255)
    decoded = decode(encoded(pixels), Preprocessing(32, 3, resize)).transpose(1, 2, 0)  # type: ignore[arg-type]
    # Two passes, each rounded to 8 bits and clipped.
    assert np.abs(decoded - expected).max() <= 1.5


def test_area_of_whole_blocks_is_exact() -> None:
    blocks = COLOUR.repeat(2, 0).repeat(2, 1)
    wide = np.concatenate([np.zeros((64, 7, 3), np.uint8), blocks, np.full((64, 8, 3), 255, np.uint8)], 1)
    np.testing.assert_array_equal(decode(encoded(wide), Preprocessing(32, 3, "area")), planes(COLOUR))


def test_extreme_shapes_resize() -> None:
    for width, height in ((1, 1), (1, 10000), (10000, 1)):
        image = np.full((height, width, 3), 77, np.uint8)
        for resize in ("area", "lanczos"):
            assert (decode(encoded(image), Preprocessing(32, 3, resize)) == 77).all()  # type: ignore[arg-type]
