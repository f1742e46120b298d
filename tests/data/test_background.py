"""A background: transparency is put on it, and every mode that Pillow writes converted, against NumPy in float64."""

import dataclasses
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folder import Load, load, png, source, without_classes
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from fastddpm.data import __main__ as command
from fastddpm.data.cache import decoded
from fastddpm.data.image import FORMATS, BadImageError, Preprocessing, decode, open_picture, read_header
from fastddpm.data.pack.format import open_pack
from fastddpm.data.pack.writer import write_pack
from fastddpm.data.sources import open_image_source
from fastddpm.errors import DataError, UsageError

__all__ = ["load", "source"]

RNG = np.random.default_rng(5)
COLOUR = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
VALUES = RNG.integers(0, 65536, (8, 8)).astype(np.uint16)
ON_WHITE = Preprocessing(8, 3, background="white")


def pixels(data: bytes, background: str | None = "white") -> np.ndarray:
    """What is decoded, float64 (H, W, 3)."""
    return decode(data, dataclasses.replace(ON_WHITE, background=background)).transpose(1, 2, 0).astype(np.float64)


def over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """The equation of compositing, float64."""
    share = alpha[..., None] / 255
    return share * colour + (1 - share) * np.asarray(background)


@pytest.mark.parametrize(("name", "rgb"), [("white", (255, 255, 255)), ("#204060", (32, 64, 96))])
def test_transparency_is_put_on_the_background(name: str, rgb: tuple[int, int, int]) -> None:
    rgba = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    greys = np.repeat(GREY[..., None], 3, -1)
    for kind in ("PNG", "TIFF"):
        assert np.abs(pixels(png(rgba, kind), name) - over(COLOUR, ALPHA, rgb)).max() <= 1
        assert np.abs(pixels(png(la, kind), name) - over(greys, ALPHA, rgb)).max() <= 1
    palette = Image.fromarray(COLOUR).quantize(16)
    hole = int(np.asarray(palette)[2, 3])
    shown = np.where((np.asarray(palette) == hole)[..., None], rgb, np.asarray(palette.convert("RGB")))
    for kind in ("PNG", "GIF"):
        np.testing.assert_array_equal(pixels(png(palette, kind, transparency=hole), name), shown)


def test_a_transparent_value_of_16_bits_is_put_on_the_background() -> None:
    header = struct.pack(">IIBBBBB", 8, 8, 16, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in VALUES)
    data = encoded(header, rows, struct.pack(">H", VALUES[1, 1]))
    expected = np.repeat(np.round(VALUES / 257.0)[..., None], 3, -1)
    expected[VALUES[1, 1] == VALUES] = (255, 165, 0)
    np.testing.assert_array_equal(pixels(data, "orange"), expected)


def test_cmyk_without_a_profile_is_the_product_of_inks() -> None:
    inks = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    data = png(Image.fromarray(inks, "CMYK"), "TIFF")
    assert np.abs(pixels(data) - expected).max() <= 1
    with pytest.raises(BadImageError, match=r"colour mode is CMYK.*or let --background white do it"):
        pixels(data, None)


def test_cmyk_with_a_profile_is_converted_by_it() -> None:
    """A profile of another space stands for one of inks, which no package ships: it does not fit, so it is refused."""
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with pytest.raises(BadImageError, match="cannot build transform"):
        pixels(png(Image.new("CMYK", (8, 8)), "TIFF", icc_profile=wrong))


def test_ycbcr_is_that_of_jpeg() -> None:
    y, cb, cr = RNG.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    planes = [Image.fromarray(plane) for plane in (y, cb, cr)]
    blue, red = cb.astype(float) - 128, cr.astype(float) - 128
    expected = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], -1).clip(0, 255)
    assert np.abs(pixels(png(Image.merge("YCbCr", planes), "TIFF")) - expected).max() <= 1.6


def test_lab_is_converted_by_its_definition() -> None:
    lightness = np.arange(3, 256, 4, dtype=np.uint8).reshape(8, 8)
    neutral = Image.new("L", (8, 8), 128)
    data = png(Image.merge("LAB", [Image.fromarray(lightness), neutral, neutral]), "TIFF")
    f = (lightness * 100.0 / 255 + 16) / 116
    y = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    expected = 255 * np.where(y > 0.0031308, 1.055 * y ** (1 / 2.4) - 0.055, 12.92 * y)
    assert np.abs(pixels(data) - expected[..., None]).max() <= 2
    red, green = (Image.new("LAB", (8, 8), (128, a, 128)) for a in (200, 56))
    assert pixels(png(red, "TIFF"))[0, 0].argmax() == 0 and pixels(png(green, "TIFF"))[0, 0].argmax() == 1


def test_greys_of_32_bits_take_the_smallest_range_that_holds_them() -> None:
    grey = np.repeat(GREY[..., None], 3, -1).astype(float)
    wide = np.repeat(np.round(VALUES / 257.0)[..., None], 3, -1)
    assert GREY.max() > 1 and VALUES.max() > 255
    for values, expected in (
        (GREY.astype(np.int32), grey),
        (VALUES.astype(np.int32), wide),
        ((GREY / 255).astype(np.float32), grey),
        (GREY.astype(np.float32), grey),
        (VALUES.astype(np.float32), wide),
    ):
        np.testing.assert_array_equal(pixels(png(values, "TIFF")), expected)
    for wrong in (np.full((8, 8), 65536, np.int32), np.full((8, 8), -1, np.float32), np.full((8, 8), np.nan, "f4")):
        with pytest.raises(BadImageError, match=r"its values are .*; expected 0 to .*65535$"):
            pixels(png(wrong, "TIFF"))
    dark = png(np.full((8, 8), 4000, np.int32), "TIFF")
    assert open_picture(dark).levels.peak == 4000 and open_picture(dark, "white").levels.peak is None


def test_images_of_32_bits_with_different_ranges_are_refused(
    tmp_path: Path, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dark image of a set up to 65535 would be taken for a bright one up to 255; a black one fits all."""
    root = tmp_path / "deep"
    root.mkdir()
    bright, black = VALUES.astype(np.float32), np.zeros((8, 8), np.float32)
    for name, values in (("a", bright), ("b", bright * (200 / bright.max())), ("c", black)):
        (root / f"{name}.tiff").write_bytes(png(values, "TIFF"))
    message = "images of 32 bits do not say what white is: 1 with values up to 255, 1 with values up to 65,535"
    with pytest.raises(DataError, match=message):
        load(source=root, background="white")
    with pytest.raises(DataError, match=message):
        write_pack(open_image_source(root), tmp_path / "x.fdpack", Preprocessing(8, 3, "none", "white"), report=print)
    assert not (tmp_path / "x.fdpack").exists()
    with pytest.raises(DataError, match=message):
        command.main(["inspect", str(root)])
    assert "next: nothing can be trained on, before images of 32 bits have one range" in capsys.readouterr().out
    (root / "b.tiff").unlink()
    images = load(source=root, background="white").images
    np.testing.assert_array_equal(images[:, 0], np.stack([np.round(VALUES / 257.0), black]))


def test_a_png_of_16_bits_is_never_taken_for_one_of_32() -> None:
    """Its white is 65535, however dark it is."""
    np.testing.assert_array_equal(pixels(png((VALUES // 1000).astype(np.uint16))), 0)


def test_a_png_with_very_much_text_is_not_called_damaged() -> None:
    text, file = PngInfo(), io.BytesIO()
    text.add_text("x", "y" * 2**21, zip=True)
    Image.fromarray(GREY).save(file, "PNG", pnginfo=text)
    with pytest.raises(
        BadImageError, match=r"^it carries more text than Pillow reads; save it without its text chunks$"
    ):
        pixels(file.getvalue())


def test_a_damaged_colour_profile_is_left_out_of_account() -> None:
    file = io.BytesIO()
    Image.fromarray(COLOUR).convert("CMYK").save(file, "JPEG", icc_profile=b"no profile", quality=100)
    with Image.open(io.BytesIO(file.getvalue())) as image:
        np.testing.assert_array_equal(pixels(file.getvalue()), np.asarray(image.convert("RGB")))


def test_exact_images_are_the_same_with_a_background() -> None:
    for data in (png(COLOUR), png(GREY), png(VALUES), png(COLOUR, "TIFF"), png(COLOUR, "JPEG"), png(GREY > 99)):
        np.testing.assert_array_equal(pixels(data), pixels(data, None))


def test_every_mode_that_pillow_writes_is_read() -> None:
    """From one picture, whose grey or colour must be found again."""
    smooth = np.asarray(Image.fromarray(COLOUR[:2, :2]).resize((8, 8), Image.Resampling.BICUBIC))
    picture, tried = Image.fromarray(smooth), 0
    grey = np.repeat(np.asarray(picture.convert("L"))[..., None], 3, -1).astype(float)
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"):
        image = picture.convert("L").convert("I").convert(mode) if mode == "I;16" else None
        image = image or (picture.convert("P").convert("PA") if mode == "PA" else picture.convert(mode))
        expected = grey if mode in ("L", "LA", "I", "F") else np.asarray(image.convert("RGB")).astype(float)
        if mode == "I;16":
            expected = np.round(grey / 257)
        for kind in FORMATS:
            file = io.BytesIO()
            try:
                image.save(file, kind)
            except (OSError, ValueError, KeyError):  # this format does not store this mode
                continue
            if kind in ("AVIF", "GIF", "WEBP") and mode in ("I", "I;16", "F"):
                continue  # clipped when it was written
            tried += 1
            near = np.abs(pixels(file.getvalue()) - expected).mean()
            assert near <= (0 if kind in ("PNG", "BMP", "TIFF") and mode not in ("YCbCr", "CMYK") else 25), (mode, kind)
    assert tried >= 35


def test_a_header_says_mode_and_size_without_the_pixels() -> None:
    data = png(np.zeros((5, 7, 3), np.uint8))
    assert dataclasses.astuple(read_header(data[:60])) == ("PNG", "RGB", (7, 5))
    for wrong in (b"", b"text", data[:20]):
        with pytest.raises(BadImageError):
            read_header(wrong)


@pytest.mark.parametrize("name", ["purple-ish", "#12", "", "#ffffff80"])
def test_another_background_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match='must be the name of a colour, as in white, or "#rrggbb"; got'):
        Preprocessing(8, 3, background=name)


# Sets of images


@pytest.fixture
def transparent(tmp_path: Path) -> Path:
    """Two hundred pictures of 8x8, half of them with transparency."""
    root = tmp_path / "transparent"
    root.mkdir()
    for i in range(200):
        layers = [COLOUR ^ i, ALPHA] if i % 2 else [COLOUR ^ i]
        (root / f"{i:03}.png").write_bytes(png(np.dstack(layers)))
    return root


def test_the_cache_tells_backgrounds_apart(transparent: Path, load: Load) -> None:
    white, black = (load(source=transparent, background=name, report=print).images for name in ("white", "black"))
    np.testing.assert_array_equal(white[::2], black[::2])
    assert np.abs(white[1].transpose(1, 2, 0) - over(COLOUR ^ 1, ALPHA, (255, 255, 255))).max() <= 1
    assert np.abs(black[1].transpose(1, 2, 0) - over(COLOUR ^ 1, ALPHA, (0, 0, 0))).max() <= 1
    with pytest.raises(DataError, match=r"100 images: it has transparent pixels"):
        load(source=transparent)


@pytest.mark.parametrize("store", ["fitted", "original"])
@pytest.mark.parametrize("size", [8, 4])
def test_a_pack_keeps_the_background(transparent: Path, tmp_path: Path, store: str, size: int) -> None:
    preprocessing = Preprocessing(size, 3, "area", "red")
    opened = open_image_source(transparent)
    path = tmp_path / "x.fdpack"
    pack = write_pack(opened, path, preprocessing, store=store, report=print)  # type: ignore[arg-type]
    array = decoded(opened, preprocessing, skip_bad=False, directory=tmp_path / "cache", report=print)
    np.testing.assert_array_equal(pack.images()[:], array.images)
    assert pack.checksum == array.checksum and open_pack(path).preprocessing == preprocessing


def test_a_pack_of_an_older_version_has_no_background() -> None:
    from fastddpm.data.pack.format import _rule

    rule = {"image_size": 8, "channels": 3, "resize": "none"}
    said = {"version": 1, "store": "fitted", "rule": rule}
    assert _rule(said) == (Preprocessing(8, 3), "fitted")
    with pytest.raises(ValueError, match="background is not of the type str"):
        _rule(json.loads(json.dumps(said | {"rule": rule | {"background": 3}})))


# A share of bad images


@pytest.mark.parametrize(("bad", "allowed"), [(1, 0.01), (2, 0.01), (2, 0.02), (1, 0.0)])
def test_bad_images_up_to_a_share_are_left_out(tmp_path: Path, load: Load, bad: int, allowed: float) -> None:
    root = tmp_path / "some"
    root.mkdir()
    for i in range(100):
        (root / f"{i:03}.png").write_bytes(b"no picture" if i < bad else png(COLOUR ^ i))
    lines: list[str] = []
    if bad > 100 * allowed:
        more = f"more than {100 * allowed:g}% of all: " if allowed else ""
        with pytest.raises(
            DataError, match=rf"{bad} of 100 images[\s\S]*\n{more}mend or remove them, or use --skip-bad"
        ):
            load(source=root, skip_bad=allowed, report=lines.append)
        return
    dataset = load(source=root, skip_bad=allowed, report=lines.append)
    np.testing.assert_array_equal(dataset.images[0], (COLOUR ^ bad).transpose(2, 0, 1))
    (said,) = without_classes(lines)[:1]
    assert len(dataset.images) == 100 - bad and said.endswith(f"left out, as they are at most {100 * allowed:g}%")
    assert "000.png" in said and "not an image of a known format" in said


@pytest.mark.parametrize("of_all", ["lowest", "highest", "any"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits_is_put_on_the_background(bits: int, of_all: str) -> None:
    values = RNG.integers(0, 2**bits, (8, 8))
    hole = {"lowest": 0, "highest": 2**bits - 1, "any": int(values[3, 4])}[of_all]
    values[3, 4] = hole
    flat = ((values[..., None] >> np.arange(bits)[::-1]) & 1).reshape(8, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(flat.astype(np.uint8), axis=-1))
    data = encoded(struct.pack(">IIBBBBB", 8, 8, bits, 0, 0, 0, 0), rows, struct.pack(">H", hole))
    grey = np.round(values * 255 / (2**bits - 1))[..., None]
    expected = np.where((values == hole)[..., None], (255, 0, 0), grey)
    np.testing.assert_array_equal(pixels(data, "red"), expected)
    with pytest.raises(BadImageError, match="transparent"):
        decode(data, Preprocessing(8, 3))


def test_a_transparent_colour_of_16_bits_is_put_on_the_background() -> None:
    values = RNG.integers(0, 65536, (8, 8, 3))
    hole = values[1, 2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = encoded(struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), rows, struct.pack(">HHH", *hole.tolist()))
    expected = np.where((values == hole).all(-1)[..., None], (255, 0, 0), values >> 8)
    np.testing.assert_array_equal(pixels(data, "red"), expected)


def encoded(header: bytes, rows: bytes, transparent: bytes) -> bytes:
    """A PNG of these chunks."""
    chunks = b"IHDR" + header, b"tRNS" + transparent, b"IDAT" + zlib.compress(rows), b"IEND"
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
