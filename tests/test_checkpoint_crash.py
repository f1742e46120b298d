"""Checkpoints under SIGKILL at any moment, full disks and failing system calls."""

import builtins
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm import checkpoint, manifest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the crashing process is a fork")


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


@pytest.mark.parametrize("same_step", [False, True], ids=["next_step", "same_step"])
def test_killed_at_random_moments(tmp_path: Path, same_step: bool) -> None:
    draw = random.Random(7)
    save(tmp_path, 1, keep=1)
    reached, kills_inside, resaved = 1, 0, False

    def save_forever() -> None:
        step = reached
        for seed in range(10**9):
            step += not same_step
            save(tmp_path, step, seed, keep=1)

    for _ in range(30):
        child = fork(save_forever)
        time.sleep(draw.uniform(0.0, 0.1))
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


class Calls:
    """Counts the calls by which a save touches the disk, and does something at the one numbered `at`, from 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[str], None], *names: str) -> None:
        self.count = 0
        for module in (os, builtins):
            for name in names:
                if hasattr(module, name):
                    self._wrap(monkeypatch, module, name, at, act)

    def _wrap(
        self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, at: int, act: Callable[[str], None]
    ) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number == at:
                act(name)
            return original(*args, **kwargs)

        # `open` only as the module under test sees it: everything else opens files too
        target = manifest if module is builtins else module
        monkeypatch.setattr(target, name, wrapped, raising=False)
