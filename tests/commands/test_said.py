"""What the commands say, and when: mistakes before the work and alone, long work while it goes on, limits once."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import trained
from PIL import Image, features

from fastddpm import ablation, compress, curves, doctor, evaluate, inpaint, sample, train
from fastddpm.config import CodecOptions
from fastddpm.data import __main__ as data
from fastddpm.errors import DataError, FastddpmError, UsageError
from fastddpm.ops import backend
from fastddpm.runtime import cli, progress
from fastddpm.runtime.progress import Meter, announced
from fastddpm.sampling.sampler import Sampler

HELPS: list[tuple[Any, list[str]]] = [
    (train, []), (sample, []), (evaluate, []), (inpaint, []), (compress, ["encode"]), (compress, ["decode"]),
    (ablation, []), (curves, []), (doctor, []), (data, ["inspect"]), (data, ["verify"]), (data, ["pack"]),
]  # fmt: skip
REASON = "nothing faster runs here"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    return trained(tmp_path_factory.mktemp("runs") / "one", "--timesteps", "20", "--sample.steps", "2")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that would be announced after a second is announced at once."""

    def now(action: Callable[[], object]) -> threading.Timer:
        action()
        return threading.Timer(0, lambda: None)

    monkeypatch.setattr(progress, "_later", now)
    monkeypatch.setattr(progress, "_cancel", lambda timer: None)


# Help


@pytest.mark.parametrize(("module", "action"), HELPS, ids=[f"{m.PROGRAM} {' '.join(a)}" for m, a in HELPS])
def test_help_shows_what_an_option_takes(
    module: Any, action: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        module.main([*action, "--help"])
    text = capsys.readouterr().out
    assert "--" in text
    assert "{None" not in text and "None|" not in text and "|{" not in text


def test_help_names_the_kind_of_an_optional_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "--labels TEXT",
        "--batch N",
        "--out PATH",
        "--method {ancestral,ddim,dpm2m,dpm2m-sde,auto}",
        "--guidance NUMBER",
    ):
        assert option in text


def shown(module: Any, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        module.main([*arguments])
    assert not done.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("module", [train, sample, evaluate, inpaint], ids=lambda module: module.PROGRAM)
def test_help_shows_the_common_options_and_help_all_the_rest(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    few, many = (shown(module, words, capsys=capsys) for words in ("--help", "--help-all"))
    options = [set(re.findall(r"^\W* (--\w[\w.-]*)", text, re.M)) for text in (few, many)]
    names = {name.rpartition(".")[2].removeprefix("--").replace("-", "_") for name in options[0]}
    assert names <= {*module.COMMON, "help"} and options[0] < options[1]
    every = {name.rpartition(".")[2].removeprefix("--").replace("-", "_") for name in options[1]}
    assert {*module.COMMON} <= every  # each is an option
    assert "--help-all" in few and "--help-all" not in many
    assert few.splitlines()[0] == shown(module, "-h", capsys=capsys).splitlines()[0]


def test_help_has_the_defaults_of_the_preset_and_texts_of_one_paragraph(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for name, lr, image_size in (("mnist", "0.002", 16), ("lsun256", "2e-05", 256)):
        text = shown(train, "--preset", name, "--help", capsys=capsys)
        assert f"Learning rate of Adam after warm-up. (default: {lr})" in text
        assert f"2^(levels - 1). (default: {image_size})" in text
        assert "default: None" not in text and "default: False" not in text
        assert "Default of --out: the run in runs/ with the newest checkpoint" in text
    assert "--no-flip" in shown(train, "--preset", "cifar10", "--help-all", capsys=capsys)
    assert "--no-resume" not in text  # it does nothing


@pytest.mark.parametrize("words", [["encode", "--help"], ["encode", "--help-all"], ["encode", "x", "y", "z", "-h"]])
def test_help_of_a_subcommand(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(compress, *words, capsys=capsys)
    assert "compress encode" in text.splitlines()[0] and "--lossy N" in text


def test_none_is_still_a_value() -> None:
    parsed = cli.parse(CodecOptions, ["--steps", "None", "--lossy", "3"], program="x")
    assert parsed == CodecOptions(steps=None, lossy=3)
    given = sample.Command(Path("x"), out=Path("y"))
    assert cli.parse(sample.Command, ["x", "--out", "None", "--method", "None"], program="x", default=given).out is None


# Long work


def test_work_is_announced_if_it_lasts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with announced("quick work"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.01)
    said = threading.Event()
    with announced("long work", lambda line: (progress.log(line), said.set())):
        assert said.wait(60)
    assert capsys.readouterr().err == "long work ..\n"
    assert announced.__module__ == progress.__name__ and progress.PATIENCE_S < 2


def test_work_goes_on_if_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with announced("work"), Meter("more work", 1, "steps") as meter:
        meter.update(1)
    assert "more work 1/1 steps" in capsys.readouterr().err


def test_a_meter_shows_its_first_line_while_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.01)
    lines: list[str] = []
    said = threading.Event()
    monkeypatch.setattr(progress, "log", lambda line: (lines.append(line), said.set()))
    with Meter("work", 10, "steps", done=2):
        assert said.wait(60)
    assert lines == ["work 2/10 steps"]


def test_a_brief_meter_is_silent_about_quick_work(capsys: pytest.CaptureFixture[str]) -> None:
    for brief, count in ((True, 0), (False, 1)):
        with Meter("work", 2, "steps", brief=brief) as meter:
            meter.update(1)
            meter.update(2)
        assert len(capsys.readouterr().err.splitlines()) == count


@pytest.mark.usefixtures("impatient")
def test_a_dry_run_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    train.main(["--width", "8", "--groups", "4", "--multipliers", "1", "--batch", "2", "--device", "cpu", "--dry-run"])
    lines = capsys.readouterr().err.splitlines()
    wanted = [
        "loading PyTorch ..", "reading the embedded digits ..", "building the network ..",
        "taking the shapes and the memory of one micro-batch ..", "taking the first step ..", "timing steps ..",
    ]  # fmt: skip
    assert [line for line in lines if line in wanted] == wanted


@pytest.mark.usefixtures("impatient")
def test_commands_say_what_they_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 16), i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    photos = str(tmp_path / "photos")
    common = {"loading PyTorch ..", f"reading {run} .."}
    for module, arguments, wanted in (
        (sample, [str(run), "--seeds", "0", "--out", str(tmp_path / "s")], common | {"sampling 0/2 image steps"}),
        (
            evaluate,
            [str(run), "--metrics", "bpd", "--data", photos, "--bits.images", "2", "--out", str(tmp_path / "e")],
            common | {
                f"looking for images in {photos} ..", f"reading the images of {photos} ..", "decoding 0/3 images",
                "timing the network ..", f"checking the shards in {tmp_path / 'e' / 'train' / 'bits-parts'} ..",
                "bits/dim 0/40 evaluations",
            },
        ),
        (
            compress,
            ["encode", str(run), "digits", str(tmp_path / "d.fdz"), "--count", "1", "--steps", "2"],
            common | {"coding 0/2 image steps"},
        ),
        (data, ["inspect", photos], {"reading 0/3 images", "looking for equal images .."}),
        (
            data,
            ["pack", photos, str(tmp_path / "x.fdpack"), "--image-size", "16", "--image-channels", "1"],
            {"packing 0/3 images"},
        ),
        (data, ["verify", str(tmp_path / "x.fdpack")], {"verifying 0/3 images"}),
    ):  # fmt: skip
        module.main(arguments)  # type: ignore[attr-defined]
        assert wanted <= set(capsys.readouterr().err.splitlines()), arguments


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--batch", "5008"], DataError, "5000 images are fewer than a batch of 5008"),
        (["--data", "nowhere"], UsageError, "nowhere"),
        (["--num-classes", "3"], DataError, "has label 9, but num_classes is 3"),
        (["--batch", "8", "--mode", "paper", "--schedule", "jsd", "--prediction", "eps"], UsageError, "no signal"),
        (["--wandb", ""], UsageError, "--wandb takes the name of a project"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_mistake_comes_without_the_configuration(
    arguments: list[str],
    error: type[FastddpmError],
    message: str,
    more: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train.main([*arguments, "--device", "cpu", *more])
    said = capsys.readouterr().err
    assert "configuration" not in said and "unet:" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_told_alone_before_the_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastddpm.data.open_dataset", None)
    with pytest.raises(UsageError, match="device cuda was asked for"):
        train.main(["--device", "cuda", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err == ""


def test_options_that_no_data_fit_are_refused_before_the_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastddpm.data.open_dataset", None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="batch must be a multiple of processes x accumulate, 3 x 1; got 16"):
        train.main(["--device", "cpu", "--out", str(tmp_path / "run")])


def test_a_wrong_label_or_seed_is_refused_before_the_first_batch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "trajectory", None)
    for arguments, message in (
        (["--seeds", "0-3", "--labels", "1,2,3,99"], "labels must be in 0..9; got 99"),
        (["--seeds", "0-3,4294967296"], "image seeds must be in"),
    ):
        with pytest.raises(UsageError, match=message):
            sample.main([str(run), "--batch", "1", "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_the_ablation_refuses_before_the_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fastddpm.data.open_dataset", None)
        with pytest.raises(UsageError, match="the classifier of digits takes grey images"):
            ablation.main(["--preset", "cifar10", "--out", str(tmp_path)])
    monkeypatch.setattr("fastddpm.evaluation.ablation.open_network", None)
    with pytest.raises(UsageError, match=r"too few images for --bits\.every 20: it needs 40"):
        ablation.main(["--bits.images", "4", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


# Limits


def test_every_command_that_computes_says_once_why_nothing_faster_runs_and_that_the_run_is_short(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "obstacles", lambda operation, device_type: [REASON])
    chain, cpu = ["--steps", "2"], ["--device", "cpu"]
    file = str(tmp_path / "x.fdz")
    for module, arguments in (
        (sample, [str(run), "--seeds", "0", "--out", str(tmp_path / "sample"), *chain]),
        (evaluate, [str(run), "--metrics", "none", "--out", str(tmp_path / "evaluate")]),
        (
            inpaint,
            [
                *[str(run), "--pick", "0", "--seeds", "0", "--resamplings", "1", "--frames", "0", *chain],
                *["--out", str(tmp_path / "inpaint")],
            ],
        ),
        (compress, ["encode", str(run), "digits", file, "--count", "1", *chain]),
        (compress, ["decode", str(run), file, str(tmp_path / "x.npz")]),
        (train, ["--resume", "--out", str(run), "--steps", "2"]),
        (
            ablation,
            [
                *["--steps", "1", "--timesteps", "5", "--samples", "2", "--network", "none", "--cells", "eps-simple"],
                *["--bits.images", "2", "--bits.every", "1", "--out", str(tmp_path / "ablation")],
            ],
        ),
    ):
        module.main([*arguments, *cpu])  # type: ignore[attr-defined]
        lines = capsys.readouterr().err.splitlines()
        assert lines.count(f"note: {REASON}") == 1, arguments
        short = [line for line in lines if "too few to give images" in line]
        assert len(short) == 1 and "It takes 459 steps with these options" in short[0], arguments
        if module is train:
            assert lines.index(short[0]) < next(i for i, line in enumerate(lines) if line.startswith("training 2/2"))


def test_a_run_that_is_long_enough_is_not_called_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "run", "--ema", "0", "--warmup", "0")
    sample.main([str(tmp_path / "run"), "--seeds", "0", "--steps", "1", "--device", "cpu"])
    said = capsys.readouterr().err
    assert "training 1/1 steps" in said and "too few" not in said


# What an animation begins with


def test_the_animation_is_x_t_beside_the_prediction(run: Path, tmp_path: Path) -> None:
    """From the noise, which Philox alone gives, to the images, which samples.npz holds."""
    sample.main([str(run), "--seeds", "0-8", "--steps", "20", "--gif", "--out", str(tmp_path), "--device", "cpu"])
    with Image.open(tmp_path / "denoising.gif") as gif:
        assert gif.n_frames == 21 and gif.width <= 650 and (tmp_path / "denoising.gif").stat().st_size < 2_000_000
        assert gif.info["duration"] >= 400
        first = np.asarray(gif.convert("L"))
        gif.seek(20)
        last = np.asarray(gif.convert("L"))
    scale = 300 // (3 * 16)
    width, top = 3 * 16 * scale + 4, first.shape[0] - 8 - (3 * 16 * scale + 4)

    def shown(frame: np.ndarray, left: int) -> np.ndarray:
        return frame[top : top + 16 * scale : scale, left : left + 16 * scale : scale]

    from fastddpm import ops
    from fastddpm.kernels.philox import STREAM_INITIAL

    zero = torch.tensor(0)
    noise = ops.random_normal((1, 16, 16), torch.tensor([0]), zero, zero, STREAM_INITIAL)
    levels = ((noise[0, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    np.testing.assert_array_equal(shown(first, 8), levels.numpy())
    images = np.load(tmp_path / "samples.npz")["images"]
    np.testing.assert_array_equal(shown(last, 8), images[0, 0])
    np.testing.assert_array_equal(shown(last, width + 16), images[0, 0])


@pytest.mark.parametrize(
    ("flags", "name"), [(["webp"], "denoising.webp"), (["gif"], "denoising.gif"), (["none"], None)]
)
def test_the_animation_has_the_format_asked_for(run: Path, tmp_path: Path, flags: list[str], name: str | None) -> None:
    if flags == ["webp"] and not features.check("webp"):
        pytest.skip("this installation of Pillow writes no WebP")
    sample.main([str(run), "--seeds", "0", "--steps", "2", "--animation", *flags, "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.glob("denoising*")] == ([] if name is None else [name])


def test_an_animation_that_cannot_be_written_is_refused_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="--gif and --animation webp exclude each other"):
        sample.main([str(run), "--gif", "--animation", "webp", *out])
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(UsageError, match="writes no WebP; use --animation gif"):
        sample.main([str(run), "--animation", "webp", *out])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_override_is_recorded_and_marked(tmp_path: Path) -> None:
    from fastddpm.training.environment import changes

    trained(tmp_path / "run")
    more = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    train.main(["--resume", "--steps", "2", *more])
    train.main(["--resume", "--steps", "3", "--override", "--lr", "0.001", *more])
    assert changes(tmp_path / "run") == [(2, "lr: 0.002 -> 0.001")]
