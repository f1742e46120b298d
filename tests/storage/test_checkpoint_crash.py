"""Checkpoints under SIGKILL at any moment, full disks and failing system calls."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow

from fastddpm.storage import checkpoint, manifest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the crashing process is a fork")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a disk: thousands of syncs are quick there, and SIGKILL spares it as any other."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


def save(run: Path, step: int, seed: int = 0, keep: int = 2) -> None:
    tensors = {
        "ema": {"w": torch.full((500,), float(step))},
        "adam": {"m": torch.full((300,), step), "v": torch.ones(1)},
    }
    checkpoint.save(run, step, tensors, {"state": {"step": step, "seed": seed}}, keep)


def newest_intact(run: Path) -> tuple[int, int]:
    """Step and seed of the newest checkpoint; fails if any in place is damaged, or holds anything but `save`'s."""
    for path in (run / "checkpoints").glob("step-*"):
        found = checkpoint.load(path)
        assert torch.equal(found.tensors["ema"]["w"], torch.full((500,), float(found.step)))
        assert torch.equal(found.tensors["adam"]["m"], torch.full((300,), found.step))
        assert found.documents["state"]["step"] == found.step
    newest = checkpoint.load_newest(run, pytest.fail)
    assert newest is not None
    return newest.step, newest.documents["state"]["seed"]


def temporary(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".tmp-")]


def fork(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; its process id. torch is imported already, so this takes milliseconds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return child


# SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("same_step", [slow(False), True], ids=["next_step", "same_step"])
def test_killed_at_random_moments(tmp_path: Path, same_step: bool) -> None:
    draw = random.Random(7)
    begin = time.monotonic()
    save(tmp_path, 1, keep=1)
    duration = time.monotonic() - begin
    reached, kills_inside, resaved = 1, 0, False

    read, write = os.pipe()

    def save_forever() -> None:
        step = reached
        for seed in itertools.count(1):
            step += not same_step
            save(tmp_path, step, seed, keep=1)
            os.write(write, b".")

    for _ in range(30):
        child = fork(save_forever)
        for _ in range(draw.randrange(3)):
            os.read(read, 1)
        time.sleep(draw.uniform(0, 1.5 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills_inside += bool(temporary(tmp_path))
        step, seed = newest_intact(tmp_path)
        assert step >= reached
        resaved |= seed > 0
        reached = step
    print(f"{kills_inside} of 30 kills left a checkpoint half written or half removed; all were passed over")
    assert kills_inside > 0
    assert resaved if same_step else reached > 1
    save(tmp_path, reached + 1, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == [f"step-{reached + 1:08d}"]


DISK = [(os, "mkdir"), (os, "open"), (manifest, "open"), (os, "fsync"), (os, "rename")]
REMOVAL = [(os, "unlink"), (os, "rmdir")]


def count_calls(patch: pytest.MonkeyPatch, calls: list[tuple[Any, str]], before: Callable[[int], None]) -> None:
    """From now on call `before` with 0, 1, 2... ahead of each of the given calls, by which a save touches the disk."""
    numbers = itertools.count()

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before(next(numbers))
            return original(*args, **kwargs)

        return wrapped

    for module, name in calls:
        patch.setattr(module, name, wrap(getattr(module, name, open)), raising=False)


@pytest.mark.parametrize("step", [3, slow(2)], ids=["next_step", "same_step"])
@pytest.mark.parametrize("keep", [1, slow(2)])
def test_killed_before_every_call(tmp_path: Path, step: int, keep: int) -> None:
    start = tmp_path / "start"
    save(start, 1, seed=1)
    save(start, 2, seed=2)
    for fatal in itertools.count():
        run = shutil.copytree(start, tmp_path / str(fatal))

        def save_until_killed(run: Path = run, fatal: int = fatal) -> None:
            def kill(number: int) -> None:
                if number == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

            count_calls(pytest.MonkeyPatch(), DISK + REMOVAL, kill)
            save(run, step, seed=3, keep=keep)

        _, status = os.waitpid(fork(save_until_killed), 0)
        assert newest_intact(run) in [(2, 2), (step, 3)]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        save(run, 4, keep=keep)  # clears up
        assert newest_intact(run) == (4, 0)
        assert temporary(run) == []
        assert len(os.listdir(run / "checkpoints")) == keep
        shutil.rmtree(run)
    print(f"killed before each of {fatal} calls")
    assert fatal > 20
    assert newest_intact(run) == (step, 3)


def test_everything_is_on_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut spares only what was synced: each file and its directory before the rename, then the parent."""
    save(tmp_path, 1)
    trace = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(descriptor: int) -> None:
        trace.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def traced_rename(source: Path, target: Path) -> None:
        trace.append(f"{source} -> {target}")
        rename(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("names of open files are read from /proc")
    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    save(tmp_path, 2, keep=1)
    directory = tmp_path / "checkpoints"
    writing, final = directory / f".tmp-00000002-{os.getpid()}", directory / "step-00000002"
    removing = directory / f".tmp-00000001-{os.getpid()}"
    files = ["ema.safetensors", "adam.safetensors", "state.json", "manifest.json", "manifest.sha256"]
    assert trace == [
        *(str(writing / name) for name in files),
        str(writing),
        f"{writing} -> {final}",
        str(directory),
        f"{directory / 'step-00000001'} -> {removing}",
    ]


# Full and failing disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize("step", [3, 2], ids=["next_step", "same_step"])
def test_every_call_that_fails(tmp_path: Path, step: int, lasting: bool, code: int) -> None:
    needed = 500 * 4 + 300 * 8 + 1 * 4 + len(json.dumps({"step": step, "seed": 3}, indent=1))
    start = tmp_path / "start"
    save(start, 1, seed=1)
    save(start, 2, seed=2)
    for first in itertools.count():
        run = shutil.copytree(start, tmp_path / str(first))

        def fail(number: int, first: int = first) -> None:
            if number == first or (lasting and number > first):
                raise OSError(code, os.strerror(code))

        # os.open is left out as removing what was begun needs it
        with pytest.MonkeyPatch.context() as patch:
            count_calls(patch, [call for call in DISK if call != (os, "open")], fail)
            try:
                save(run, step, seed=3, keep=2)
                break
            except checkpoint.StorageError as error:
                message = str(error)
        assert lasting or (run / "checkpoints/step-00000002").is_dir()  # not left aside
        assert os.strerror(code) in message
        assert str(run / "checkpoints") in message
        assert f"step {step} is saved" in message or f"it needs {needed:,} bytes" in message
        assert temporary(run) == []
        reached = newest_intact(run)
        assert reached in [(2, 2), (step, 3)]
        assert checkpoint.load(run / "checkpoints/step-00000001").documents["state"]["seed"] == 1
        shutil.rmtree(run)
    print(f"{first} calls failed in turn")
    assert first > 10
    assert newest_intact(run) == (step, 3)


def test_a_disk_that_is_full_after_any_number_of_bytes(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk: the kernel itself cuts the write short."""
    resource = pytest.importorskip("resource")
    save(tmp_path, 1, seed=1)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints/step-00000001").iterdir()}
    size = max(map(len, before.values()))

    def save_within(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(
            checkpoint.StorageError, match=rf"{tmp_path}/checkpoints: File too large; it needs 4,4\d\d "
        ):
            save(tmp_path, 2, seed=2)

    for limit in (0, 1, 20, 100, 300, size // 2, size - 1):
        _, status = os.waitpid(fork(lambda limit=limit: save_within(limit)), 0)
        assert status == 0, f"limit of {limit} bytes"
        assert temporary(tmp_path) == []
        assert newest_intact(tmp_path) == (1, 1)
    assert {path: path.read_bytes() for path in before} == before
    save(tmp_path, 2, seed=2)
    assert newest_intact(tmp_path) == (2, 2)


def test_data_that_reads_back_wrong_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, seed=1, keep=1)
    fsync, syncs = os.fsync, itertools.count()

    def corrupting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        if next(syncs) == 1:
            with open(f"/proc/self/fd/{descriptor}", "r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("reopens a file through /proc")
    monkeypatch.setattr(os, "fsync", corrupting_fsync)
    for step in (1, 2):
        with pytest.raises(
            checkpoint.StorageError, match=r"adam\.safetensors reads back differently from what was written"
        ):
            save(tmp_path, step, seed=2, keep=1)
        assert newest_intact(tmp_path) == (1, 1)
        assert temporary(tmp_path) == []
        syncs = itertools.count()


def test_a_run_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(checkpoint.StorageError, match=f"cannot save step 1 in {tmp_path}/checkpoints"):
        save(tmp_path, 1)
    assert (tmp_path / "checkpoints").read_text() == "in the way"


def test_a_full_disk_cannot_be_locked(tmp_path: Path) -> None:
    """With one message, although the file is closed afterwards."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(checkpoint.StorageError, match=r"cannot write into .*: No space left"),
    ):
        patch.setattr(os, "write", full)
        with checkpoint.lock(tmp_path / "run"):
            pass
    with checkpoint.lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"{os.getpid()} ")


def test_a_run_removed_while_it_trains_is_made_again(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    save(run, 1)
    shutil.rmtree(tmp_path / "deep")
    save(run, 2)
    assert newest_intact(run) == (2, 0)


def test_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def interrupt(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        count_calls(patch, [(os, "fsync")], interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert newest_intact(tmp_path) == (1, 0)
    assert temporary(tmp_path) == []


# Reading while a run goes on


@pytest.mark.parametrize("same_step", [False, True], ids=["next_step", "same_step"])
def test_sampling_from_a_run_that_saves(tmp_path: Path, same_step: bool) -> None:
    save(tmp_path, 1, keep=1)

    def save_forever() -> None:
        for step in itertools.count(2):
            save(tmp_path, 1 if same_step else step, seed=step, keep=1)

    child = fork(save_forever)
    seen: set[int] = set()
    try:
        while len(seen) < 10:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the saving process died"
            found = checkpoint.load(tmp_path)
            assert torch.equal(found.tensors["ema"]["w"], torch.full((500,), float(found.step)))
            seen.add(found.documents["state"]["seed"])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
