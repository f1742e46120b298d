"""Pictures, read back and compared pixel by pixel with layouts built one pixel at a time."""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.sampling.images import beside, grid, save_animation, save_png, to_uint8

needs_webp = pytest.mark.skipif(not features.check("webp"), reason="this installation of Pillow writes no WebP")


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def expected_pixel(images: np.ndarray, columns: int, padding: int, scale: int, background: int, y: int, x: int) -> list:
    """What a grid shows at (y, x), from the definition."""
    num, channels, height, width = images.shape
    row, dy = divmod(y, height * scale + padding)
    column, dx = divmod(x, width * scale + padding)
    i = row * columns + column
    if dy >= height * scale or dx >= width * scale or i >= num:
        return [background] * channels
    return images[i, :, dy // scale, dx // scale].tolist()


# Levels


def test_every_level_survives_the_round_trip() -> None:
    levels = torch.arange(256)
    for dtype in (torch.float32, torch.float64):
        x = (levels.to(dtype) / 127.5 - 1).reshape(1, 1, 16, 16)
        assert to_uint8(x).ravel().tolist() == levels.tolist()


def test_levels_are_the_nearest() -> None:
    x = torch.linspace(-1.2, 1.2, 20_001)
    levels = to_uint8(x.reshape(1, 1, 1, -1)).ravel()
    for value, level in zip(x.tolist()[::7], levels.tolist()[::7], strict=True):
        exact = min(max((Fraction(value) + 1) * Fraction(255, 2), 0), 255)
        assert abs(exact - level) <= Fraction(1, 2) + Fraction(1, 10**4)
    # truncation would be off by -0.5 on average
    inside = (x.abs() <= 1).numpy()
    assert abs(np.mean(levels[inside] - (x.numpy()[inside].astype(np.float64) + 1) * 127.5)) < 0.01


def test_low_precision_is_widened_before_scaling() -> None:
    x = torch.linspace(-1, 1, 999).bfloat16().reshape(1, 1, 1, -1)
    assert np.abs(to_uint8(x) - (x.double().numpy() + 1) * 127.5).max() <= 0.5 + 1e-4


def test_out_of_range_clips() -> None:
    x = torch.tensor([-torch.inf, -7.0, 7.0, torch.inf], requires_grad=True).reshape(1, 1, 2, 2)
    assert to_uint8(x).ravel().tolist() == [0, 0, 255, 255]


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        to_uint8(torch.tensor([0.0, torch.nan]).reshape(1, 1, 1, 2))
    with pytest.raises(UsageError, match=r"\(3, 4, 4\)"):
        to_uint8(torch.zeros(3, 4, 4))
    with pytest.raises(UsageError, match="uint8"):
        to_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


# Grids


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("num", "height", "width", "columns", "padding", "scale", "background"),
    [
        (1, 4, 4, None, 2, 1, 128),
        (5, 3, 4, None, 2, 2, 128),  # 3 columns, one place empty, not square
        (7, 4, 3, 2, 0, 3, 255),
        (3, 2, 2, 5, 1, 1, 0),  # columns to spare
    ],
)
def test_grid_layout(
    num: int,
    height: int,
    width: int,
    columns: int | None,
    padding: int,
    scale: int,
    background: int,
    channels: int,
    tmp_path: Path,
) -> None:
    images = random_images(num, channels, height, width)
    picture = grid(images, columns, padding=padding, scale=scale, background=background)
    save_png(picture, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as opened:
        assert opened.format == "PNG"
        assert opened.mode == {1: "L", 3: "RGB"}[channels]
        pixels = np.asarray(opened).reshape(opened.height, opened.width, channels)
    wide = columns or {1: 1, 5: 3}[num]
    rows = -(-num // wide)
    assert pixels.shape[:2] == (rows * (height * scale + padding) - padding, wide * (width * scale + padding) - padding)
    for y, x in np.ndindex(pixels.shape[:2]):
        assert pixels[y, x].tolist() == expected_pixel(images, wide, padding, scale, background, y, x), (y, x)


@pytest.mark.parametrize(
    ("num", "size", "width"), [(64, 32, 8 * 64 + 14), (64, 16, 8 * 64 + 14), (1, 512, 512), (4, 300, 602), (1, 28, 504)]
)
def test_small_images_are_enlarged(num: int, size: int, width: int) -> None:
    assert grid(random_images(num, 1, size, size)).width == width


@pytest.mark.parametrize(
    "images",
    [
        random_images(3, 8, 8),
        random_images(2, 2, 8, 8),
        random_images(0, 3, 8, 8),
        random_images(2, 3, 0, 8),
        random_images(2, 3, 8, 8).astype(np.float32),
    ],
)
def test_grid_refuses_other_arrays(images: np.ndarray) -> None:
    with pytest.raises(UsageError, match="a grid takes uint8"):
        grid(images)


@pytest.mark.parametrize(
    "options", [{"columns": 0}, {"columns": -2}, {"scale": 0}, {"padding": -1}, {"background": 256}]
)
def test_grid_refuses_other_options(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="a grid needs"):
        grid(random_images(2, 3, 8, 8), **options)


# Animations


def read_animation(path: Path) -> tuple[list[np.ndarray], list[int], int]:
    """Frames as uint8 (H, W, 3), their durations in ms, and the number of repetitions, 0 for endless."""
    with Image.open(path) as opened:
        assert opened.format == path.suffix[1:].upper()
        frames, durations = [], []
        for k in range(opened.n_frames):
            opened.seek(k)
            frames.append(np.asarray(opened.convert("RGB")))
            durations.append(opened.info["duration"])
        return frames, durations, opened.info["loop"]


def grey_frames() -> Iterator[np.ndarray]:
    """Frames that differ everywhere, in a corner only, and in the last pixel; all 256 levels in the first."""
    everything = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    yield everything
    yield np.random.default_rng(1).permutation(everything.ravel()).reshape(32, 32)
    corner = everything.copy()
    corner[:5, :7] = random_images(5, 7)
    yield corner
    last = corner.copy()
    last[-1, -1] ^= 1
    yield last


def test_grey_animation_is_exact(tmp_path: Path) -> None:
    frames = list(grey_frames())
    save_animation([Image.fromarray(frame) for frame in frames], tmp_path / "a.gif", duration_ms=50, hold_ms=700)
    read, durations, loop = read_animation(tmp_path / "a.gif")
    assert len(read) == len(frames)
    for got, frame in zip(read, frames, strict=True):
        assert np.array_equal(got, frame[:, :, None].repeat(3, axis=2))
    assert durations == [50, 50, 50, 700]
    assert loop == 0


def test_equal_frames_keep_their_time(tmp_path: Path) -> None:
    first, second, *_ = (Image.fromarray(frame) for frame in grey_frames())
    save_animation([first, first, second, second], tmp_path / "a.gif", duration_ms=80, hold_ms=1000)
    read, durations, _ = read_animation(tmp_path / "a.gif")
    assert [frame[:, :, 0].tolist() for frame in read] == [np.asarray(first).tolist(), np.asarray(second).tolist()]
    assert durations == [160, 1080]


def test_a_single_frame(tmp_path: Path) -> None:
    frame = random_images(16, 16)
    save_animation([Image.fromarray(frame)], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as opened:
        assert np.array_equal(np.asarray(opened.convert("L")), frame)


def smooth_picture(seed: int) -> np.ndarray:
    """Random colours at a few places, and in between them; float (64, 64, 3) in 0..255."""
    places = Image.fromarray(random_images(5, 5, 3, seed=seed))
    return np.asarray(places.resize((64, 64), Image.Resampling.BICUBIC)).astype(np.float64)


def test_colour_animation_shares_one_palette(tmp_path: Path) -> None:
    first, last = smooth_picture(1), smooth_picture(2)
    frames = [Image.fromarray(np.uint8(first + (last - first) * k / 11)) for k in range(12)]
    assert all(len(np.unique(np.asarray(frame).reshape(-1, 3), axis=0)) > 1000 for frame in frames)
    save_animation(frames, tmp_path / "a.gif", duration_ms=100, hold_ms=1500)
    read, durations, loop = read_animation(tmp_path / "a.gif")
    assert (len(read), durations, loop) == (12, [100] * 11 + [1500], 0)
    assert len(np.unique(np.concatenate([frame.reshape(-1, 3) for frame in read]), axis=0)) <= 256
    # Dithering errs by pixel, not on average: 1.2 levels here; a palette of the last frame 3.6, median cut 5.1.
    blocks = (np.stack(read) - np.stack([np.asarray(f, float) for f in frames])).reshape(12, 8, 8, 8, 8, 3)
    assert np.sqrt(np.square(blocks.mean(axis=(2, 4))).mean()) < 2


def test_few_colours_stay_exact(tmp_path: Path) -> None:
    colours = np.array([[r, g, b] for r in (0, 255) for g in (16, 128) for b in (64, 200)], dtype=np.uint8)
    frames = [colours[np.random.default_rng(k).integers(0, 8, (16, 16))] for k in range(3)]
    save_animation([Image.fromarray(frame) for frame in frames], tmp_path / "a.gif")
    read, _, _ = read_animation(tmp_path / "a.gif")
    assert np.array_equal(np.stack(read), np.stack(frames))


def test_an_animation_too_large_loses_frames_but_no_time(tmp_path: Path) -> None:
    frames = [Image.fromarray(random_images(64, 64, seed=k)) for k in range(12)]
    save_animation(frames, tmp_path / "whole.gif", duration_ms=50, hold_ms=700)
    most = int(0.55 * (tmp_path / "whole.gif").stat().st_size)
    save_animation(frames, tmp_path / "a.gif", duration_ms=50, hold_ms=700, most_bytes=most)
    assert most / 2 < (tmp_path / "a.gif").stat().st_size <= most
    read, durations, _ = read_animation(tmp_path / "a.gif")
    kept = [0, 2, 4, 7, 9, 11]  # 0 to 11 in 5 equal steps, rounded
    assert [frame[:, :, 0].tolist() for frame in read] == [np.asarray(frames[k]).tolist() for k in kept]
    assert durations == [100, 100, 150, 100, 100, 700] and sum(durations) == 11 * 50 + 700


@needs_webp
def test_webp_keeps_frames_and_time(tmp_path: Path) -> None:
    """Equal frames are one. Smooth pictures lose about 4 levels of 255; other ones would be 60 away."""
    frames = [Image.fromarray(np.uint8(smooth_picture(k))) for k in (1, 1, 2)]
    save_animation(frames, tmp_path / "a.webp", duration_ms=85, hold_ms=705)
    read, durations, loop = read_animation(tmp_path / "a.webp")
    assert (len(read), durations, loop) == (2, [170, 705], 0)
    error = np.stack(read).astype(float) - np.stack([np.asarray(frames[k], float) for k in (0, 2)])
    assert np.sqrt(np.square(error).mean()) < 6


@needs_webp
def test_webp_loses_quality_before_frames(tmp_path: Path) -> None:
    frames = [Image.fromarray(random_images(64, 64, 3, seed=k)) for k in range(8)]
    save_animation(frames, tmp_path / "best.webp", duration_ms=50, hold_ms=700)
    best = (tmp_path / "best.webp").stat().st_size
    for most, count in ((int(0.7 * best), 8), (int(0.4 * best), 4)):
        save_animation(frames, tmp_path / "a.webp", duration_ms=50, hold_ms=700, most_bytes=most)
        read, durations, _ = read_animation(tmp_path / "a.webp")
        assert len(read) == count and sum(durations) == 7 * 50 + 700
        assert (tmp_path / "a.webp").stat().st_size <= most


@needs_webp
@pytest.mark.slow
def test_sixteen_noisy_pictures_of_64_pixels_are_below_one_megabyte(tmp_path: Path) -> None:
    """The worst case: x_t that is noise in 24 frames. The paper's x_T takes every level, so nothing is smooth."""
    smooth = np.uint8(np.tile(smooth_picture(0), (4, 4, 1))).transpose(2, 0, 1)[None]
    frames = [beside([("x_t", random_images(1, 3, 256, 256, seed=k)), ("x_0", smooth)], scale=1) for k in range(24)]
    save_animation(frames, tmp_path / "a.webp")
    assert (tmp_path / "a.webp").stat().st_size <= 1_000_000
    _, durations, _ = read_animation(tmp_path / "a.webp")
    assert sum(durations) == 23 * 80 + 2000


def test_grids_side_by_side_have_captions() -> None:
    images = random_images(4, 1, 10, 10)
    plain = np.asarray(beside([("", images), ("", images[::-1].copy())], scale=4))
    named = np.asarray(beside([("x_t", images), ("a caption that is much longer than its grid", images)], scale=4))
    size = 2 * 10 * 4 + 2
    top = plain.shape[0] - size - 8
    assert plain.shape == named.shape == (top + size + 8, 2 * size + 24)
    assert np.array_equal(plain[top:-8, 8 : 8 + size], np.asarray(grid(images, scale=4, background=32)))
    assert np.array_equal(plain[top:-8, 16 + size : -8], np.asarray(grid(images[::-1].copy(), scale=4, background=32)))
    assert (plain[:top] == 32).all() and named[:top, : 8 + size].max() > 200
    assert (named[:top, -8:] == 32).all() and (named[:top, 8 + size : 16 + size] == 32).all()


def test_animation_refuses_other_frames(tmp_path: Path) -> None:
    grey, colour = Image.new("L", (4, 4)), Image.new("RGB", (4, 4))
    for frames in ([], [grey, colour], [grey, Image.new("L", (4, 5))], [Image.new("RGBA", (4, 4))]):
        with pytest.raises(UsageError, match="an animation needs"):
            save_animation(frames, tmp_path / "a.gif")
    with pytest.raises(UsageError, match=r"as \.gif or \.webp; got a\.mp4"):
        save_animation([grey], tmp_path / "a.mp4")
    for times in ({"duration_ms": 0}, {"duration_ms": -5}, {"hold_ms": 700_000}):
        with pytest.raises(UsageError, match="a frame lasts"):
            save_animation([grey], tmp_path / "a.gif", **times)
    assert list(tmp_path.iterdir()) == []


# Files


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Image.new("L", (8, 8), 10), Image.new("L", (8, 8), 20)
    for path, write in ((tmp_path / "a.png", save_png), (tmp_path / "a.gif", lambda i, p: save_animation([i], p))):
        write(old, path)
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(StorageError, match=f"cannot write {path}: No space left on device"):
                write(new, path)
        assert path.read_bytes() == before
        assert not list(tmp_path.glob(".*"))
        write(new, path)
        assert np.asarray(Image.open(path).convert("L")).tolist() == [[20] * 8] * 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.png"]
    with pytest.raises(StorageError, match=r"cannot write .*/none/a\.png"):
        save_png(old, tmp_path / "none" / "a.png")
