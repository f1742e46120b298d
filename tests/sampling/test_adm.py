"""Arrays for other tools that compute FID: the images of the samples, as they read them."""

from pathlib import Path

import numpy as np
import pytest
from helpers.runs import trained

from fastddpm import sample
from fastddpm.sampling.adm import write_adm


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run")


def command(run: Path, out: Path, *more: str) -> list[str]:
    return [str(run), "--out", str(out), "--device", "cpu", "--steps", "4", *more]


def shard_images(out: Path) -> np.ndarray:
    parts = []
    for path in sorted(out.glob("shard-*.npz")):
        with np.load(path) as arrays:
            parts.append(arrays["images"])
    return np.concatenate(parts)


@pytest.mark.parametrize("more", [[], ["--shard-size", "4"]])
def test_arrays_for_other_tools(more: list[str], run: Path, tmp_path: Path) -> None:
    sample.main(command(run, tmp_path, "--seeds", "0-9", "--labels", "3", "--npz", "adm", *more))
    with np.load(tmp_path / "adm.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    if more:
        ours = shard_images(tmp_path)
    else:
        with np.load(tmp_path / "samples.npz") as arrays:
            ours = arrays["images"]
    assert pixels.shape == (10, 16, 16, 3) and pixels.dtype == np.uint8 and labels.tolist() == [3] * 10
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], ours[:, 0])


def test_arrays_for_other_tools_in_colour(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), dtype=np.uint8)
    write_adm([images[:2], images[2:]], 5, None, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
        np.testing.assert_array_equal(arrays["arr_0"], images.transpose(0, 2, 3, 1))


def test_they_are_not_written_before_all_shards_are_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(run, tmp_path, "--seeds", "0-7", "--shard-size", "4", "--npz", "adm")
    for rank in (0, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not (tmp_path / "adm.npz").exists()
        sample.main(arguments)
    assert "1 shards of other processes are missing; run the command again" in capsys.readouterr().err
    with np.load(tmp_path / "adm.npz") as arrays:
        assert len(arrays["arr_0"]) == 8
