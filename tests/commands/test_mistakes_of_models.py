"""Mistakes that only the model shows are told all at once, by one message each."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers.networks import SMALLEST, random_model
from helpers.runs import trained

from fastddpm import inpaint, sample
from fastddpm.config import DiffusionConfig
from fastddpm.data import __main__ as data
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.options import one_or_each, quoted
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.shards import Shards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 10 classes on 20 timesteps."""
    return trained(tmp_path_factory.mktemp("run") / "run", "--timesteps", "20", "--sample.steps", "2")


def test_seeds_labels_and_steps_of_sample(run: Path, tmp_path: Path) -> None:
    arguments = ["--seeds", f"0,{2**32}", "--labels", "3,17", "--steps", "21", "--device", "cpu"]
    with pytest.raises(UsageError) as refused:
        sample.main([str(run), *arguments, "--out", str(tmp_path / "out")])
    head, *lines = str(refused.value).split("\n")
    assert head == "3 options cannot be used:"
    assert [line.strip() for line in lines] == [
        "steps must be in 1..20; got 21",
        f"image seeds must be in 0..{2**32 - 1}; got {2**32}",
        "labels must be in 0..9; got 17",
    ]
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"^labels must be in 0\.\.9; got 17$"):
        sample.main([str(run), "--seeds", "0,1", "--labels", "17", "--device", "cpu", "--out", str(tmp_path / "out")])


def test_seeds_labels_and_steps_of_inpaint(run: Path, tmp_path: Path) -> None:
    arguments = ["--seeds", f"{2**32}", "--labels", "17", "--steps", "21", "--device", "cpu"]
    with pytest.raises(UsageError) as refused:
        inpaint.main([str(run), *arguments, "--out", str(tmp_path / "out")])
    assert [line.strip() for line in str(refused.value).split("\n")] == [
        "3 options cannot be used:",
        "steps must be in 1..20; got 21",
        f"image seeds must be in 0..{2**32 - 1}; got {2**32}",
        "labels must be in 0..9; got 17",
    ]
    with pytest.raises(UsageError) as refused:
        inpaint.main(
            [str(run), "--pick", "1,9999", "--labels", "1,2,3", "--device", "cpu", "--out", str(tmp_path / "o")]
        )
    assert [line.strip() for line in str(refused.value).split("\n")] == [
        "2 options cannot be used:",
        "--pick takes indices of images, 0..4999; got 9999",
        "--labels gives 3 classes for 2 images; give one for each image, or one for all",
    ]


def test_one_label_or_one_for_each() -> None:
    assert one_or_each([3], 4, "seed") == [3, 3, 3, 3] and one_or_each([1, 2], 2, "seed") == [1, 2]
    with pytest.raises(UsageError, match="--labels gives 2 classes for 3 images; give one for each image, or one for"):
        one_or_each([1, 2], 3, "image")


def test_shards_of_another_spacing_are_told_by_the_setting(tmp_path: Path) -> None:
    model = random_model(SMALLEST, DiffusionConfig(timesteps=50))

    def claim(**options: object) -> None:
        sampler = Sampler(model.unet, model.diffusion, 5, "ddim", **options)  # type: ignore[arg-type]
        Shards(tmp_path, range(3), None, 2, sampler.interface.shape).claim(sampler.settings())

    claim()
    claim()
    with pytest.raises(
        UsageError, match=r"holds images with timesteps of another spacing \(--spacing, --steps-offset\)"
    ):
        claim(spacing="leading")
    with pytest.raises(UsageError, match=r"holds images with coefficients of other steps \(--eta, or the schedule\)"):
        claim(eta=0.5)


def test_a_path_that_begins_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "-dash").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"-dash holds no images"):
        data.main(["inspect", "-dash"])


@pytest.mark.parametrize("name", [b"plain", b"two words", b"caf\xc3\xa9's", b"\xff\xfe name", b"a\nb'c", b"-x"])
def test_proposed_words_name_the_file_in_a_shell(name: bytes, tmp_path: Path) -> None:
    """Also those that are no text: the shell makes the same bytes of them."""
    word = quoted(os.fsdecode(name))
    assert "\n" not in word and word.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s' {word}"], capture_output=True, check=True)
    assert done.stdout == name
    assert quoted("\ud800") == r"$'\xed\xa0\x80'"  # from a damaged document
