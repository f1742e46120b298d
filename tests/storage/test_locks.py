"""Locks of a run: one process at a time writes into it, and others are told which."""

import os
from pathlib import Path

import pytest

from fastddpm.errors import UsageError
from fastddpm.storage import checkpoint, locks


@pytest.mark.skipif(locks.fcntl is None, reason="this system has no flock")
def test_a_second_run_is_refused_and_told_who_holds_the_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with checkpoint.lock(run):
            os.write(write, b"locked")
            os.read(os.pipe()[0], 1)  # until killed
        os._exit(0)
    assert os.read(read, 6) == b"locked"
    with pytest.raises(UsageError, match=f"process {child} on {os.uname().nodename}"), checkpoint.lock(run):
        pytest.fail("locked twice")
    os.kill(child, 9)
    os.waitpid(child, 0)
    for _ in range(2):  # death and leaving the block both free it
        with checkpoint.lock(run):
            with pytest.raises(UsageError, match=f"process {os.getpid()} "), checkpoint.lock(run):
                pytest.fail("locked twice")
            checkpoint.save(run, 1, {}, {}, keep=1)
    assert checkpoint.load(run).step == 1


@pytest.mark.skipif(locks.fcntl is None, reason="this system has no flock")
def test_whether_a_run_is_in_use(tmp_path: Path) -> None:
    """Looking takes no lock and makes no file, and a lock that its process has left is none."""
    assert not checkpoint.in_use(tmp_path) and not list(tmp_path.iterdir())
    with checkpoint.lock(tmp_path):
        assert checkpoint.in_use(tmp_path) and checkpoint.in_use(tmp_path)
    assert (tmp_path / ".lock").exists() and not checkpoint.in_use(tmp_path)
    with checkpoint.lock(tmp_path):
        pass


def test_the_newest_step(tmp_path: Path) -> None:
    assert checkpoint.newest_step(tmp_path) is None
    for name in ("step-00000020", "step-00000100", "step-00000030.old", ".tmp-9-1", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.newest_step(tmp_path) == 100


def test_a_garbled_lock_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff\0" * 1000)
    with (
        checkpoint.lock(tmp_path),
        pytest.raises(UsageError, match=f"process {os.getpid()} "),
        checkpoint.lock(tmp_path),
    ):
        pytest.fail("locked twice")


def test_no_lock_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with checkpoint.lock(tmp_path / "run"), checkpoint.lock(tmp_path / "run"):
        checkpoint.save(tmp_path / "run", 1, {}, {}, keep=1)
    assert checkpoint.load(tmp_path / "run").step == 1


def test_a_run_that_is_a_file_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(checkpoint.StorageError, match=f"cannot lock {tmp_path}/run"),
        checkpoint.lock(tmp_path / "run"),
    ):
        pytest.fail("locked a file")
