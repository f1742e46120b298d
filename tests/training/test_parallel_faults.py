"""Faults among several processes: one that dies, hangs, is signalled, sees NaN or cannot write."""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import team
from helpers.marks import slow
from helpers.training import CPU, digest, noise_images, tiny_preset, train, whole_state

from fastddpm.errors import DivergedError
from fastddpm.runtime import distributed
from fastddpm.runtime.distributed import SINGLE_PROCESS, LostProcessError, ProcessGroup
from fastddpm.storage import checkpoint, manifest
from fastddpm.training.samples import draw_final_samples
from fastddpm.training.trainer import Trainer

TIMEOUT_S = 3.0


def with_fault(group: ProcessGroup, run: Path, fault: str, kind: str) -> None:
    """Train; in step 3 process 1 is killed, or does not answer any more."""
    trainer_step = Trainer.train_step

    def step(trainer: Trainer) -> Any:
        if trainer.step == 2 and group.rank == 1:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return trainer_step(trainer)

    Trainer.train_step = step  # type: ignore[method-assign]
    train(group, tiny_preset(save_every=1, parallel=kind), run)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "kind"), [("killed", "ddp"), slow("hung", "ddp"), slow("killed", "fsdp")])
def test_the_others_stop_when_a_process_is_lost(tmp_path: Path, fault: str, kind: str) -> None:
    run = tmp_path / "run"
    arguments = {"timeout_s": TIMEOUT_S if fault == "hung" else 60.0}
    started = team.start(2, lost, run, fault, kind, arguments, directory=tmp_path)
    begun = time.monotonic()
    started[0].join(60)
    assert started[0].exitcode == LostProcessError.exit_code == 75
    if fault == "hung":
        assert started[1].is_alive()
        started[1].kill()
    first, second = team.wait(started, tmp_path)
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("error:")]
    assert "another process died or did not answer for" in line and "start again to continue from them" in line
    assert second.code == -signal.SIGKILL
    saved = checkpoint.load(run)
    assert saved.step == 2
    print(f"{fault}, {kind}: stopped {time.monotonic() - begun:.1f} s after the start")


def lost(run: Path, fault: str, kind: str, options: dict[str, float]) -> None:
    team.grouped(with_fault, run, fault, kind, **options)


def lost_before_meeting(fault: str, rank: int) -> None:
    """Process `rank` has met the store and is gone before it says there where it is found."""
    import torch.distributed as dist

    def gone(*_: Any, **__: Any) -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), getattr(signal, fault))

    group = distributed.group_from_environment()
    if group.rank == rank:
        dist.init_process_group = gone  # type: ignore[assignment]
    team.grouped(lambda group: None, timeout_s=1.0)


@pytest.mark.parametrize("fault", ["SIGKILL", slow("SIGSTOP")])
@pytest.mark.parametrize("rank", [0, slow(1)])
def test_a_process_lost_while_the_group_forms(tmp_path: Path, fault: str, rank: int) -> None:
    """The first holds the store of both."""
    started = team.start(2, lost_before_meeting, fault, rank, directory=tmp_path)
    started[1 - rank].join(60)
    code = started[1 - rank].exitcode  # that of before the kill
    started[rank].kill()
    other = team.wait(started, tmp_path)[1 - rank]
    assert code == LostProcessError.exit_code, other.stderr
    assert "error: another process died or did not answer for 1 s" in other.stderr


def lost_at_reading(group: ProcessGroup, run: Path) -> None:
    """Process 1 is killed as both have begun to read the shards of a checkpoint."""
    import torch.distributed.checkpoint as dcp

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    preset = tiny_preset(parallel="fsdp", steps=1)
    train(group, preset, run)
    if group.rank == 1:
        dcp.load = killed  # type: ignore[assignment]
    train(group, preset, run, resume=True)


@pytest.mark.slow
def test_a_process_lost_while_shards_are_read_is_not_taken_for_damage(tmp_path: Path) -> None:
    first, second = team.run(2, team.grouped, lost_at_reading, tmp_path / "run")
    assert (first.code, second.code) == (LostProcessError.exit_code, -signal.SIGKILL)
    assert "another process died" in first.stderr


def signalled(group: ProcessGroup, run: Path) -> tuple[int, str]:
    """SIGTERM to process 1 alone, and SIGUSR1 to process 0 before that."""
    trainer_step = Trainer.train_step

    def step(trainer: Trainer) -> Any:
        if trainer.step == 2 and group.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        if trainer.step == 4 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return trainer_step(trainer)

    Trainer.train_step = step  # type: ignore[method-assign]
    train(group, tiny_preset(keep=5, log_every=1), run)
    return 0, ""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for one in team.run(2, team.grouped, signalled, run):
        assert one.code == 128 + signal.SIGTERM
        assert "SIGTERM: saved step 5" in one.stderr
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000003", "step-00000005"]
    assert len((run / "log.jsonl").read_text().splitlines()) == 5


def poisoned(group: ProcessGroup, kind: str) -> tuple[list[bool], str, str]:
    """The images of process 1 give NaN in step 3: which steps were applied, and the state around that one."""
    trainer = Trainer(tiny_preset(parallel=kind), noise_images(), CPU, group)
    loss = trainer.diffusion.loss

    def bad(*arguments: Any, **options: Any) -> Any:
        per_image, t = loss(*arguments, **options)
        return per_image * (float("nan") if trainer.step == 2 and group.rank == 1 else 1.0), t

    trainer.diffusion.loss = bad  # type: ignore[method-assign]
    applied, digests = [], []
    for _ in range(4):
        applied.append(bool(trainer.train_step()[2]))
        digests.append(digest(whole_state(trainer)))
    assert len(set(digests)) == 3
    return applied, digests[1], digests[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", slow("fsdp")])
def test_nan_in_one_process_changes_none(kind: str) -> None:
    for applied, before, after in team.values(2, team.grouped, poisoned, kind):
        assert applied == [True, True, False, True] and before == after


def on_a_full_disk(group: ProcessGroup, run: Path, kind: str) -> None:
    def full(path: Path, data: bytes) -> Any:
        if path.name == "model.safetensors" and "0004" in path.parent.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    write, manifest.write_file = manifest.write_file, full
    train(group, tiny_preset(save_every=2, parallel=kind), run)


@pytest.mark.parametrize("kind", ["ddp", slow("fsdp")])
def test_a_full_disk_stops_all_with_the_same_error(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    for one in team.run(2, team.grouped, on_a_full_disk, run, kind):
        assert one.code == 5 and "cannot save step 4" in one.stderr and "No space left" in one.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint.load(run).step == 2


def diverging(group: ProcessGroup, run: Path) -> None:
    run.mkdir(exist_ok=True)
    trainer = Trainer(tiny_preset(patience=2), noise_images(), CPU, group)
    with torch.no_grad():
        if group.rank == 1:
            trainer.optimizer.averages[0.9][3].fill_(float("nan"))
    if group.is_main:
        run.mkdir(exist_ok=True)
    trainer.step = 12
    trainer.run(run, None)


def test_damage_in_one_process_is_saved_by_none(tmp_path: Path) -> None:
    for one in team.run(2, team.grouped, diverging, tmp_path / "run"):
        assert one.code == DivergedError.exit_code and "step 12 is not saved: average 0.9 of" in one.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def sampled(group: ProcessGroup, directory: Path) -> list[str]:
    """Closing samples of averages that are far from where they began; the trainer itself knows one process only."""
    trainer = Trainer(tiny_preset(), noise_images(), CPU)
    with torch.no_grad():
        for number, average in enumerate(trainer.optimizer.average):
            average.add_(0.1 * torch.randn(average.shape, generator=torch.Generator().manual_seed(number)))
    with trainer.averaged_weights() as unet:
        paths = draw_final_samples(unet, trainer.diffusion, trainer.preset, directory, group)
    return [path.name for path in paths]


@pytest.mark.slow
def test_closing_samples_are_those_of_one_process(tmp_path: Path) -> None:
    expected = sampled(SINGLE_PROCESS, tmp_path / "1")
    assert team.values(3, team.grouped, sampled, tmp_path / "3") == [expected, [], []]
    one, three = (np.load(tmp_path / count / "samples.npz") for count in ("1", "3"))
    assert one["images"].shape == (64, 1, 8, 8) and one["images"].std() > 30
    assert (one["seeds"] == three["seeds"]).all() and (one["labels"] == three["labels"]).all()
    assert np.abs(one["images"].astype(int) - three["images"]).max() <= 1
