"""`python -m fastddpm.train --data PHOTOS` alone: any set of pictures, the choices said, resumed exactly."""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import team
from helpers.image_folder import png
from helpers.marks import slow
from PIL import Image

from fastddpm import evaluate, train
from fastddpm.data import __main__ as data
from fastddpm.data import open_dataset
from fastddpm.errors import DataError, UsageError
from fastddpm.presets import read_preset
from fastddpm.storage import checkpoint
from fastddpm.training import from_data, time_budget
from fastddpm.training.saved import RunOptions
from fastddpm.training.trainer import Trainer

RNG = np.random.default_rng(11)
# A network that is quick; nothing here that says how images are read.
QUICK = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "1", "1", "1", "--attention-resolutions", "4",
    "--device", "cpu", "--preview-every", "0", "--sample.count", "0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(width: int, height: int) -> Image.Image:
    """A smooth one in colour."""
    corners = RNG.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def photographs() -> dict[str, bytes]:
    """Files as a person has them: sizes, formats and modes are mixed, one is turned by its EXIF data, none is bad."""
    turned = Image.Exif()
    turned[274] = 6
    files = {f"{i:02}.jpg": png(picture(40 + 3 * i, 60), "JPEG") for i in range(10)}
    see_through = picture(50, 44).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(see_through.size))
    files |= {
        "grey.png": png(picture(70, 50).convert("L")),
        "see-through.png": png(see_through),
        "palette.gif": png(picture(64, 64).quantize(16), "GIF", transparency=3),
        "inks.jpg": png(picture(64, 64).convert("CMYK"), "JPEG"),
        "deep.png": png(RNG.integers(0, 65536, (48, 52)).astype(np.uint16)),
        "deep.tif": png(picture(45, 45).convert("YCbCr"), "TIFF"),
        "turned.jpg": png(picture(60, 40), "JPEG", exif=turned),
        "bits.bmp": png(picture(45, 45).convert("1"), "BMP"),
    }
    return files


def as_folder(files: dict[str, bytes], to: Path) -> Path:
    for name, content in files.items():
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return to


def as_zip(files: dict[str, bytes], to: Path) -> Path:
    with zipfile.ZipFile(to.with_suffix(".zip"), "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return to.with_suffix(".zip")


def as_tar(files: dict[str, bytes], to: Path) -> Path:
    with tarfile.open(to.with_suffix(".tar"), "w") as archive:
        for i, (name, content) in enumerate(sorted(files.items())):
            member = tarfile.TarInfo(f"{i:05}{Path(name).suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return to.with_suffix(".tar")


def as_parquet(files: dict[str, bytes], to: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"image": {"bytes": content, "path": name}} for name, content in sorted(files.items())]
    parquet.write_table(pyarrow.Table.from_pylist(rows), to.with_suffix(".parquet"))
    return to.with_suffix(".parquet")


def as_lmdb(files: dict[str, bytes], to: Path) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(to.with_name(f"{to.name}_lmdb")), map_size=2**24) as database,
        database.begin(write=True) as all_,
    ):
        for name, content in files.items():
            all_.put(name.encode(), content)
    return to.with_name(f"{to.name}_lmdb")


def weights(run: Path) -> dict[str, torch.Tensor]:
    parts = checkpoint.load(run).tensors
    return {f"{part} {name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@pytest.mark.parametrize("write", [as_folder, as_zip, slow(as_tar), slow(as_parquet), slow(as_lmdb)])
def test_any_set_of_pictures_is_read_without_more_options(
    write: Callable[[dict[str, bytes], Path], Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(photographs(), home / "photos")
    train.main([*QUICK, "--data", str(source), "--steps", "1"])
    said = capsys.readouterr().err
    config = read_preset(home / "runs" / "photos" / "config.json")
    assert (config.unet.image_size, config.unet.image_channels, config.unet.num_classes) == (32, 3, 0)
    assert f"data {source}: 18 images" in said and "note: 18 images are few" in said
    dataset = open_dataset(
        source, image_size=32, channels=3, resize="area", background="white", cache=home / "other", report=print
    )
    assert len(dataset.images) == 18
    assert checkpoint.load(home / "runs" / "photos").documents["data"]["checksum"] == dataset.checksum


def test_each_choice_is_said_with_the_option_that_changes_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = as_folder(photographs(), home / "photos")
    train.main([*QUICK, "--data", str(source), "--steps", "1", "--dry-run"])
    out, said = capsys.readouterr()
    lines = said.partition("changes it:\n")[2].splitlines()
    options = [found[1] for line in lines if (found := re.fullmatch(r"  .* \[(--.*)\]", line))]
    assert options == [
        "--image-channels", "--image-size", "--resize", "--background", "--allow-bad, --skip-bad", "--num-classes",
        "--network", "--batch", "--no-flip",
    ]  # fmt: skip
    assert "3 channels: 15 of 18 images are stored in colour" in said
    assert "one step" in out and "activations" in out
    with pytest.raises(SystemExit):
        train.main(["--data", str(source), "--help-all"])
    flags = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    assert {flag for option in options for flag in option.split(", ")} <= flags


def test_classes_by_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{name}/{i:02}.png": png(picture(33, 40)) for name in ("cat", "dog") for i in range(16)}
    train.main([*QUICK, "--data", str(as_folder(files, home / "pets")), "--steps", "1"])
    config = read_preset(home / "runs" / "photos" / "config.json")
    assert (config.unet.num_classes, config.unet.label_dropout, config.sample.guidance) == (2, 0.1, 2.0)
    assert (
        "2 classes (cat, dog), 16 images in the median one, with guidance 2 [--num-classes]" in capsys.readouterr().err
    )
    train.main([*QUICK, "--data", "pets", "--steps", "1", "--num-classes", "0", "--out", "plain"])
    plain = read_preset(home / "plain" / "config.json")
    assert (plain.unet.num_classes, plain.unet.label_dropout, plain.sample.guidance) == (0, 0.0, 1.0)


def test_the_options_of_the_command_line_come_first(home: Path) -> None:
    as_folder(photographs(), home / "photos")
    train.main([
        *QUICK, "--data", "photos", "--steps", "2", "--image_size", "16", "--batch=2", "--background", "black",
        "--resize", "lanczos", "--ema", "0.5", "--allow-bad", "0.2", "--prediction", "eps", "--seed", "3",
    ])  # fmt: skip
    config = read_preset(home / "runs" / "photos" / "config.json")
    assert (config.unet.image_size, config.train.batch, config.train.ema, config.train.seed) == (16, 2, 0.5, 3)
    assert config.diffusion.prediction == "eps" and config.unet.width == 8
    options = RunOptions.read(home / "runs" / "photos")
    assert (options.background, options.resize, options.allow_bad) == ("black", "lanczos", 0.2)


@pytest.mark.slow
def test_a_run_is_resumed_as_it_was_chosen(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(photographs(), home / "photos")
    common = [*QUICK, "--data", "photos", "--batch", "2", "--dropout", "0.1"]
    train.main([*common, "--steps", "4", "--save-every", "2", "--keep", "9", "--out", "whole"])
    (home / "cut" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "options.json"):
        shutil.copy(home / "whole" / name, home / "cut")
    shutil.copytree(home / "whole" / "checkpoints" / "step-00000002", home / "cut" / "checkpoints" / "step-00000002")
    monkeypatch.setattr(from_data, "choose", None)  # nothing is chosen again
    monkeypatch.setattr(time_budget, "seconds_per_step", None)
    train.main(["--resume", "--out", "cut", "--device", "cpu"])
    whole, cut = weights(home / "whole"), weights(home / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_minutes_choose_the_steps_of_a_plain_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit that of --steps; the steps are saved before the first, and a restart keeps them."""
    as_folder(photographs(), home / "photos")
    monkeypatch.setattr(time_budget, "MEASURED_S", 0.0)
    taken = time_budget.seconds_per_step
    monkeypatch.setattr(time_budget, "seconds_per_step", lambda *a, **k: (taken(*a, **k), 12.0)[1])
    common = [*QUICK, "--data", "photos", "--batch", "2", "--save-every", "99"]
    train.main([*common, "--minutes", "2.4", "--out", "timed"])
    assert "12 steps: 2.4 minutes at 12 s a step, with 0 s for samples" in capsys.readouterr().err
    train.main([*common, "--steps", "12", "--out", "counted"])
    timed, counted = weights(home / "timed"), weights(home / "counted")
    assert timed.keys() == counted.keys() and all(torch.equal(timed[name], counted[name]) for name in timed)
    configs = [read_preset(home / name / "config.json") for name in ("timed", "counted")]
    assert configs[0] == configs[1] and (configs[0].train.steps, configs[0].train.ema) == (12, 0.16667)
    # As torchrun and SLURM start the same command again.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(time_budget, "seconds_per_step", None)
    train.main([*common, "--minutes", "2.4", "--out", "timed"])
    assert "resuming timed at step 12" in capsys.readouterr().err


def test_minutes_of_a_preset_replace_its_steps_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_budget, "seconds_per_step", lambda *_, **__: 5.0)
    train.main([*QUICK, "--minutes", "0.2", "--image-size", "8"])
    config = read_preset(home / "runs" / "mnist" / "config.json")
    assert (config.train.steps, config.train.ema, config.train.warmup) == (2, 0.99, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be more than 0; got 0"),
        (["--minutes", "nan"], "--minutes must be more than 0; got nan"),
        (["--minutes", "3", "--steps", "3"], "give --minutes or --steps, not both"),
        (["--allow-bad", "1.5"], "--allow-bad must be in 0..1, a share of the images; got 1.5"),
        (["--preset", "mnist", "--network", "tiny"], "--network chooses a network for the images that --data names"),
        (["--background", "purple-ish"], "the background must be the name of a colour"),
        (["--image-size", "0"], "image_size must be positive; got 0"),
    ],
)
def test_mistakes_are_said_before_the_pictures_are_read(
    arguments: list[str], message: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_folder({"a.png": b"no picture"}, home / "photos")
    with pytest.raises((UsageError, SystemExit), match=message):
        train.main(["--data", "photos", "--device", "cpu", *arguments])
    assert not (home / "runs").exists()


def test_other_mistakes(home: Path) -> None:
    with pytest.raises(UsageError, match="photos is chosen from your images: name them with --data"):
        train.main(["--preset", "photos"])
    with pytest.raises(UsageError, match=r"nowhere.* does not exist"):
        train.main(["--data", "nowhere", "--device", "cpu"])
    as_folder({"a.png": png(picture(40, 40))}, home / "one")
    with pytest.raises(DataError, match="one holds 1 image; training takes at least 2"):
        train.main(["--data", "one", "--device", "cpu"])
    train.main([*QUICK, "--data", str(as_folder(photographs(), home / "photos")), "--steps", "1"])
    with pytest.raises(UsageError, match="with --resume, --steps changes it"):
        train.main(["--resume", "--minutes", "3"])
    with pytest.raises(UsageError, match="--network chooses a network"):
        train.main(["--resume", "--network", "tiny"])
    with pytest.raises(UsageError, match="runs/photos is a run of preset photos, not mnist"):
        train.main(["--resume", "--out", "runs/photos", "--preset", "mnist"])


def test_bad_pictures_up_to_a_hundredth_are_left_out_and_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{i:03}.png": png(RNG.integers(0, 256, (32, 32), dtype=np.uint8)) for i in range(100)}
    source = as_folder(files | {"100.png": b"no picture"}, home / "photos")
    train.main([*QUICK, "--data", str(source), "--steps", "1"])
    said = capsys.readouterr().err
    assert "1 of 101 images" in said and "100.png: not an image of a known format" in said
    assert f"data {source}: 100 images" in said and "1 channel: all of 100 images are grey" in said
    (source / "000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 101 images[\s\S]*more than 1% of all: mend.*--skip-bad to go on"):
        train.main([*QUICK, "--data", str(source), "--steps", "1", "--out", "x"])
    train.main([*QUICK, "--data", str(source), "--steps", "1", "--out", "x", "--skip-bad"])
    assert f"data {source}: 99 images" in capsys.readouterr().err
    assert RunOptions.read(home / "x").bad_share == 1


def test_inspect_proposes_the_same_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = as_folder(photographs(), home / "my photos")
    data.main(["inspect", str(source)])
    said = capsys.readouterr().out
    (line,) = re.findall(r"^next: python -m fastddpm\.train (.*)$", said, re.MULTILINE)
    train.main([*QUICK, *shlex.split(line), "--steps", "1"])
    chosen = capsys.readouterr().err.partition("changes it:\n")[2].splitlines()
    proposed = said.partition("--dry-run tells what this machine does:\n")[2].splitlines()
    assert len(proposed) == 11 and set(chosen[:9]) < set(proposed)
    data.main(["inspect", str(source), "--json"])
    assert shlex.join(["--data", str(source)]) in json.loads(capsys.readouterr().out)["training"][0]


@pytest.mark.slow
def test_evaluation_reads_them_with_the_same_options(home: Path) -> None:
    source = str(as_folder(photographs(), home / "photos"))
    train.main([*QUICK, "--data", source, "--steps", "1", "--timesteps", "5", "--sample.steps", "5"])
    arguments = ["runs/photos", "--data", source, "--resize", "area", "--metrics", "none", "--device", "cpu"]
    with pytest.raises(DataError, match="transparent pixels; flatten it onto a background, as --background white does"):
        evaluate.main(arguments)
    evaluate.main([*arguments, "--background", "white"])


def test_a_pack_is_taken_as_it_was_packed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_folder(photographs(), home / "photos")
    data.main([
        "pack", "photos", "x.fdpack", "--image-size", "24", "--image-channels", "3", "--resize", "area",
        "--background", "white",
    ])  # fmt: skip
    train.main([*QUICK, "--data", "x.fdpack", "--steps", "1"])
    config = read_preset(home / "runs" / "photos" / "config.json")
    assert config.unet.image_size == 24 and "24x24 pixels, as packed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bare_line_trains_and_draws(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but --data, as on a machine that has no time."""
    as_folder(photographs(), home / "photos")
    monkeypatch.setattr(from_data, "MINUTES", 0.2)
    train.main(["--data", "photos"])
    run = home / "runs" / "photos"
    assert np.load(run / "samples.npz")["images"].shape == (36, 3, 32, 32)
    config = read_preset(run / "config.json")
    assert config == dataclasses.replace(config, unet=from_data.unet_of("tiny", 32, 3, 0))


@pytest.mark.slow
def test_a_hundred_thousand_pictures_in_bounded_memory(home: Path) -> None:
    """The survey reads 2,000 headers; what is decoded is on the disk. Memory is that of a process of its own."""
    content = [png(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(100)]
    with zipfile.ZipFile(home / "many.zip", "w") as archive:
        for i in range(100_000):
            archive.writestr(f"{i % 7}/{i:06}.png", content[i % 100])
    program = (
        "import resource, sys\nfrom fastddpm.training.from_data import look\n"
        "import fastddpm.data.sources\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found, _ = look('many.zip')\n"
        "print(found.images, found.good, sum(found.classes.values()), "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    images, looked_at, labelled, kib = map(int, done.stdout.split())
    assert (images, looked_at, labelled) == (100_000, 2000, 100_000)
    assert kib < 250_000  # of which the directory of the zip, which Python keeps, takes most


def chosen_together(arguments: list[str]) -> int:
    """Train with what rank 0 chooses and measures; return the steps that this process took."""
    time_budget.MEASURED_S = 0.0
    seconds = 3.0 + int(os.environ["RANK"])  # the processes disagree
    steps: list[int] = []
    plain, take = time_budget.seconds_per_step, Trainer.train_step
    time_budget.seconds_per_step = lambda *a, **k: (plain(*a, **k), steps.clear(), seconds)[2]
    Trainer.train_step = lambda self: (steps.append(self.step), take(self))[1]  # type: ignore[method-assign]
    train.main(arguments)
    return len(steps)


@pytest.mark.slow
def test_processes_train_what_the_first_one_chooses(home: Path) -> None:
    as_folder(photographs(), home / "photos")
    arguments = [
        *QUICK,
        "--data",
        str(home / "photos"),
        "--batch",
        "2",
        "--minutes",
        "0.25",
        "--out",
        str(home / "run"),
    ]
    assert team.values(2, chosen_together, arguments) == [5, 5]  # 15 s at 3 s a step
    config = read_preset(home / "run" / "config.json")
    assert (config.train.steps, config.unet.image_size) == (5, 32)
