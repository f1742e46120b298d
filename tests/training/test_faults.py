"""Faults of one process that trains: signals at any moment, changed options, values that are not finite."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow
from helpers.training import CPU, digest, log_digest, losses_of, noise_images, tiny_preset, train, whole_state

from fastddpm import train as command
from fastddpm.errors import DivergedError, UsageError
from fastddpm.runtime.distributed import SINGLE_PROCESS
from fastddpm.storage import checkpoint, manifest
from fastddpm.training import samples, signals
from fastddpm.training.run_log import JsonLines
from fastddpm.training.signals import RunInterruptedError, SignalWatch, interruptible
from fastddpm.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "2", "--blocks", "1", "--timesteps", "20", "--batch", "8",
    "--log-every", "1", "--sample.steps", "5", "--sample.count", "4", "--device", "cpu", "--decay", "none",
]  # fmt: skip


def complete(trainer: Trainer, run: Path, *, resume: bool = False) -> None:
    log = JsonLines(run / "log.jsonl", trainer.step if resume else None)
    try:
        trainer.run(run, log)
    finally:
        log.close()


# R1 and R2: killed or signalled, and resumed


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, slow(6)])
def test_a_signal_inside_the_writing_of_a_checkpoint_waits_for_it(at: int, tmp_path: Path) -> None:
    preset = tiny_preset(steps=6, save_every=2, log_every=1)
    whole = train(SINGLE_PROCESS, preset, tmp_path / "whole")
    (tmp_path / "run").mkdir()
    trainer = Trainer(preset, noise_images(), CPU)
    write = manifest.write_file

    def interrupted(path: Path, data: bytes) -> Any:
        if path.name == "training.safetensors" and trainer.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(path, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunInterruptedError, match="SIGTERM: saved step"):
        patch.setattr(manifest, "write_file", interrupted)
        complete(trainer, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run").step in (at, min(at + 1, 6))  # where it arrived, or the next
    again = train(SINGLE_PROCESS, preset, tmp_path / "run", resume=True)
    assert digest(whole_state(again)) == digest(whole_state(whole))
    assert log_digest(tmp_path / "run") == log_digest(tmp_path / "whole")


def test_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    preset = tiny_preset(steps=5, keep=5)
    whole = train(SINGLE_PROCESS, preset, tmp_path / "whole")
    (tmp_path / "run").mkdir()
    trainer = Trainer(preset, noise_images(), CPU)
    step = trainer.train_step

    def signalled() -> Any:
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step()

    trainer.train_step = signalled  # type: ignore[method-assign]
    complete(trainer, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000005",
    ]
    assert digest(whole_state(trainer)) == digest(whole_state(whole))


@pytest.mark.slow
@pytest.mark.parametrize(("torchrun", "pause_s"), [(False, 0.0), (True, 2.1)])
def test_the_second_signal_ends_the_process_at_once(torchrun: bool, pause_s: float) -> None:
    """Under torchrun a signal may come twice, from it and from whoever sent it to all processes."""
    program = (
        "import os, signal, time\nfrom fastddpm.training.signals import SignalWatch\n"
        "with SignalWatch() as watch:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    assert watch.requested().stop == signal.SIGTERM\n"
        f"    if {torchrun}: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    time.sleep({pause_s})\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"TORCHELASTIC_RUN_ID": "x"} if torchrun else {})
    done = subprocess.run([sys.executable, "-c", program], env=environment)
    assert done.returncode == -signal.SIGINT


def test_requests_to_save_are_forgotten_and_those_to_stop_are_not() -> None:
    with SignalWatch() as watch:
        assert watch.requested() == signals.Request(0, False)
        for number in (signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert watch.requested() == signals.Request(signal.SIGINT, True)
        assert watch.requested() == signals.Request(signal.SIGINT, False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_signal_inside_sampling_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = tmp_path / "run"
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    draw = samples.draw_final_samples

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)  # nothing to save: goes on
        os.kill(os.getpid(), number)
        return draw(*arguments)

    monkeypatch.setattr(samples, "draw_final_samples", interrupted)
    with pytest.raises(RunInterruptedError, match=r"step-00000002 is saved; --resume draws the samples") as error:
        command.main([*TINY, "--steps", "2", "--out", str(run)])
    assert error.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    monkeypatch.setattr(samples, "draw_final_samples", draw)
    command.main(["--resume", "--out", str(run)])
    assert (run / "samples.npz").exists() and losses_of(run) == losses_of(run)[:2]


def test_interruptible_in_another_thread_is_only_a_block() -> None:
    import threading

    done: list[bool] = []

    def work() -> None:
        with interruptible("x"), SignalWatch():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed(tmp_path: Path) -> None:
    """SIGKILL, as the out-of-memory killer sends it; `benchmarks/faults.py` does this many times over."""
    options = [*TINY, "--steps", "12", "--save-every", "3", "--sample.count", "0"]
    command.main([*options, "--out", str(tmp_path / "whole")])
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        command.main([*options, "--out", str(run)])
        os._exit(0)
    while not (run / "checkpoints" / "step-00000006").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    command.main(["--resume", "--out", str(run)])
    ends = [checkpoint.load(path) for path in (run, tmp_path / "whole")]
    assert ends[0].step == 12
    for part, tensors in ends[0].tensors.items():
        assert digest(tensors) == digest(ends[1].tensors[part])
    assert log_digest(run) == log_digest(tmp_path / "whole")


# R7: resumed otherwise


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    command.main([*TINY, "--steps", "2", "--sample.count", "0", "--out", str(run)])
    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "16"], r"cannot continue as another model: width: 8 -> 16\. Start a new run"),
        (["--timesteps", "30", "--override"], "cannot continue as another model: timesteps: 20 -> 30"),
        (["--lr", "0.1"], r"was trained with other options: lr: 0\.002 -> 0\.1\. --override continues with the new"),
        (["--batch", "4", "--seed", "3"], "was trained with other options: batch: 8 -> 4; seed: 0 -> 3"),
        (["--timeout", "0"], "--timeout must be more than 0 and at most"),
        (["--timeout", "inf"], "--timeout must be more than 0 and at most"),
    ],
)
def test_a_run_goes_on_as_it_was(begun: Path, options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command.main(["--resume", "--out", str(begun), *options])


def test_another_learning_rate_by_override_and_free_changes_without(begun: Path) -> None:
    command.main(["--resume", "--out", str(begun), "--steps", "3", "--lr", "0.1", "--override"])
    lines = [json.loads(line) for line in (begun / "log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines]
    assert len(rates) == 3 and rates[2] == pytest.approx(0.1 * 3 / 50)
    assert json.loads((begun / "config.json").read_text())["train"]["lr"] == 0.1
    command.main(["--resume", "--out", str(begun), "--steps", "4", "--accumulate", "2", "--save-every", "1"])
    assert checkpoint.load(begun).step == 4


def test_a_restart_by_torchrun_resumes_by_itself(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*TINY, "--sample.count", "0", "--out", str(begun)]
    saved = command._parse(["--resume", "--out", str(begun)], SINGLE_PROCESS)[1]
    more = ["--steps", "6", "--lr", str(saved.train.lr), "--accumulate", "2"]
    with pytest.raises(UsageError, match="holds a run already"):
        command.main([*arguments, *more])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    command.main([*arguments, *more])
    assert checkpoint.load(begun).step == 6
    with pytest.raises(UsageError, match="name the run's directory with --out"):
        command.main(TINY)


# R8: values that are not finite


def poison_loss(trainer: Trainer) -> Callable[[], None]:
    loss = trainer.diffusion.loss

    def poisoned(*args: Any, **options: Any) -> Any:
        per_image, t = loss(*args, **options)
        per_image = per_image.clone()
        per_image[3] *= float("inf")
        return per_image, t

    def inject() -> None:
        trainer.diffusion.loss = poisoned  # type: ignore[method-assign]

    return inject


def poison_gradient(trainer: Trainer) -> Callable[[], None]:
    def inject() -> None:
        trainer.optimizer.parameters[7].register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]

    return inject


def poison_weight(trainer: Trainer) -> Callable[[], None]:
    def inject() -> None:
        with torch.no_grad():
            trainer.optimizer.parameters[7].flatten()[0] = float("nan")

    return inject


@pytest.mark.parametrize("poison", [poison_loss, slow(poison_gradient), poison_weight])
@pytest.mark.parametrize("save_every", [2, slow(1000)])
def test_nothing_is_made_of_a_step_that_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Any, save_every: int
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    trainer = Trainer(tiny_preset(patience=3, steps=20, save_every=save_every), noise_images(), CPU)
    inject, step = poison(trainer), trainer.train_step
    before: list[str] = []

    def at_four() -> Any:
        if trainer.step == 4:
            inject()
            before.append(digest(whole_state(trainer)))
        return step()

    trainer.train_step = at_four  # type: ignore[method-assign]
    expected = "3 steps in a row, 4 to 6"
    if poison is poison_weight and save_every == 2:
        expected = r"step 6 is not saved: weight\..* is not finite"
    with pytest.raises(DivergedError, match=expected) as error:
        complete(trainer, run)
    assert digest(whole_state(trainer)) == before[0]
    assert ("memory is at fault" in str(error.value)) == (poison is poison_weight)
    bad = [json.loads(line) for line in (run / "not_finite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in bad] == [4, 5, 6][: trainer.step - 4]
    order = Trainer(tiny_preset(), noise_images(), CPU)
    for line in bad:
        assert len(set(line["examples"])) == 8 and line["examples"] == order._examples(line["step"])
    assert "step 4: loss or gradient not finite" in capsys.readouterr().err
    if save_every == 2:
        newest = checkpoint.load(run)
        assert newest.step in (4, 6)
        assert all(torch.isfinite(t).all() for part in newest.tensors.values() for t in part.values())
