"""Commands of several processes under torchrun: started again, ended together, refused together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import team
from helpers.marks import slow
from helpers.training import digest, log_digest

from fastddpm import train as command
from fastddpm.errors import UsageError
from fastddpm.runtime import distributed
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.storage import checkpoint

ROOT = Path(__file__).parents[2]
TINY = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "2", "--blocks", "1", "--timesteps", "20", "--batch", "8",
    "--log-every", "1", "--sample.steps", "3", "--sample.count", "4", "--device", "cpu", "--steps", "6",
    "--save-every", "2",
]  # fmt: skip

KILLED_ONCE = """
import os, signal, sys
from fastddpm import train
from fastddpm.runtime import cli
from fastddpm.training.trainer import Trainer
step = Trainer.train_step
def killed(trainer):
    if trainer.step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer)
Trainer.train_step = killed
sys.argv[0] = "fastddpm.train"
cli.run(train.main)
"""


def uninterrupted(run: Path) -> None:
    command.main([*TINY, "--out", str(run)])


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed(tmp_path: Path) -> None:
    """The same command, and the bits of a run that nothing happened to."""
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         str(script), *TINY, "--out", str(tmp_path / "run")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resuming {tmp_path / 'run'} at step 4" in done.stderr
    assert (tmp_path / "run" / "samples.png").exists()
    team.values(2, uninterrupted, tmp_path / "whole")
    ends = [checkpoint.load(tmp_path / name) for name in ("run", "whole")]
    assert [end.step for end in ends] == [6, 6]
    for part, tensors in ends[0].tensors.items():
        assert digest(tensors) == digest(ends[1].tensors[part])
    assert log_digest(tmp_path / "run") == log_digest(tmp_path / "whole")


def pair(script: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """A program in two processes, as torchrun starts it."""
    port = team.free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=os.environ | team.contract(rank, 2, port) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip


ENDS = """
import atexit, time, torch, torch.distributed as dist
from fastddpm.runtime import cli, distributed
def main(arguments):
    global kept
    group = distributed.group_from_environment()
    atexit.register(print, "last words")
    with distributed.process_group(group):
        kept = dist.group.WORLD  # as DistributedDataParallel does
        if group.rank == 1:
            time.sleep(600)
        dist.all_reduce(torch.zeros(3), async_op=True)  # in a thread that waits for the other process
        print("done")
        if arguments:
            raise getattr(distributed, arguments[0], ZeroDivisionError)("gone")
cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        slow([], 0, ""),
        (["LostProcessError"], 75, "error: gone\n"),
        slow(["ZeroDivisionError"], 1, "[rank0]: ZeroDivisionError: gone\n"),
    ],
)
def test_a_process_ends_although_threads_of_its_group_wait(
    tmp_path: Path, error: list[str], code: int, told: str
) -> None:
    """With what it printed, its exit code and what was registered for the end."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    started = pair(script, *error)
    try:
        out, errors = started[0].communicate(timeout=60)
    finally:
        started[1].kill()
        started[1].communicate()
    assert (started[0].returncode, out) == (code, "done\nlast words\n"), errors
    assert errors.endswith(told) and errors.startswith("[rank0]: Traceback" if code == 1 else told)


RAISES = """
import os, sys
from fastddpm import train
from fastddpm.runtime import cli
from fastddpm.training.trainer import Trainer
step = Trainer.train_step
def failing(trainer):
    if trainer.step == 3 and os.environ["RANK"] == "1":
        raise ZeroDivisionError("nobody thought of this")
    return step(trainer)
Trainer.train_step = failing
cli.run(train.main)
"""


@pytest.mark.slow
def test_an_error_that_nobody_caught_in_one_process_ends_all(tmp_path: Path) -> None:
    """At once: the one with its traceback and 1, the other with 75."""
    script = tmp_path / "raises.py"
    script.write_text(RAISES)
    started = pair(script, *TINY, "--out", str(tmp_path / "run"))
    try:
        second, first = (process.communicate(timeout=60)[1] for process in reversed(started))
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [75, 1], first + second
    assert "in failing" in second and second.endswith("ZeroDivisionError: nobody thought of this\n")
    assert first.splitlines()[-1].startswith("error: another process died or did not answer for 600 s")
    assert checkpoint.load(tmp_path / "run").step == 2


def test_a_port_in_use_is_not_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in team.contract(0, 2, taken.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "_formed_a_group", False)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with (
            pytest.raises(UsageError, match=r"MASTER_PORT [0-9]+ is in use"),
            distributed.process_group(ProcessGroup(0, 2), timeout_s=3),
        ):
            pass


def two_in_one(run: Path) -> None:
    command.main([*TINY, "--out", str(run)])


@pytest.mark.slow
def test_a_run_in_use_is_refused_to_all_processes(tmp_path: Path) -> None:
    with checkpoint.lock(tmp_path / "run"):
        for one in team.run(2, two_in_one, tmp_path / "run"):
            assert one.code == 2 and f"is in use by process {os.getpid()}" in one.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_commands_that_differ_are_refused(tmp_path: Path) -> None:
    for one in team.run(2, differing, tmp_path):
        assert one.code == 2 and "the processes differ in configuration, --out or device" in one.stderr
    assert json.dumps(os.listdir(tmp_path)) == "[]"


def differing(directory: Path) -> None:
    command.main([*TINY, "--out", str(directory / "run"), "--seed", str(distributed.group_from_environment().rank)])
