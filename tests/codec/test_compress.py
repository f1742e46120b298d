"""The command: images to a file and back, and its answers to mistakes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm import compress, train
from fastddpm.data import open_dataset
from fastddpm.errors import DataError, UsageError

DEVICE = ["--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny network with classes, hardly trained."""
    return trained(tmp_path_factory.mktemp("runs") / "run")


def trained(path: Path, *more: str) -> Path:
    train.main([
        "--preset", "mnist", "--out", str(path), "--steps", "2", "--batch", "4", "--width", "8", "--groups", "4",
        "--multipliers", "1", "--attention-resolutions", "8", "--timesteps", "20", "--sample.count", "0", "--device",
        "cpu", "--sample.steps", "5", *more,
    ])  # fmt: skip
    return path


def encode(run: Path, images: str, out: Path, *more: str) -> None:
    compress.main(["encode", str(run), images, str(out), "--count", "5", "--steps", "4", *DEVICE, *more])


def decode(run: Path, file: Path, out: Path) -> None:
    compress.main(["decode", str(run), str(file), str(out), *DEVICE])


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    """Five digits with their labels."""
    path = run / "digits.fdz"
    encode(run, "digits", path, "--labels", "--batch", "2")
    return path


def test_images_come_back_as_arrays(run: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = open_dataset(None, image_size=16, channels=1)
    decode(run, file, tmp_path / "new" / "images.npz")
    assert "5 images" in capsys.readouterr().out
    with np.load(tmp_path / "new" / "images.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], expected.images[:5])
        assert expected.labels is not None
        np.testing.assert_array_equal(arrays["labels"], expected.labels[:5])


@pytest.mark.slow
def test_images_come_back_as_pictures_and_go_in_as_arrays(
    run: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode(run, file, tmp_path / "images.npz")
    encode(run, str(tmp_path / "images.npz"), tmp_path / "again.fdz")
    text = " ".join(capsys.readouterr().out.split())
    size = (tmp_path / "again.fdz").stat().st_size
    assert f"5 images, {size:,} bytes, {8 * size / (5 * 256):.3f} bits/dim" in text
    decode(run, tmp_path / "again.fdz", tmp_path / "pictures")
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"{i:010d}.png" for i in range(5)]
    with np.load(tmp_path / "images.npz") as arrays, Image.open(pictures[3]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), arrays["images"][3, 0])
    encode(run, str(tmp_path / "pictures"), tmp_path / "folder.fdz")
    decode(run, tmp_path / "folder.fdz", tmp_path / "folder.npz")
    with np.load(tmp_path / "folder.npz") as ours, np.load(tmp_path / "images.npz") as arrays:
        np.testing.assert_array_equal(ours["images"], arrays["images"])
        assert "labels" not in ours


def test_lossy_says_how_far_off_it_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(run, "digits", tmp_path / "lossy.fdz", "--lossy", "3")
    text = capsys.readouterr().out
    decode(run, tmp_path / "lossy.fdz", tmp_path / "lossy.npz")
    expected = open_dataset(None, image_size=16, channels=1).images[:5].astype(float)
    with np.load(tmp_path / "lossy.npz") as arrays:
        error = np.sqrt(np.square(arrays["images"] - expected).mean())
    assert error > 0 and f"root mean squared error {error:.2f} of 255" in text


def test_another_run_cannot_decode(file: Path, tmp_path: Path) -> None:
    other = trained(tmp_path / "other", "--seed", "1")
    with pytest.raises(DataError, match=r"digits\.fdz was coded with another model"):
        decode(other, file, tmp_path / "images.npz")
    assert not (tmp_path / "images.npz").exists()


def test_a_damaged_file_is_refused_before_the_model_is_loaded(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    damaged = tmp_path / "damaged.fdz"
    damaged.write_bytes(data[:-1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="damaged"):
        decode(tmp_path / "empty", damaged, tmp_path / "images.npz")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["digits", "--steps", "1"], UsageError, "steps must be at least 2"),
        (["digits", "--batch", "0"], UsageError, "batch must be in"),
        (["digits", "--lossy", "-1"], UsageError, "lossy must be"),
        (["digits", "--lossy", "19"], UsageError, r"0\.\.18|goes up to"),
        (["digits", "--count", "0"], UsageError, "count must be positive"),
        (["nowhere"], UsageError, "does not exist"),
        (["nowhere.npz"], UsageError, "does not exist"),
    ],
)
def test_mistakes(run: Path, arguments: list[str], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises((error, SystemExit)) as raised:
        compress.main(["encode", str(run), arguments[0], str(tmp_path / "x.fdz"), *DEVICE, *arguments[1:]])
    if isinstance(raised.value, error):
        raised.match(message)
    else:
        assert raised.value.code == 2
    assert not (tmp_path / "x.fdz").exists()


def test_a_depth_that_the_chain_lacks_is_refused_before_anything_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"lossy must be a timestep in 0\.\.\d+; got 1000000"):
        encode(run, "digits", tmp_path / "x.fdz", "--lossy", "1000000")
    assert "evaluations" not in capsys.readouterr().err  # of which it counted fewer than none


def test_a_folder_named_digits_does_not_hide_the_embedded_ones(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    encode(run, "digits", Path("x.fdz"), "--count", "1")
    with pytest.raises(DataError, match="holds no images"):
        encode(run, "./digits", Path("y.fdz"))


def test_arrays_without_images(run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(DataError, match=r"holds no array images; expected an \.npz"):
        encode(run, str(tmp_path / "other.npz"), tmp_path / "x.fdz")
    np.savez(tmp_path / "unlabelled.npz", images=np.zeros((2, 1, 16, 16), np.uint8))
    with pytest.raises(UsageError, match="has none"):
        encode(run, str(tmp_path / "unlabelled.npz"), tmp_path / "x.fdz", "--labels")
    for missing in (["encode", "nowhere", "digits", "x"], ["decode", "nowhere", "x", "y"]):
        with pytest.raises(UsageError, match="no checkpoint at nowhere"):
            compress.main(missing)
