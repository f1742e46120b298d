"""Images that are not square: cropping, packs, the digits, masks, and the one form that a size has."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.packs import collection_of, encoded
from PIL import Image

from fastddpm.data import open_dataset
from fastddpm.data.image import BadImageError, Preprocessing, decode
from fastddpm.data.inputs import read_hole
from fastddpm.data.pack.format import TRAILER, open_pack
from fastddpm.data.pack.writer import write_pack
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.image_size import size_text
from fastddpm.training.given import Given
from fastddpm.training.network_sizes import unet_of

RNG = np.random.default_rng(5)
WIDE = Preprocessing((8, 24), 3, "area")


def averaged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, 3) as (3, H / factor, W / factor), by means."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    return pixels.reshape(height, factor, width, factor, 3).mean((1, 3)).transpose(2, 0, 1)


# One side is cropped to the shape 8:24, with the smaller half of an odd margin at the top or left.
@pytest.mark.parametrize(
    ("height", "width", "kept"),
    [
        (16, 48, np.s_[:, :]),
        (21, 48, np.s_[2:18, :]),
        (16, 53, np.s_[:, 2:50]),
    ],
)
def test_the_largest_part_of_that_shape_is_kept(height: int, width: int, kept: tuple[slice, slice]) -> None:
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = decode(encoded(pixels), WIDE)
    assert ours.shape == (3, 8, 24)
    assert np.abs(ours - averaged(pixels[kept], 2)).max() <= 1  # two passes, each rounded


def test_one_row_of_pixels_has_a_part_of_any_shape() -> None:
    assert decode(encoded(np.full((1, 2, 3), 7, np.uint8)), Preprocessing((2, 64), 3, "area")).tolist() == np.full(
        (3, 2, 64), 7
    ).tolist()  # fmt: skip


def test_another_size_is_refused_with_both_named_width_first() -> None:
    with pytest.raises(BadImageError, match="48x16, expected 24x8; --resize area crops and resizes"):
        decode(encoded(np.zeros((16, 48, 3), np.uint8)), Preprocessing((8, 24), 3))
    assert (size_text((8, 24)), size_text(32)) == ("24x8", "32x32")


def test_equal_sides_are_one_number() -> None:
    """As JSON gives them, too; so cache entries and packs of squares have the names and bytes that they had."""
    assert Preprocessing((8, 8), 3) == Preprocessing(8, 3) == Preprocessing([8, 8], 3)  # type: ignore[arg-type]
    assert Preprocessing([8, 24], 3) == Preprocessing((8, 24), 3)  # type: ignore[arg-type]


def test_a_pack(tmp_path: Path) -> None:
    """It has the pixels and the checksum of the same images decoded, and is for one size."""
    files = [encoded(RNG.integers(0, 256, (20, 50, 3), dtype=np.uint8)) for _ in range(4)]
    made = write_pack(collection_of(files), tmp_path / "x.fdpack", WIDE, report=lambda line: None)
    assert open_pack(made.path).preprocessing == WIDE
    dataset = open_dataset(made.path, image_size=(8, 24), channels=3, cache=tmp_path / "cache")
    np.testing.assert_array_equal(dataset.images[:], np.stack([decode(data, WIDE) for data in files]))
    with pytest.raises(UsageError, match=r"packed at 24x8 with 3 channels; the model takes 8x24 with 3"):
        open_dataset(made.path, image_size=(24, 8), channels=3, cache=tmp_path / "cache")
    data = made.path.read_bytes()
    start, length, *_ = TRAILER.unpack(data[-TRAILER.size :])
    assert json.loads(data[start : start + length])["rule"]["image_size"] == [8, 24]


def test_a_folder_decoded_and_kept_encoded(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    expected = []
    for number in range(3):
        pixels = RNG.integers(0, 256, (8, 24, 3), dtype=np.uint8)
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(pixels))
        expected.append(pixels.transpose(2, 0, 1))
    for keep in ("decoded", "encoded"):
        for _ in ("made", "opened again"):
            dataset = open_dataset(
                tmp_path / "images", image_size=(8, 24), channels=3, keep=keep, cache=tmp_path / "cache",  # type: ignore[arg-type]
                report=lambda line: None,
            )  # fmt: skip
            np.testing.assert_array_equal(dataset.images[:], expected)
    with pytest.raises(DataError, match="24x8, expected 8x24"):
        open_dataset(tmp_path / "images", image_size=(24, 8), channels=3, cache=tmp_path / "cache")


def test_digits_are_averaged_on_one_side_and_padded_on_the_other() -> None:
    whole = open_dataset(None, image_size=28, channels=1).images[:50].astype(float)
    images = open_dataset(None, image_size=(14, 31), channels=1).images[:50]
    assert images.shape == (50, 1, 14, 31)
    assert not images[..., :1].any() and not images[..., 29:].any()
    rows = whole.reshape(50, 1, 14, 2, 28).mean(3)
    assert np.abs(images[..., 1:29] - rows).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("mask", "hole"),
    [("left-half", np.s_[:, :12]), ("bottom-half", np.s_[4:, :]), ("center", np.s_[2:6, 6:18])],
)
def test_named_regions(mask: str, hole: tuple[slice, slice]) -> None:
    expected = np.zeros((8, 24), bool)
    expected[hole] = True
    np.testing.assert_array_equal(read_hole(mask, WIDE), expected)


def test_a_mask_of_a_file(tmp_path: Path) -> None:
    white = RNG.integers(0, 2, (8, 24), dtype=np.uint8) * 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_hole(str(tmp_path / "mask.png"), WIDE), white > 0)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["--image-size", "16", "24", "--steps", "3"], (16, 24)),
        (["--image-size", "16"], 16),
        (["--image-size=16"], 16),
        (["--image_size", "16", "16"], 16),
        (["--image-size", "a", "24"], None),
        (["--image-size", "1", "2", "3"], None),
        (["--image-size"], None),
        ([], None),
    ],
)
def test_the_size_on_a_command_line(words: list[str], size: object) -> None:
    assert Given.of(words).image_size == size


@pytest.mark.parametrize("size", [(16, 24), (32, 48), (24, 16), (40, 8), (64, 96), (12, 37)])
def test_networks_of_any_shape_have_levels_and_attention(size: tuple[int, int]) -> None:
    """Halved while both sides allow it and keep 8 pixels; attention at the largest map of at most 16x16."""
    unet = unet_of("tiny", size, 3, 0)
    maps = [size]
    while all(side % 2 == 0 and side >= 16 for side in maps[-1]):
        maps.append((maps[-1][0] // 2, maps[-1][1] // 2))
    assert len(unet.level_channels) == len(maps)
    first = next((i for i, sides in enumerate(maps) if max(sides) <= 16), None)
    assert [i for i, attends in enumerate(unet.attends) if attends] == [] if first is None else [first]
    assert all(a[0] * b[1] == a[1] * b[0] for a, b in itertools.pairwise(maps))
