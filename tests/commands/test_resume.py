"""--resume: the newest run, its data, how they were read, and every option, from wherever it is called."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm import train
from fastddpm.errors import DataError, UsageError
from fastddpm.storage import checkpoint
from fastddpm.training.run_log import read_log
from fastddpm.training.saved import RunOptions, TrainingData, document

TINY = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "--attention-resolutions", "8", "--batch", "2",
    "--sample.count", "0", "--device", "cpu", "--log-every", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def of_one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "mnist"
    train.main([*TINY, "--steps", "1", "--out", str(run)])
    return run


@pytest.fixture
def one_step(home: Path, of_one_step: Path) -> Path:
    """A run in the current directory, where `train` puts it by itself."""
    return shutil.copytree(of_one_step, home / "runs" / "mnist")


@pytest.fixture
def photos(home: Path) -> Path:
    """Two classes of grey pictures of mixed sizes, and one file that is none."""
    rng = np.random.default_rng(0)
    for i in range(8):
        path = home / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 24), dtype=np.uint8)).save(path)
    (home / "photos" / "cat" / "broken.png").write_bytes(b"no picture")
    return home / "photos"


def steps(run: Path) -> list[int]:
    return [record["step"] for record in read_log(run / "log.jsonl")]


def test_the_data_and_how_they_were_read_are_remembered(
    photos: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*TINY, "--preset", "mnist", "--data", "photos", "--resize", "area", "--skip-bad", "--timeout", "60",
                "--steps", "2", "--num-classes", "2"])  # fmt: skip
    run = home / "runs" / "mnist"
    options = RunOptions(str(photos), "area", skip_bad=True, timeout=60.0)
    assert RunOptions.read(run) == options
    assert "2 classes: cat, dog" in capsys.readouterr().err
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    train.main(["--resume", "--out", str(run), "--steps", "4", "--device", "cpu"])
    assert steps(run) == [1, 2, 3, 4] and RunOptions.read(run) == options
    saved = checkpoint.load(run)
    data = document(TrainingData, saved.documents, "data", saved.path)
    assert data.classes == ("cat", "dog") and data.source == str(photos)
    sessions = json.loads((run / "environment.json").read_text())["sessions"]
    assert [session["data"]["classes"] for session in sessions] == [["cat", "dog"]] * 2


def test_an_option_given_again_replaces_the_remembered_one(photos: Path, home: Path) -> None:
    train.main([*TINY, "--preset", "mnist", "--data", "photos", "--resize", "area", "--skip-bad", "--steps", "1",
                "--num-classes", "2"])  # fmt: skip
    with pytest.raises(DataError, match=r"was trained on .*photos .*, not on .*name that data set with --data"):
        train.main(["--resume", "--resize", "lanczos"])
    assert RunOptions.read(home / "runs" / "mnist").resize == "area"
    photos.rename(home / "moved")
    with pytest.raises(UsageError, match="photos"):
        train.main(["--resume"])
    train.main(["--resume", "--data", "moved", "--steps", "2"])
    assert RunOptions.read(home / "runs" / "mnist").data == str(home / "moved")


@pytest.mark.slow
def test_the_newest_run_is_that_of_the_last_checkpoint(home: Path) -> None:
    for name in ("gray128", "mnist", "mnist-2"):
        train.main([*TINY, "--steps", "1", "--out", f"runs/{name}"])
        os.utime(home / "runs" / name / "config.json", (2e9, 2e9))
    newest = home / "runs" / "gray128"
    os.utime(newest / "checkpoints" / "step-00000001", (3e9, 3e9))
    train.main(["--resume", "--steps", "2"])
    assert {run.name: steps(run)[-1] for run in (home / "runs").iterdir()} == {"gray128": 2, "mnist": 1, "mnist-2": 1}


def test_only_runs_of_the_preset_if_one_is_given(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*TINY, "--steps", "1", "--out", "runs/a"])
    shutil.copytree(home / "runs" / "a", home / "runs" / "b")
    config = home / "runs" / "b" / "config.json"
    config.write_text(config.read_text().replace('"mnist"', '"cifar10"', 1))
    os.utime(home / "runs" / "b" / "checkpoints" / "step-00000001", (3e9, 3e9))
    (home / "runs" / "c").mkdir()
    (home / "runs" / "c" / "config.json").write_text("{")
    capsys.readouterr()
    train.main(["--resume", "--preset", "mnist", "--steps", "2"])
    assert steps(home / "runs" / "a") == [1, 2]
    assert "runs/c is passed over" in capsys.readouterr().err
    with pytest.raises(UsageError, match="nothing to resume: no run of preset lsun256 in"):
        train.main(["--resume", "--preset", "lsun256"])


@pytest.mark.slow
def test_a_damaged_log_stops_no_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*TINY, "--steps", "2"])
    run = home / "runs" / "mnist"
    log = run / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'\xff{"step": 2\n')
    (run / "environment.json").write_text("[]")
    capsys.readouterr()
    train.main(["--resume", "--steps", "3"])
    assert steps(run) == [1, 2, 3]
    said = capsys.readouterr().err
    assert "1 damaged lines of" in said and "environment.json must hold a JSON object" in said
    log.unlink()
    os.mkfifo(log)
    train.main(["--resume", "--steps", "4"])
    assert steps(run) == [4]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ('{"skip_bad": "yes"}', "skip_bad must be bool; got 'yes'"),
        ('{"colour": 1}', "has no field 'colour'"),
        ('{"resize": "bicubic"}', "resize must be one of none, area, lanczos; got 'bicubic'; give the options again"),
        ('{"resize": []}', "resize must be one of none, area, lanczos; got .*; give the options again"),
    ],
)
def test_damaged_options_are_one_error(text: str, problem: str, one_step: Path) -> None:
    (one_step / "options.json").write_text(text)
    with pytest.raises(DataError, match=problem):
        train.main(["--resume", "--steps", "2"])


def test_a_run_without_options_resumes_on_the_defaults(one_step: Path) -> None:
    """As one of an older version: it has no options.json."""
    (one_step / "options.json").unlink()
    train.main(["--resume", "--steps", "2"])
    assert steps(one_step) == [1, 2]


def resealed(run: Path, name: str, text: str) -> None:
    """Replace a document of the newest checkpoint, and its checksums, as somebody who forges it would."""
    from fastddpm.storage import manifest

    path = next((run / "checkpoints").iterdir())
    (path / name).write_text(text)
    for sealed in manifest.NAMES:
        (path / sealed).unlink()
    manifest.seal(path, 1, {file.name: manifest.entry_of(file) for file in path.iterdir()})


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (
            "state.json",
            json.dumps({"step": "1", "tally": {"loss_sum": 0, "steps": 0, "bad_in_a_row": 0}}),
            r"state\.json\.step must be int; got '1'",
        ),
        ("state.json", "[]", r"state\.json must be an object; got list"),
        ("data.json", "{}", r"data\.json lacks the field 'name'"),
        ("data.json", '{"name": "x", "checksum": 5}', r"checksum must be str; got 5"),
    ],
)
def test_forged_documents_of_a_checkpoint_are_one_error(name: str, text: str, problem: str, one_step: Path) -> None:
    resealed(one_step, name, text)
    with pytest.raises(DataError, match=problem):
        train.main(["--resume", "--steps", "2"])


def test_a_forged_width_is_refused_before_it_takes_memory(home: Path) -> None:
    """The network of 4,096 channels would take 7 GB: 16 bytes for each of 450 million parameters."""
    import resource

    from fastddpm import load

    train.main([*TINY, "--steps", "1"])
    run = home / "runs" / "mnist"
    config = json.loads((run / "config.json").read_text())
    config["unet"] |= {"width": 4096, "groups": 32}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"the weights do not fit the network.*expected \(16384, 4096\)"):
        train.main(["--resume", "--steps", "2"])
    resealed(run, "config.json", json.dumps(config))
    with pytest.raises(DataError, match=r"the weights do not fit the network.*expected \(16384, 4096\)"):
        load(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
