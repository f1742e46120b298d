"""TensorBoard where it is installed, Weights & Biases on request, and neither in the way of the run."""

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastddpm.config import Preset
from fastddpm.errors import UsageError
from fastddpm.training import loggers
from fastddpm.training.loggers import Loggers, open_loggers

PRESET = Preset("x")


def opened(run: Path, report: Any, **options: Any) -> Loggers:
    return open_loggers(run, PRESET, report=report, **({"wandb": None} | options))


def only(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    monkeypatch.setattr(loggers, "_installed", lambda library: library in libraries)


class Failing:
    name = "fragile"

    def __init__(self) -> None:
        self.calls = 0

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.calls += 1
        raise OSError("no space\nmore")

    def image(self, step: int, name: str, path: Path) -> None:
        self.calls += 1

    def close(self) -> None:
        self.calls += 1


def test_a_sink_that_fails_is_left_out_with_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    fragile = Failing()
    both = Loggers([fragile], said.append)
    both.write(1, {"step": 1, "loss": 0.5})
    both.write(2, {"step": 2, "loss": 0.5})
    both.image(2, "preview", tmp_path / "x.png")
    both.close()
    assert fragile.calls == 1
    assert said == ["fragile failed and is left out from here on: no space"]


def test_without_libraries_nothing_is_said_or_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    opened(tmp_path, pytest.fail).write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_is_missing_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    with pytest.raises(UsageError, match=r"pip install 'fastddpm\[wandb\]', or leave the option out"):
        opened(tmp_path, pytest.fail, wandb="digits")
    only(monkeypatch, "wandb")
    with pytest.raises(UsageError, match="name of a project"):
        opened(tmp_path, pytest.fail, wandb="")


class Recorded:
    """Stands for the library wandb: what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refusal: Exception | None = None
        module: Any = types.ModuleType("wandb")
        module.Settings = dict
        module.Image = Path
        module.init = self.init
        self.module = module

    def init(self, **options: Any) -> "Recorded":
        if self.refusal is not None:
            raise self.refusal
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_wandb_gets_numbers_and_pictures_and_goes_on_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Recorded()
    only(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "wandb", library.module)
    for step in (4, 8):
        logger = opened(tmp_path, pytest.fail, wandb="digits")
        logger.write(step, {"step": step, "loss": 0.5, "gradient_norm": None, "loss_by_t": [1.0], "lr": float("inf")})
        logger.image(step, "preview", tmp_path / "preview.png")
        logger.close()
    assert [name for name, _ in library.calls] == ["init", "log", "log", "finish"] * 2
    first, second = (value for name, value in library.calls if name == "init")
    assert first == second and first["project"] == "digits" and first["resume"] == "allow"
    assert first["dir"] == str(tmp_path) and first["config"]["name"] == "x" and len(first["id"]) == 8
    assert first["settings"]["disable_git"] and not first["settings"]["save_code"] and "mode" not in first
    assert library.calls[1] == ("log", (4, {"loss": 0.5}))
    assert library.calls[2] == ("log", (4, {"preview": tmp_path / "preview.png"}))


def test_wandb_that_cannot_start_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorded()
    library.refusal = RuntimeError("api_key not configured\nsee https://..")
    only(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "wandb", library.module)
    with pytest.raises(UsageError, match=r"--wandb digits: api_key not configured\. Log in first, set WANDB_MODE"):
        opened(tmp_path, pytest.fail, wandb="digits")


def test_wandb_is_not_even_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    opened(tmp_path, pytest.fail).write(1, {"loss": 1.0})


def test_a_broken_tensorboard_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    opened(tmp_path, said.append).write(1, {"loss": 1.0})
    assert len(said) == 1 and said[0].startswith("note: TensorBoard is installed but does not start")


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pixels = np.arange(48, dtype=np.uint8).reshape(4, 12)
    Image.fromarray(pixels).save(tmp_path / "preview.png")
    for resume_step, steps in ((None, (10, 20, 30)), (20, (30, 40))):
        logger = opened(tmp_path, pytest.fail, resume_step=resume_step)
        for step in steps:
            logger.write(step, {"step": step, "loss": step / 64 + (resume_step or 0), "loss_by_t": [1.0]})
        logger.image(steps[-1], "preview", tmp_path / "preview.png")
        logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    # what the killed process wrote behind the checkpoint, step 30, is gone
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (10, 10 / 64), (20, 20 / 64), (30, 20 + 30 / 64), (40, 20 + 40 / 64),
    ]  # fmt: skip
    picture = events.Images("preview")[-1]
    assert (picture.step, picture.width, picture.height) == (40, 12, 4)
