"""Many images: shards that processes share, that survive a kill, and that refuse what does not belong together."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.marks import slow
from helpers.networks import SMALLEST, shaken
from helpers.runs import trained
from PIL import Image

from fastddpm import sample
from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.presets import PRESETS
from fastddpm.pretrained import load as load_model
from fastddpm.sampling import batch_size
from fastddpm.sampling.images import to_uint8
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.files import host
from fastddpm.storage.shards import Shards, numbers, ranges
from fastddpm.unet import UNet

STEPS = ["--steps", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smallest network."""
    return trained(tmp_path_factory.mktemp("runs") / "run")


def command(run: Path, out: Path, *more: str) -> list[str]:
    return [str(run), "--out", str(out), "--device", "cpu", *STEPS, *more]


def images_of(out: Path) -> dict[int, np.ndarray]:
    """Image by seed, of all shards."""
    found: dict[int, np.ndarray] = {}
    for path in sorted(out.glob("shard-*.npz")):
        with np.load(path) as arrays:
            assert len(arrays["seeds"]) == len(arrays["images"]) == len(arrays["labels"])
            assert not found.keys() & set(arrays["seeds"].tolist())
            found |= dict(zip(arrays["seeds"].tolist(), arrays["images"], strict=True))
    return found


def process(arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fastddpm.sample", *arguments], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_shards_hold_the_images_of_the_sampler(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main(command(run, tmp_path / "out", "--seeds", "5-14,3", "--shard-size", "4", "--batch", "3", "--png"))
    found = images_of(tmp_path / "out")
    assert list(found) == [*range(5, 15), 3]
    loaded = load_model(run)
    config = loaded.preset.sample
    sampler = Sampler(loaded.unet, loaded.diffusion, 4, config.method, config.eta, guidance=config.guidance)
    expected = to_uint8(sampler.sample(list(found)))
    assert np.abs(np.stack(list(found.values())).astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 10
    assert (tmp_path / "out" / "samples.png").exists() and (tmp_path / "out" / "0000000003.png").exists()
    assert "3 shards of 4 images" in capsys.readouterr().out


def test_above_a_thousand_images_there_are_shards(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MOST_IN_ONE_FILE", 10)
    monkeypatch.setattr(sample, "SHARD_SIZE", 6)
    sample.main(command(run, tmp_path / "few", "--seeds", "0-9"))
    assert (tmp_path / "few" / "samples.npz").exists() and not list((tmp_path / "few").glob("shard*"))
    sample.main(command(run, tmp_path / "many", "--seeds", "0-10"))
    assert len(list((tmp_path / "many").glob("shard*"))) == 2


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(run: Path, tmp_path: Path) -> None:
    """As torchrun starts them, at once; neither waits for the other."""
    arguments = ["--seeds", "0-19", "--shard-size", "4", "--batch", "4"]
    sample.main(command(run, tmp_path / "one", *arguments))
    processes = [
        process(command(run, tmp_path / "two", *arguments), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    for started in processes:
        _, err = started.communicate(timeout=120)
        assert started.returncode == 0, err
    one, two = images_of(tmp_path / "one"), images_of(tmp_path / "two")
    assert one.keys() == two.keys() and all(np.array_equal(one[seed], two[seed]) for seed in one)
    assert not list((tmp_path / "two").glob(".*.tmp"))


@pytest.mark.slow
def test_a_killed_run_is_finished(run: Path, tmp_path: Path) -> None:
    """SIGKILL behind the first shards; those stay as they are, the rest follows, and the union is whole."""
    arguments = ["--seeds", "0-39", "--shard-size", "4", "--batch", "4", "--steps", "60"]
    sample.main([*command(run, tmp_path / "whole"), *arguments])
    killed = process([*command(run, tmp_path / "killed"), *arguments])
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("shard-*.npz"))) < 2 and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("shard-*.npz")}
    assert 2 <= len(left) < 10
    (tmp_path / "killed" / f".shard-00009.npz.{host()}.{killed.pid}.tmp").write_bytes(b"half of one")
    sample.main([*command(run, tmp_path / "killed"), *arguments])
    assert all(path.stat().st_mtime_ns == before for path, before in left.items())
    whole, finished = images_of(tmp_path / "whole"), images_of(tmp_path / "killed")
    assert len(finished) == 40 and all(np.array_equal(whole[seed], finished[seed]) for seed in whole)
    assert not list((tmp_path / "killed").glob(".*.tmp"))


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "a byte changed": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "other seeds": lambda path: np.savez(path, **{**dict(np.load(path)), "seeds": np.arange(4)}),
    "other shape": lambda path: np.savez(path, **{**dict(np.load(path)), "images": np.zeros((4, 1, 2, 2), np.uint8)}),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"images": 1})),
    "empty": lambda path: path.write_bytes(b""),
}


def flipped(data: bytes) -> bytes:
    """A bit in the middle of the images."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_drawn_again(
    damage: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(run, tmp_path, "--seeds", "10-17", "--shard-size", "4")
    sample.main(arguments)
    before = images_of(tmp_path)
    path = tmp_path / "shard-00001.npz"
    DAMAGE[damage](path)
    capsys.readouterr()
    sample.main(arguments)
    error = capsys.readouterr().err
    assert f"{path} " in error and "drawn again" in error and "1 of 2 shards are there already" in error
    after = images_of(tmp_path)
    assert all(np.array_equal(before[seed], after[seed]) for seed in range(10, 18))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--steps", "5"], "steps 4, not 5"),
        (["--noise-seed", "1"], "noise_seed 0, not 1"),
        slow(["--precision", "bf16"], "precision float32, not bfloat16"),
        (["--seeds", "1-8"], "seeds 0-7, not 1-8"),
        slow(["--seeds", "0-6"], "seeds 0-7, not 0-6"),
        slow(["--labels", "3"], "labels 0-7, not 3,3,3,3,3,3,3,3"),
        (["--shard-size", "2"], "shard_size 4, not 2"),
    ],
)
def test_other_settings_are_refused(change: list[str], name: str, run: Path, tmp_path: Path) -> None:
    """In the order in which they matter; nothing is written."""
    arguments = command(run, tmp_path, "--seeds", "0-7", "--shard-size", "4")
    sample.main(arguments)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".npz", ".json", ".png")}
    with pytest.raises(UsageError, match=f"holds images with {name}.*sample into another --out"):
        sample.main([*arguments, *change])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("labels", [[], ["--labels", "3"]])
def test_more_seeds_extend_a_directory(
    labels: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole shards stay as they are; the last one, which was not full, is drawn again with its further seeds."""
    arguments = command(run, tmp_path / "out", *labels, "--shard-size", "4")
    sample.main([*arguments, "--seeds", "5-14"])
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    capsys.readouterr()
    sample.main([*arguments, "--seeds", "5-22"])
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert [name for name in before if before[name] == after[name]] == ["shard-00000.npz", "shard-00001.npz"]
    assert len(after) == 5 and "2 of 5 shards are there already" in capsys.readouterr().err
    sample.main([*command(run, tmp_path / "whole", *labels, "--shard-size", "4"), "--seeds", "5-22"])
    extended, whole = images_of(tmp_path / "out"), images_of(tmp_path / "whole")
    assert list(extended) == list(range(5, 23)) and all(np.array_equal(extended[seed], whole[seed]) for seed in whole)
    assert (tmp_path / "out" / "sampling.json").read_text() == (tmp_path / "whole" / "sampling.json").read_text()


def test_numbers_are_what_ranges_wrote() -> None:
    for given in ([0], [5, 6, 7], [3, 1, 2, 9, 10], [2**32 - 1, 0]):
        found = numbers(ranges(given))
        assert found is not None and list(found) == given
    for text in ("", "5-", "7-5", "0-99999999999", "a", "1" * 5000, None, 3, "0-9999999,5"):
        assert numbers(text) is None


def test_png_asked_for_later_are_of_the_shards_that_are_there(run: Path, tmp_path: Path) -> None:
    arguments = command(run, tmp_path, "--seeds", "0-7", "--shard-size", "4")
    sample.main(arguments)
    (tmp_path / "shard-00001.npz").unlink()
    sample.main([*arguments, "--png"])
    for seed, image in images_of(tmp_path).items():
        with Image.open(tmp_path / f"{seed:010d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), image[0])


def test_another_network_is_refused(run: Path, tmp_path: Path) -> None:
    arguments = ["--seeds", "0-3", "--shard-size", "4"]
    sample.main(command(run, tmp_path / "out", *arguments))
    other = trained(tmp_path / "other", "--seed", "1")
    with pytest.raises(UsageError, match=r"holds images with network [0-9a-f]{64}, not [0-9a-f]{64}"):
        sample.main(command(other, tmp_path / "out", *arguments))


def some(tmp_path: Path) -> Shards:
    return Shards(tmp_path, range(10), None, 4, (1, 2, 2))


def test_one_process_at_a_time_for_each_rank(tmp_path: Path) -> None:
    mine = some(tmp_path)
    with mine.locked(0), mine.locked(1):
        refused = pytest.raises(UsageError, match=rf"process {os.getpid()} on .* is sampling into .* as rank 0")
        with refused, some(tmp_path).locked(0):
            pass
    with mine.locked(0):
        pass


def test_a_full_disk_is_one_message_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = some(tmp_path)
    ours.write(0, np.zeros((4, 1, 2, 2), np.uint8))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*shard-00001.npz: No space left on device; .*run the same"):
        ours.write(1, np.ones((4, 1, 2, 2), np.uint8))
    assert StorageError.exit_code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.npz"]
    assert ours.missing(0, 1)[0] == [1, 2] and ours.missing(1, 2)[0] == [1] and ours.missing(0, 2)[0] == [2]


def test_damaged_shards_are_told_by_reason(tmp_path: Path) -> None:
    shards = Shards(tmp_path, range(10), None, 2, (1, 2, 2))
    for index in range(5):
        shards.write(index, np.zeros((2, 1, 2, 2), np.uint8))
    for index in (0, 2, 4):
        shards.path(index).write_bytes(b"text")
    shards.write(3, np.zeros((2, 1, 3, 3), np.uint8))
    wanted, told = shards.missing(0, 1)
    assert wanted == [0, 2, 3, 4]
    assert told == [
        f"{shards.path(0)} and 2 more: cannot be read (BadZipFile: File is not a zip file): drawn again",
        f"{shards.path(3)} has images uint8 (2, 1, 3, 3): drawn again",
    ]


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match=r"sampling.json is damaged; sample into another --out"):
        some(tmp_path).claim({})


@pytest.mark.parametrize("text", ["[]", "4", "[" * 5000, '{"seeds": ' + "1" * 5000 + "}", '{"seeds": [1]}'])
def test_forged_settings_are_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises((DataError, UsageError), match=r"is damaged; sample|holds images with"):
        some(tmp_path).claim({})


def test_a_pipe_in_place_of_any_file_is_no_wait(run: Path, tmp_path: Path) -> None:
    arguments = command(run, tmp_path, "--seeds", "0-7", "--shard-size", "4")
    sample.main(arguments)
    before = images_of(tmp_path)
    for name, problem in (("sampling.json", "is damaged"), (".rank-0.lock", "is not a regular file")):
        os.rename(tmp_path / name, tmp_path / "kept")
        os.mkfifo(tmp_path / name)
        with pytest.raises((DataError, StorageError), match=problem):
            sample.main(arguments)
        os.replace(tmp_path / "kept", tmp_path / name)
    (tmp_path / "shard-00001.npz").unlink()
    os.mkfifo(tmp_path / "shard-00001.npz")
    sample.main(arguments)
    after = images_of(tmp_path)
    assert all(np.array_equal(before[seed], after[seed]) for seed in range(8))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "3"), ([1, 2, 3], "1-3"), ([5, 1, 2, 9, 10, 11], "5,1-2,9-11"), (range(7), "0-6"), ([2, 2], "2,2")],
)
def test_ranges(numbers: Any, text: str) -> None:
    assert ranges(numbers) == text
    assert sample.parse_numbers(text, "seeds") == list(numbers)


@pytest.mark.parametrize("environment", [{"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_a_wrong_environment_is_refused(
    environment: dict[str, str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="RANK"):
        sample.main(command(run, run / "out"))


def test_no_animation_of_shards(run: Path, tmp_path: Path) -> None:
    for flags in (["--gif"], ["--animation", "gif"]):
        with pytest.raises(UsageError, match=f"{flags[0]} is for up to 1,024 images"):
            sample.main(command(run, tmp_path, "--shard-size", "4", *flags))


# The batch that nobody asked for


@pytest.mark.parametrize(
    ("free", "fixed", "per_image", "batch"),
    [
        (10e9, 0, 10e6, 512),  # 800 would fit
        (10e9, 0, 100e6, 64),  # 80
        (10e9, 5e9, 100e6, 16),  # 30
        (1e9, 2e9, 100e6, 1),  # none would: one is tried
        (8e9, 0, 100e6, 64),  # 64 exactly
    ],
)
def test_largest_batch(free: float, fixed: float, per_image: float, batch: int) -> None:
    assert batch_size.largest_batch(free, fixed, per_image) == batch


def test_from_two_peaks() -> None:
    """4 images took 900 MB and 12 took 1700 MB: 500 MB and 100 MB an image, all of it twice for a graph."""
    assert batch_size.from_peaks(40e9, 900e6, 1700e6) == batch_size.largest_batch(40e9, 1000e6, 200e6) == 128


def test_on_a_cpu() -> None:
    cifar, large = PRESETS["cifar10"].unet, PRESETS["celebahq256"].unet
    assert batch_size.on_a_cpu(cifar, free=64e9) == 64
    assert batch_size.on_a_cpu(large, free=16e9) == 8  # a GB each
    assert batch_size.on_a_cpu(cifar, free=1e8) == 4
    assert batch_size.on_a_cpu(cifar) >= 1


def test_settings_name_what_an_image_depends_on() -> None:
    def settings(**options: Any) -> dict[str, Any]:
        diffusion = Diffusion(DiffusionConfig(**options.pop("diffusion", {})))
        return Sampler(network, diffusion, **options).settings()

    network = UNet(SMALLEST)
    first = settings()
    assert settings() == first and json.loads(json.dumps(first)) == json.loads(json.dumps(settings()))
    for options in ({"steps": 10}, {"method": "ddim"}, {"seed": 5}, {"diffusion": {"variance": "fixedsmall"}}):
        assert settings(**options) != first
    assert settings(method="ddim", eta=0.5) != settings(method="ddim")
    shaken(network)
    assert settings()["network"] != first["network"]
