"""The commands as a user meets them: quick help, clear mistakes, exit codes, a whole small run."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.marks import slow
from PIL import Image

import fastddpm
from fastddpm import sample, train
from fastddpm.errors import DataError, DivergedError, UsageError
from fastddpm.sampling.images import animation_suffix, to_uint8
from fastddpm.sampling.options import ChainOptions
from fastddpm.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "2", "--blocks", "1", "--timesteps", "20", "--batch", "8",
    "--log-every", "2", "--sample.steps", "5", "--sample.count", "4", "--device", "cpu",
]  # fmt: skip


def python(*arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    ("module", "mistyped", "meant"),
    [
        ("fastddpm.train", "--stpes", "--steps"),
        slow("fastddpm.sample", "--stpes", "--steps"),
        slow("fastddpm.doctor", "--bacth", "--batch"),
        ("fastddpm.evaluate", "--metircs", "--metrics"),
        slow("fastddpm.inpaint", "--gudance", "--guidance"),
    ],
)
def test_help_and_mistyped_flags_answer_without_torch(module: str, mistyped: str, meant: str, tmp_path: Path) -> None:
    program = (
        "import runpy, sys, json\n"
        "sys.argv = [sys.argv[1], *sys.argv[2:]]\n"
        "try:\n    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=False)\n"
        "except SystemExit as e:\n    code = e.code or 0\n"
        "print(json.dumps({'code': code, 'torch': 'torch' in sys.modules}))\n"
    )
    for flags, code in ((["--help"], 0), (["x", mistyped, "3"], 2)):
        done = python("-c", program, module, *flags, cwd=tmp_path)
        assert json.loads(done.stdout.splitlines()[-1]) == {"code": code, "torch": False}, done.stderr
    assert meant in done.stderr + done.stdout  # the suggestion


def test_output_that_nobody_reads_to_the_end_is_no_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastddpm.sample", "--help"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_the_answer_to_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, message in [
        (["fastddpm.train", "--preset", "cifar"], "unknown preset 'cifar'; choose one of cifar10"),
        (["fastddpm.sample", "nowhere"], "no checkpoint at nowhere"),
        (["fastddpm.train", "--resume"], "nothing to resume"),
    ]:
        done = python("-m", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch must be positive"),
        (["--image-size", "17"], "divisible by"),
        (["--variance", "learned"], "gets no gradient from loss simple"),
        (["--data", "nowhere"], "nowhere"),
        (["--sample.guidance", "3", "--label-dropout", "0"], "guidance needs"),
        (["--sample.guidance", "nan"], "guidance must be in"),
        (["--sample.guidance", "inf"], "guidance must be in"),
        (["--sample.count", "99999999999999999999"], "count must be in"),
        (["--lr", "inf"], "lr must be finite"),
    ],
)
def test_impossible_configurations_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, SystemExit)) as error:
        train.main(arguments)
    assert (error.value.code if isinstance(error.value, SystemExit) else error.value.exit_code) == 2
    assert message in " ".join(f"{error.value} {capsys.readouterr().err}".split())
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first command, shortened, in a directory of its own."""
    directory = tmp_path_factory.mktemp("newcomer")
    previous = Path.cwd()
    os.chdir(directory)
    try:
        train.main([*TINY, "--steps", "6"])
    finally:
        os.chdir(previous)
    return directory / "runs" / "mnist"


def test_the_first_command_leaves_what_it_promises(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "log.jsonl", "checkpoints", "samples.png", "samples.npz",
        f"denoising{animation_suffix()}", "index.html",
    }  # fmt: skip
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    arrays = np.load(run / "samples.npz")
    assert arrays["images"].shape == (4, 1, 16, 16) and arrays["images"].dtype == np.uint8
    with Image.open(run / f"denoising{animation_suffix()}") as animation:
        assert animation.n_frames == 6  # 5 steps and the images
    config = json.loads((run / "config.json").read_text())
    assert config["unet"]["width"] == 8 and config["train"]["steps"] == 6


def test_the_page_is_of_the_finished_run(run: Path) -> None:
    page = (run / "index.html").read_text()
    assert '<span class="state finished">' in page and "trained on 5,000 images of digits for 6 steps" in page
    assert "Seeds 0 to 3, ancestral sampling in 5 steps" in page and page.count("<img") == 2


def test_a_run_that_stops_leaves_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(trainer: Trainer, *arguments: object, **options: object) -> Path:
        raise DivergedError("stopped")

    monkeypatch.setattr(Trainer, "run", stop)
    with pytest.raises(DivergedError):
        train.main([*TINY, "--out", str(tmp_path)])
    assert '<span class="state not-begun">' in (tmp_path / "index.html").read_text()


def test_the_run_directory_is_not_overwritten(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="holds a run already"):
        train.main([*TINY, "--steps", "6", "--out", str(run)])
    monkeypatch.chdir(run.parent.parent)
    train.main([*TINY, "--steps", "1", "--sample.count", "0"])
    assert (run.parent / "mnist-2" / "config.json").exists()


def test_load_gives_the_averaged_model(run: Path) -> None:
    model = fastddpm.load(run)
    assert model.preset.unet.width == 8 and model.diffusion.timesteps == 20 and not model.unet.training
    again = fastddpm.load(run / "checkpoints" / "step-00000006")
    for name, tensor in model.unet.state_dict().items():
        assert tensor.equal(again.unet.state_dict()[name])


def test_sampling_reproduces_the_grid_whatever_the_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closing = np.load(run / "samples.npz")["images"]
    out = run / "again"
    sample.main([str(run), "--seeds", "2,0-1,3", "--batch", "3", "--out", str(out), "--png", "--gif"])
    arrays = np.load(out / "samples.npz")
    assert arrays["seeds"].tolist() == [2, 0, 1, 3]
    assert np.abs(arrays["images"].astype(int) - closing[[2, 0, 1, 3]]).max() <= 1
    with Image.open(out / "0000000002.png") as image:
        np.testing.assert_array_equal(np.asarray(image), arrays["images"][0, 0])
    assert (out / "denoising.gif").exists()
    assert str(out / "samples.png") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "5-3"], "runs backwards"),
        (["--seeds", "a"], "numbers and ranges"),
        (["--seeds", "4294967296"], "image seeds must be in"),
        (["--seeds", "0-99999999"], "more than"),
        (["--seeds", "0-2", "--labels", "1,2"], "2 classes for 3 seeds"),
        (["--labels", "99"], "labels must be in|without classes"),
        (["--steps", "21"], "steps must be in 1..20"),
    ],
)
def test_sampling_mistakes(run: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        sample.main([str(run), "--out", str(tmp_path), *arguments])


def test_ddim_and_fewer_steps(run: Path, tmp_path: Path) -> None:
    options = ["--seeds", "0-1", "--method", "ddim", "--steps", "3", "--out", str(tmp_path)]
    sample.main([str(run), *options])
    first = np.load(tmp_path / "samples.npz")["images"]
    sample.main([str(run), *options])
    np.testing.assert_array_equal(first, np.load(tmp_path / "samples.npz")["images"])
    sample.main([str(run), *options, "--noise-seed", "1"])
    assert (first != np.load(tmp_path / "samples.npz")["images"]).any()


def test_what_a_run_has_can_be_switched_off(run: Path) -> None:
    """0 for the threshold, all timesteps for the interval; another method than ddim leaves the run's eta."""
    model = fastddpm.load(run)
    own = dataclasses.replace(
        model.preset.sample, method="ddim", eta=0.5, dynamic_threshold=0.9, guidance_interval=(2, 5)
    )
    model = dataclasses.replace(model, preset=dataclasses.replace(model.preset, sample=own))
    plain = ChainOptions().sampler(model)
    assert (plain.eta, plain.guide.dynamic_threshold, plain.guide.interval) == (0.5, 0.9, (2, 5))
    other = ChainOptions(method="dpm2m", dynamic_threshold=0, guidance_interval=(0, 19)).sampler(model)
    assert (other.method, other.eta, other.guide.dynamic_threshold) == ("dpm2m", 0.0, None)
    assert other.guide.inside(other.timesteps).all()


def test_guidance_options(run: Path, tmp_path: Path) -> None:
    """The command's images are the sampler's, and sampling.json says how they were drawn."""
    options = ["--guidance", "4", "--guidance-interval", "4", "15", "--guidance-rescale", "0.5"]
    options += ["--dynamic-threshold", "0.9", "--steps", "6", "--seeds", "0-1", "--shard-size", "2"]
    sample.main([str(run), *options, "--out", str(tmp_path)])
    model = fastddpm.load(run)
    sampler = fastddpm.Sampler(
        model.unet, model.diffusion, 6, guidance=4.0, guidance_interval=(4, 15), guidance_rescale=0.5,
        dynamic_threshold=0.9,
    )  # fmt: skip
    np.testing.assert_array_equal(np.load(tmp_path / "shard-00000.npz")["images"], to_uint8(sampler.sample([0, 1])))
    said = json.dumps(json.loads((tmp_path / "sampling.json").read_text()))
    assert '"guidance_interval": [4, 15]' in said and '"dynamic_threshold": 0.9' in said


def test_dry_run_reports_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--dry-run"])
    text = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    model = fastddpm.preset("mnist").unet
    assert "mid.attention" in text and "8x16x8x8" in text and model.image_size == 16
    unet = fastddpm.UNet(_tiny_unet_config())
    assert f"{sum(p.numel() for p in unet.parameters()):,}" in text


def _tiny_unet_config() -> object:
    return train.cli.parse(train.Command, TINY, program="x", default=_mnist_command()).resolved().unet


def _mnist_command() -> train.Command:
    base = fastddpm.preset("mnist")
    return train.Command("mnist", unet=base.unet, diffusion=base.diffusion, train=base.train, sample=base.sample)


def test_resume_refuses_another_model_and_continues_with_other_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--steps", "2", "--sample.count", "0"])
    with pytest.raises(UsageError, match=r"width: 8 -> 16"):
        train.main(["--resume", "--width", "16"])
    train.main(["--resume", "--steps", "4"])
    assert (tmp_path / "runs" / "mnist" / "checkpoints" / "step-00000004").is_dir()
    assert not (tmp_path / "runs" / "mnist-2").exists()


@pytest.mark.slow
def test_resume_refuses_another_preset_and_fewer_steps_than_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--steps", "2", "--sample.count", "0", "--out", "run"])
    saved = (tmp_path / "run" / "config.json").read_text()
    for arguments, message in [
        (["--preset", "cifar10"], "a run of preset mnist, not cifar10"),
        (["--steps", "1"], "has taken 2 steps already; --steps 1 would end before that"),
    ]:
        with pytest.raises(UsageError, match=message):
            train.main(["--resume", "--out", "run", *arguments])
        assert (tmp_path / "run" / "config.json").read_text() == saved
    with pytest.raises(UsageError, match="nothing to resume: elsewhere holds no run"):
        train.main(["--resume", "--out", "elsewhere"])


def test_a_refused_training_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="5000 images are fewer than a batch of 5008"):
        train.main([*TINY, "--steps", "2", "--batch", "5008"])
    assert list(tmp_path.iterdir()) == []


def test_the_next_command_quotes_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a run's"
    train.main([*TINY, "--steps", "1", "--sample.count", "1", "--out", str(run)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line.removeprefix("next: "))[:4] == ["python", "-m", "fastddpm.sample", str(run)]


@pytest.mark.slow
def test_sigterm_saves_exits_143_and_resumes(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastddpm.train", *TINY, "--steps", "100000", "--out", str(tmp_path / "run")],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    assert "SIGTERM: saved step" in stderr.splitlines()[-1]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    done = python(
        "-m", "fastddpm.train", "--resume", "--out", str(tmp_path / "run"), "--steps", str(step + 2), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"at step {step}" in done.stderr
