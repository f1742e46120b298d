"""Damaged and forged files: the harness that counts what they do, and a few hundred tries of it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fuzz
import fuzz_mutations
import fuzz_trees
import pytest
from fuzz import Ended

from fastddpm.errors import DataError
from fastddpm.runtime import cli

ROOT = Path(__file__).parents[2]


def raises() -> None:
    raise KeyError("nobody caught this")


def sleeps() -> None:
    time.sleep(60)


def computes() -> None:
    while True:
        pass


def grows() -> None:
    held = bytearray(b"1") * (fuzz.GROWTH_BYTES + 2**26)
    del held


def refuses() -> None:
    def main(arguments: object) -> None:
        raise DataError("file.json is damaged; remove it")

    cli.run(main)


def dies() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def says_it_with_control_characters() -> None:
    print("\x1b[31m")
    raise SystemExit(0)


def ends_without_a_word() -> None:
    raise SystemExit(2)


@pytest.mark.parametrize(
    ("work", "outcome"),
    [
        (raises, "traceback"), (dies, "traceback"), (sleeps, "hang"), (computes, "hang"), (grows, "growth"),
        (says_it_with_control_characters, "untidy"), (ends_without_a_word, "untidy"), (refuses, "refused"),
        (lambda: None, "survived"),
    ],
)  # fmt: skip
def test_the_harness_sees(work: Callable[[], None], outcome: str, tmp_path: Path) -> None:
    place = tmp_path / "here"
    place.mkdir()
    whole = fuzz.run_child(lambda: None, place).peak_bytes
    place.with_suffix(".output").unlink()
    ended = fuzz.run_child(work, place, limit_s=1.0 if outcome == "hang" else fuzz.LIMIT_S)
    assert fuzz.judged(ended, whole) == outcome, ended


def test_an_exit_code_needs_its_message() -> None:
    assert fuzz.judged(Ended(3, 0.1, 0, "error: x is damaged\n  listed below it\n"), 0) == "refused"
    assert fuzz.judged(Ended(3, 0.1, 0, "x is damaged\n"), 0) == "untidy"
    assert fuzz.judged(Ended(2, 0.1, 0, "error: not enough memory: take a smaller --batch\n"), 0) == "growth"
    assert fuzz.judged(Ended(1, 0.1, 0, "error: x\n"), 0) == "traceback"


def test_a_seed_repeats_its_damage(tmp_path: Path) -> None:
    document = json.dumps({"step": 3, "files": {"a": [1, 2.5, None]}}).encode()
    for seed in range(200):
        results = []
        for _ in range(2):
            path = tmp_path / "file.json"
            path.write_bytes(document)
            draw = random.Random(f"kind/{seed}")
            results.append(
                (fuzz_mutations.damage(draw, path, [tmp_path], written=True, content_only=True), path.read_bytes())
            )
        assert results[0] == results[1]


def test_every_kind_is_named_once() -> None:
    names = [case.name for case in fuzz.CASES]
    assert len(set(names)) == len(names) and {case.tree for case in fuzz.CASES} == set(fuzz_trees.TREES)


def tried(kinds: Sequence[str], tries: int) -> None:
    """Run the script in a process of its own: children forked from this one would inherit its threads."""
    for name in ("lmdb", "pyarrow", "matplotlib"):
        pytest.importorskip(name, reason="writes a file of every kind")
    arguments = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--tries", str(tries), "--seed", "1000"]
    done = subprocess.run(
        [*arguments, "--kinds", *kinds], text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


@pytest.mark.slow
def test_damaged_pictures_and_archives() -> None:
    tried(["images: folder, PNG", "images: .zip", "images: .fdpack", "images: LMDB"], 5)


@pytest.mark.slow
def test_damaged_and_forged_files() -> None:
    tried(["*"], 2)
