"""Inpainting's files and command: images, masks, pictures, mistakes."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm import inpaint as command
from fastddpm import train
from fastddpm.data.image import Preprocessing
from fastddpm.data.inputs import read_hole, read_images
from fastddpm.errors import DataError, UsageError


def test_holes_by_name() -> None:
    preprocessing = Preprocessing(4, 1)
    columns, rows = np.meshgrid(np.arange(4), np.arange(4))
    for name, hole in {
        "left-half": columns < 2,
        "right-half": columns >= 2,
        "top-half": rows < 2,
        "bottom-half": rows >= 2,
        "center": (abs(columns - 1.5) < 1) & (abs(rows - 1.5) < 1),
        "every-other-row": rows % 2 == 0,
    }.items():
        assert np.array_equal(read_hole(name, preprocessing), hole), name


def test_white_is_drawn(tmp_path: Path) -> None:
    levels = np.array([[0, 127], [128, 255]], np.uint8)
    Image.fromarray(levels).save(tmp_path / "mask.png")
    assert read_hole(str(tmp_path / "mask.png"), Preprocessing(2, 3)).tolist() == [[False, False], [True, True]]
    with pytest.raises(DataError, match=r"mask\.png: 2x2, expected 4x4; --resize area"):
        read_hole(str(tmp_path / "mask.png"), Preprocessing(4, 3))
    assert (
        read_hole(str(tmp_path / "mask.png"), Preprocessing(4, 3, "area")).tolist()
        == [[False] * 4] * 2 + [[True] * 4] * 2
    )
    with pytest.raises(UsageError, match=r"--mask takes left-half, .*, or an image file; got 'middle'"):
        read_hole("middle", Preprocessing(4, 3))


def test_images_from_wherever_they_lie(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5), dtype=np.uint8)
    for i, image in enumerate(images):
        (tmp_path / f"{i}").mkdir()
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{i}" / "x.png")
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([4, 2]))
    np.savez(tmp_path / "b.npz", images=images)
    preprocessing = Preprocessing(5, 3)
    one, labels = read_images(str(tmp_path / "1" / "x.png"), preprocessing)
    assert np.array_equal(one[:], images[1:]) and labels is None
    found, labels = read_images(str(tmp_path / "a.npz"), preprocessing)
    assert np.array_equal(found[:], images) and labels is not None and labels.tolist() == [4, 2]
    assert read_images(str(tmp_path / "b.npz"), preprocessing)[1] is None
    digits, labels = read_images("digits", Preprocessing(16, 1))
    assert digits.shape == (5000, 1, 16, 16) and labels is not None and set(labels.tolist()) == set(range(10))


def test_files_that_hold_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no archive")
    (tmp_path / "a.png").write_bytes(b"no image")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 3, 4, 4), np.uint8))
    np.savez(tmp_path / "c.npz", pictures=np.zeros((2, 3, 5, 5), np.uint8))
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 3, 5, 5), np.uint8), labels=np.zeros(3, int))
    np.savez(tmp_path / "e.npz", images=np.zeros((2, 3, 5, 5), np.uint8), labels=np.zeros(2))
    np.savez(tmp_path / "f.npz", images=np.zeros((0, 3, 5, 5), np.uint8))
    for name, message in {
        "a.npz": r"a\.npz cannot be read \(BadZipFile: .*expected an \.npz with images uint8",
        "a.png": r"a\.png: not an image of a known format",
        "b.npz": r"b\.npz must hold images uint8 \(N, 3, 5, 5\); got uint8 \(2, 3, 4, 4\)",
        "c.npz": r"c\.npz holds no array images; expected",
        "d.npz": r"d\.npz must hold labels of integers \(2,\); got int64 \(3,\)",
        "e.npz": r"e\.npz must hold labels of integers \(2,\); got float64 \(2,\)",
        "f.npz": r"f\.npz holds 0 images; 1 to 57,266,230 are read",
    }.items():
        with pytest.raises(DataError, match=message):
            read_images(str(tmp_path / name), Preprocessing(5, 3))
    with pytest.raises(UsageError, match="nowhere"):
        read_images("nowhere", Preprocessing(5, 3))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**26, 3, 9, 9), r"must hold images uint8 \(N, 3, 3, 3\); got uint8 \(67108864, 3, 9, 9\)"),
        ((2**28, 3, 3, 3), "holds 268,435,456 images; 1 to 159,072,862 are read"),
    ],
)
def test_an_array_that_is_too_large_is_not_unpacked(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    """Its first bytes suffice: there are no others."""
    header, path = io.BytesIO(), tmp_path / "large.npz"
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(DataError, match=message):
        read_images(str(path), Preprocessing(3, 3))


# The command

TINY = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "2", "--blocks", "1", "--timesteps", "20", "--batch", "8",
    "--steps", "1", "--sample.steps", "5", "--sample.count", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    train.main([*TINY, "--out", str(out)])
    return out


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--pick", "3,700", "--seeds", "5-7", "--mask", "top-half", "--jump-length", "2", "--resamplings", "2"]
    command.main([str(run), *given, "--frames", "4", "--device", "cpu", "--batch", "4", "--out", str(tmp_path / "one")])
    printed = capsys.readouterr()
    assert printed.out.split() == [
        str(tmp_path / "one" / name) for name in ("inpainted.png", "inpainted.npz", "inpainted.gif")
    ]
    assert "2 images, 3 completions of each, 5 steps, 108 evaluations of the network" in printed.err  # guidance is 2
    with np.load(tmp_path / "one" / "inpainted.npz", allow_pickle=False) as file:
        arrays = dict(file)
    digits, labels = read_images("digits", Preprocessing(16, 1))
    assert labels is not None and arrays["labels"].tolist() == labels[[3, 700]].tolist()
    assert np.array_equal(arrays["given"], digits[[3, 700]]) and arrays["seeds"].tolist() == [5, 6, 7]
    assert arrays["images"].shape == (2, 3, 1, 16, 16) and arrays["known"].sum() == 128
    assert np.array_equal(arrays["images"][:, :, :, 8:], arrays["given"][:, None, :, 8:].repeat(3, 1))
    drawn = arrays["images"][:, :, :, :8]
    assert all(len({image.tobytes() for image in of_one}) == 3 for of_one in drawn)
    with Image.open(tmp_path / "one" / "inpainted.png") as png, Image.open(tmp_path / "one" / "inpainted.gif") as gif:
        assert gif.n_frames == 4 and png.width > png.height
        picture = np.asarray(png)
    scale = 640 // (4 * 16)
    pitch = 16 * scale + 2
    for row in range(2):
        top = picture.shape[0] - (2 - row) * pitch + 2
        for k in range(3):
            left = picture.shape[1] - (3 - k) * pitch + 2
            shown = picture[top : top + 16 * scale : scale, left : left + 16 * scale : scale]
            assert np.array_equal(shown, arrays["images"][row, k, 0])
        known = picture[top : top + 16 * scale : scale, : 16 * scale : scale]
        assert (known[:8] == 128).all() and np.array_equal(known[8:], arrays["given"][row, 0, 8:])

    command.main([str(run), *given, "--frames", "0", "--device", "cpu", "--batch", "1", "--out", str(tmp_path / "two")])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["inpainted.npz", "inpainted.png"]
    assert (tmp_path / "two" / "inpainted.png").read_bytes() == (tmp_path / "one" / "inpainted.png").read_bytes()


def test_images_without_labels_are_completed_without_a_class(run: Path, tmp_path: Path) -> None:
    images = read_images("digits", Preprocessing(16, 1))[0][:3]
    np.savez(tmp_path / "images.npz", images=images)
    command.main([
        str(run), "--images", str(tmp_path / "images.npz"), "--seeds", "1", "--resamplings", "1", "--frames", "0",
        "--device", "cpu", "--out", str(tmp_path),
    ])  # fmt: skip
    with np.load(tmp_path / "inpainted.npz", allow_pickle=False) as arrays:
        assert arrays["labels"].tolist() == [10, 10, 10] and np.array_equal(arrays["given"], images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pick", "5000"], r"--pick takes indices of images, 0\.\.4999; got 5000"),
        (["--labels", "1,2"], "--labels gives 2 classes for 8 images; give one for each image, or one for all"),
        (["--labels", "12"], r"labels must be in 0\.\.9; got 12"),
        (["--mask", "half"], "--mask takes left-half"),
        (["--resamplings", "0"], "--resamplings must be positive; got 0"),
        (["--guidance", "2", "--seeds", "x"], "--seeds takes numbers and ranges"),
        (["--batch", "0"], "--batch must be positive; got 0"),
        (["--frames", "-1"], r"--frames must be in 0\.\.1000; got -1"),
        (["--frames", "1000000000"], r"--frames must be in 0\.\.1000"),
    ],
)
def test_mistakes(run: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        command.main([str(run), *arguments, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_help_and_mistakes_answer_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys, json, fastddpm.inpaint as i\nfrom fastddpm.errors import UsageError\n"
        "try:\n    i.main(sys.argv[1:])\nexcept (SystemExit, UsageError) as e:\n    code = getattr(e, 'code', 2) or 0\n"
        "print(json.dumps([code, 'torch' in sys.modules]))"
    )
    for arguments, code in ((["--help"], 0), (["x", "--sede", "1"], 2), (["nowhere"], 2)):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert json.loads(done.stdout.splitlines()[-1]) == [code, False], done.stderr
