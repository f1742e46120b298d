"""How pictures are laid out, read back pixel by pixel: texts in margins, blocks side by side, arrays beside them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.errors import StorageError
from fastddpm.evaluation.figures.layout import Panel, levels, save_frames, save_panels
from fastddpm.sampling.images import grid, labelled, to_uint8
from fastddpm.storage.files import save_arrays


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, C)."""
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_texts_stand_in_margins_beside_the_grid(channels: int) -> None:
    images = random_images(6, channels, 8, 8)
    plain = pixels(grid(images, 3, scale=8))
    picture = pixels(labelled(images, 3, row_labels=["one", "t=1000"], column_labels=["a", "", "ccc"], scale=8))
    top, left = picture.shape[0] - plain.shape[0], picture.shape[1] - plain.shape[1]
    assert np.array_equal(picture[top:, left:], plain)
    ink = (picture < 128).any(axis=-1)
    assert not ink[:top, :left].any()
    for i, written in enumerate([True, False, True]):
        assert ink[:top, left + i * 66 : left + i * 66 + 64].any() == written
    for i in range(2):
        cell = ink[top + i * 66 : top + i * 66 + 64, :left]
        rows = np.flatnonzero(cell.any(axis=1))
        assert len(rows) and abs((rows[0] + rows[-1]) / 2 - 31.5) < 5  # middle to middle
    widths = [np.flatnonzero(ink[top + i * 66 : top + i * 66 + 64, :left].any(axis=0)).max() for i in range(2)]
    assert widths[1] > widths[0] and widths[1] < left - 2


def test_without_texts_there_are_no_margins() -> None:
    images = random_images(4, 1, 8, 8)
    assert np.array_equal(pixels(labelled(images, 2)), pixels(grid(images, 2, scale=32)))
    assert labelled(images, 2, column_labels=["a", "b"]).width == grid(images, 2, scale=32).width


def test_columns_become_as_wide_as_their_texts() -> None:
    """400 narrow columns would not be enlarged; and a text wider than its column is not cut off at the left."""
    images = random_images(400, 1, 4, 4)
    texts = ["t=1000"] * 400
    width = labelled(images, 400, column_labels=texts).width
    assert (width + 2) / 400 - 2 >= 30
    narrow = pixels(labelled(images[:1], 1, column_labels=["t=1000"], scale=2))[:-8]
    assert (narrow[:, :4] > 200).all() and (narrow[:, 4:] < 128).any()


def test_blocks_stand_side_by_side(tmp_path: Path) -> None:
    left, right = random_images(2, 1, 3, 16, 16), random_images(2, 3, 3, 16, 16, seed=1)
    path = save_panels([Panel(left, ["x"]), Panel(right, ["1", "2", "3"])], tmp_path / "a.png", rows=["r", "s"])
    with Image.open(path) as opened:
        picture = pixels(opened)
    scale = 640 // (4 * 16)
    for block, from_right in ((right, 0), (left, 3 * (16 * scale + 2) - 2 + 10)):
        plain = pixels(grid(block.reshape(-1, 3, 16, 16), block.shape[1], scale=scale))
        end = picture.shape[1] - from_right
        assert np.array_equal(picture[-plain.shape[0] :, end - plain.shape[1] : end], plain)
    gap = picture.shape[1] - (3 * (16 * scale + 2) - 2)
    assert (picture[:, gap - 10 : gap] == 255).all()


def test_frames_are_grids(tmp_path: Path) -> None:
    frames = [random_images(4, 1, 8, 8, seed=k) for k in range(3)]
    path = save_frames(frames, tmp_path / "a.gif", columns=4)
    with Image.open(path) as opened:
        assert opened.n_frames == 3
        for k, images in enumerate(frames):
            opened.seek(k)
            assert np.array_equal(np.asarray(opened.convert("L")), np.asarray(grid(images, 4)))


def test_levels_are_those_of_images() -> None:
    x = np.random.default_rng(0).normal(0, 1, (2, 3, 1, 4, 4)).astype(np.float32)
    expected = to_uint8(torch.from_numpy(x.reshape(6, 1, 4, 4))).reshape(x.shape)
    assert np.array_equal(levels(x), expected) and np.array_equal(levels(x[:, 1]), expected[:, 1])


def test_arrays_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    save_arrays({"x": np.arange(5), "y": np.ones((2, 2), np.float32)}, path)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["x"].tolist() == [0, 1, 2, 3, 4] and arrays["y"].dtype == np.float32 and len(arrays.files) == 2
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match=f"cannot write {path}: No space left on device"):
        save_arrays({"x": np.zeros(3)}, path)
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["a.npz"]
