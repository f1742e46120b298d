"""Training that is watched: the same bits as without, and what its directory holds."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.marks import slow
from helpers.team import grouped, values
from helpers.training import CPU, digest, noise_images, tiny_preset, train, whole_state

from fastddpm import train as command
from fastddpm.config import Preset
from fastddpm.errors import UsageError
from fastddpm.presets import write_preset
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from fastddpm.storage import checkpoint
from fastddpm.training.profiling import Profile
from fastddpm.training.run_log import JsonLines, read_log
from fastddpm.training.samples import Previews
from fastddpm.training.trainer import Trainer


def watched(group: ProcessGroup, preset: Preset, run: Path, *, watch: bool) -> str:
    """The digest of a run's state with everything that watches it, or with nothing."""
    run.mkdir(exist_ok=True)
    trainer = Trainer(preset, noise_images(), CPU, group)
    if watch:
        profile = Profile(run, 2, CPU, warm_up=2, report=str) if group.is_main else None
        trainer.monitor.attach(previews=Previews(run, preset, every=3, steps=4, count=3, group=group), profile=profile)
    log = JsonLines(run / "log.jsonl") if group.is_main else None
    trainer.run(run, log)
    return digest(whole_state(trainer))


def files(run: Path) -> dict[str, bytes]:
    """The newest checkpoint's, by name."""
    return {path.name: path.read_bytes() for path in checkpoint.load(run).path.iterdir()}


@pytest.mark.slow
def test_watching_changes_no_bit_of_a_checkpoint(tmp_path: Path) -> None:
    preset = tiny_preset()
    digests = [
        watched(SINGLE_PROCESS, preset, tmp_path / name, watch=name == "watched") for name in ("plain", "watched")
    ]
    assert digests[0] == digests[1]
    plain, seen = files(tmp_path / "plain"), files(tmp_path / "watched")
    assert plain == seen and len(plain) > 3
    previews = sorted(path.name for path in (tmp_path / "watched" / "previews").iterdir())
    assert previews == [f"step-{step:08d}.png" for step in (3, 6, 9, 12)]
    assert (tmp_path / "watched" / "loss-by-t.png").exists() and not (tmp_path / "plain" / "previews").exists()
    with gzip.open(tmp_path / "watched" / "profile" / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert sum(str(name).startswith("ProfilerStep#") for name in names) == 2


@pytest.mark.slow
def test_a_preview_writes_the_page_and_a_failing_page_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(tiny_preset(steps=2), noise_images(), CPU)
    write_preset(trainer.preset, tmp_path / "config.json")
    trainer.monitor.attach(previews=Previews(tmp_path, trainer.preset, every=1, steps=2, count=1))
    trainer.run(tmp_path, JsonLines(tmp_path / "log.jsonl"))
    page = (tmp_path / "index.html").read_text()
    assert '<span class="state' in page and page.count("<img") == 2 and "is not written" not in capsys.readouterr().err
    (tmp_path / "index.html").unlink()
    (tmp_path / "index.html").mkdir()
    trainer.preset = trainer.monitor._preset = tiny_preset(steps=3)
    trainer.run(tmp_path, JsonLines(tmp_path / "log.jsonl", 2))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is not written" in line]
    assert line.startswith(str(tmp_path / "index.html")) and trainer.step == 3


def test_the_network_of_averages_is_no_copy() -> None:
    trainer = Trainer(tiny_preset(), noise_images(), CPU)
    trainer.train_step()
    averages = trainer.optimizer.averaged()
    with trainer.averaged_weights() as unet:
        found = dict(unet.named_parameters())
        assert {name: p.data_ptr() for name, p in found.items()} == {n: a.data_ptr() for n, a in averages.items()}
        assert all(torch.equal(found[name], average) for name, average in averages.items())
    assert trainer.network.training and not unet.training


def plain_and_watched(group: ProcessGroup, preset: Preset, directory: Path) -> list[str]:
    return [watched(group, preset, directory / name, watch=name == "watched") for name in ("plain", "watched")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", slow("fsdp")])
def test_two_processes_draw_previews_and_train_the_same_bits(tmp_path: Path, kind: str) -> None:
    preset = tiny_preset(parallel=kind, steps=6)
    first, second = values(2, grouped, plain_and_watched, preset, tmp_path)
    assert first == second and first[0] == first[1]
    assert len(list((tmp_path / "watched" / "previews").iterdir())) == 2
    assert (tmp_path / "watched" / "profile" / "trace.json.gz").exists()


def losses_and_t(preset: Preset) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each step's losses and timesteps, taken where they are computed."""
    trainer = Trainer(preset, noise_images(), CPU)
    loss, seen = trainer.diffusion.loss, []

    def noted(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        per_image, t = loss(*args, **options)
        seen.append((per_image.detach().numpy().copy(), t.numpy().copy()))
        return per_image, t

    trainer.diffusion.loss = noted  # type: ignore[method-assign]
    for _ in range(preset.train.steps):
        trainer.train_step()
    return seen


@pytest.mark.parametrize(
    "mode", [{}, slow({"mode": "paper"}), slow({"accumulate": 2})], ids=["standard", "paper", "accumulate"]
)
def test_loss_by_t_is_of_every_image_since_the_line_before(tmp_path: Path, mode: dict[str, object]) -> None:
    preset = tiny_preset(**mode)
    train(SINGLE_PROCESS, preset, tmp_path / "run")
    seen = losses_and_t(preset)
    each = len(seen) // 12  # micro-batches of a step
    for i, line in enumerate(read_log(tmp_path / "run" / "log.jsonl")):
        losses, t = (np.concatenate(part) for part in zip(*seen[4 * i * each : 4 * (i + 1) * each], strict=True))
        assert len(losses) == 32
        for b, mean in enumerate(line["loss_by_t"]):
            inside = losses[t * 20 // 50 == b].astype(np.float64)
            assert mean == (pytest.approx(inside.mean(), rel=1e-5) if len(inside) else None)
        assert line["loss"] == pytest.approx(losses.astype(np.float64).mean(), rel=1e-5)


@pytest.mark.slow
def test_a_run_that_is_resumed_logs_the_same_loss_by_t(tmp_path: Path) -> None:
    train(SINGLE_PROCESS, tiny_preset(), tmp_path / "whole")
    train(SINGLE_PROCESS, tiny_preset(), tmp_path / "parts", until=6)
    train(SINGLE_PROCESS, tiny_preset(), tmp_path / "parts", resume=True)
    whole, parts = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    assert [line["loss_by_t"] for line in whole] == [line["loss_by_t"] for line in parts]


COMMAND = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "2", "--blocks", "1", "--timesteps", "20", "--batch", "8",
    "--log-every", "2", "--sample.steps", "5", "--sample.count", "0", "--device", "cpu",
]  # fmt: skip


@pytest.mark.slow
def test_the_command_leaves_all_that_repeats_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "planted-0123456789")
    command.main([*COMMAND, "--steps", "9", "--preview-every", "4", "--preview-steps", "3", "--profile", "2"])
    run = tmp_path / "runs" / "mnist"
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "environment.json", "log.jsonl", "preview.png", "previews", "loss-by-t.png", "profile",
    }  # fmt: skip
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training")]
    assert [line.split()[1] for line in lines] == ["2/9", "4/9", "6/9", "8/9", "9/9"]
    assert all(len(line["loss_by_t"]) == 20 and line["memory_mib"] > 10 for line in read_log(run / "log.jsonl"))
    command.main(["--resume", "--out", str(run), "--steps", "10", "--preview-every", "0", "--device", "cpu"])
    text = (run / "environment.json").read_text()
    first, second = json.loads(text)["sessions"]
    assert first["command"] == ["python", "-m", "fastddpm.train", *COMMAND, "--steps", "9", "--preview-every", "4",
                                "--preview-steps", "3", "--profile", "2"]  # fmt: skip
    assert (first["step"], second["step"]) == (0, 9) and first["data"]["name"] == "digits"
    assert "planted-0123456789" not in text
    assert len(list((run / "previews").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preview-every", "-1"], "preview_every must be 0"),
        (["--preview-steps", "0"], "preview_steps must be positive"),
        (["--profile", "-1"], "--profile must be 0 or more"),
    ],
)
def test_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((UsageError, SystemExit)) as error:
        command.main([*COMMAND, *options])
    assert message in " ".join(f"{error.value} {capsys.readouterr().err}".split())
