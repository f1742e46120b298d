"""What a training run loses when it is killed, signalled or hangs, counted over many moments.

    python benchmarks/faults.py [--tries N] [--out FILE]

Each try runs a tiny network for 30 steps, does something to it at a moment drawn uniformly over the time that a run
takes (its start, its checkpoints and its sampling included), starts the same command again as torchrun and SLURM do,
and compares the end with a run that nothing happened to: checkpoint, log and samples by sha256. `survived`: all are
equal. `steps_repeated`: the most steps that had to be done again. `inside_write`: tries that left a half-written
checkpoint. Takes a quarter of an hour of two cores.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from fastddpm import train
from fastddpm.runtime import cli
from fastddpm.storage import checkpoint
from fastddpm.training.monitor import MEASURED

STEPS = 30
OPTIONS = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "2", "--blocks", "1", "--timesteps", "40", "--batch", "8",
    "--dropout", "0.1", "--steps", str(STEPS), "--save-every", "5", "--log-every", "1", "--sample.steps", "40",
    "--sample.count", "8", "--device", "cpu",
]  # fmt: skip
HANG_TIMEOUT_S = 3.0
GIVE_UP_S = 120.0
CONTEXT = multiprocessing.get_context("forkserver")


@dataclass
class Count:
    """What became of the tries of one fault."""

    tries: int = 0
    survived: int = 0
    steps_repeated: int = 0
    inside_write: int = 0
    exit_codes: dict[str, int] = field(default_factory=dict)
    slowest_stop_s: float = 0.0

    def note(self, codes: list[int | None], seconds: float) -> None:
        self.tries += 1
        self.slowest_stop_s = max(self.slowest_stop_s, round(seconds, 2))
        name = " ".join(map(str, codes))
        self.exit_codes[name] = self.exit_codes.get(name, 0) + 1


def child(variables: dict[str, str], arguments: list[str], log: Path) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["fastddpm.train", *arguments]
    cli.run(train.main)


def start(count: int, run: Path, **environment: str) -> list[Any]:
    """The command in `count` processes, forked from one that has imported torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*OPTIONS, "--out", str(run), "--timeout", str(HANG_TIMEOUT_S if count > 1 else GIVE_UP_S)]
    started = []
    for rank in range(count):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), **environment,
        }  # fmt: skip
        process = CONTEXT.Process(target=child, args=(variables, arguments, run.with_suffix(f".{rank}.log")))
        process.start()
        started.append(process)
    return started


def ended(started: list[Any]) -> list[int | None]:
    for process in started:
        process.join(GIVE_UP_S)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def digest(run: Path) -> str:
    """sha256 of all that a finished run says: its last checkpoint, its log but for speed and memory, its samples."""
    total = hashlib.sha256()
    saved = checkpoint.load(run)
    for part in sorted(saved.tensors):
        for name in sorted(saved.tensors[part]):
            total.update(f"{part} {name}".encode() + saved.tensors[part][name].contiguous().numpy().tobytes())
    for line in (run / "log.jsonl").read_text().splitlines():
        total.update(json.dumps({k: v for k, v in json.loads(line).items() if k not in MEASURED}).encode())
    total.update(np.load(run / "samples.npz")["images"].tobytes())
    return total.hexdigest()


def logged(run: Path) -> int:
    """Steps that the log has heard of."""
    with contextlib.suppress(OSError):
        return (run / "log.jsonl").read_bytes().count(b"\n")
    return 0


def one_try(
    run: Path, count: int, number: signal.Signals, target: int, wait_s: float
) -> tuple[list[int | None], float] | None:
    """Send a signal after a while, wait for the end: exit codes and seconds to it; None for a run that was over."""
    started = start(count, run)
    time.sleep(wait_s)
    process = started[target]
    if not process.is_alive():
        ended(started)
        return None
    os.kill(process.pid, number)
    sent = time.monotonic()
    if number == signal.SIGSTOP:
        others = [process for rank, process in enumerate(started) if rank != target]
        ended(others)
        stopped = time.monotonic() - sent
        process.kill()
        return ended(started), stopped
    return ended(started), time.monotonic() - sent


def measure(fault: str, tries: int, count: int, number: signal.Signals, expected: str, duration: float) -> Count:
    draw, total = random.Random(fault), Count()
    while total.tries < tries:
        with tempfile.TemporaryDirectory() as name:
            run = Path(name) / "run"
            outcome = one_try(run, count, number, draw.randrange(count), draw.uniform(0.0, duration))
            if outcome is None:
                duration *= 0.9
                continue
            codes, seconds = outcome
            total.note(codes, seconds)
            if 1 in codes:  # an error that nobody thought of
                print(f"{fault}: {codes}", *(log.read_text() for log in sorted(Path(name).glob("*.log"))), sep="\n")
            with contextlib.suppress(OSError):
                names = [path.name for path in (run / "checkpoints").iterdir()]
                total.inside_write += any(name.startswith(".tmp-") for name in names)
            reached, saved = logged(run), None
            if (run / "checkpoints").exists():
                saved = checkpoint.load_newest(run, print)
            total.steps_repeated = max(total.steps_repeated, reached - (saved.step if saved else 0))
            again = ended(start(count, run, TORCHELASTIC_RESTART_COUNT="1"))
            if again == [0] * count and digest(run) == expected:
                total.survived += 1
            else:
                print(f"{fault}: {codes}, then {again}", run.with_suffix(".0.log").read_text()[-2000:])
    print(f"{fault}: {total}", flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    CONTEXT.set_forkserver_preload(
        ["fastddpm.train", "fastddpm.training.samples", "fastddpm.training.trainer", "torch._dynamo"]
    )
    plain: dict[int, tuple[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        ended(start(1, Path(name) / "first"))  # the server imports torch
        for count in (1, 2):
            begun = time.monotonic()
            assert ended(start(count, Path(name) / f"plain{count}")) == [0] * count
            plain[count] = digest(Path(name) / f"plain{count}"), time.monotonic() - begun
    some, few = options.tries // 5, options.tries // 10
    faults = {
        "SIGKILL": (options.tries, 1, signal.SIGKILL),
        "SIGTERM": (2 * some, 1, signal.SIGTERM),
        "SIGINT": (some, 1, signal.SIGINT),
        "SIGUSR1": (some, 1, signal.SIGUSR1),
        "SIGKILL to one of 2 processes": (some, 2, signal.SIGKILL),
        "SIGTERM to one of 2 processes": (some, 2, signal.SIGTERM),
        "one of 2 processes hangs (SIGSTOP)": (few, 2, signal.SIGSTOP),
    }
    results = {
        fault: vars(measure(fault, tries, count, number, *plain[count]))
        for fault, (tries, count, number) in faults.items()
    }
    document = {
        "machine": machine.description(),
        "steps": STEPS,
        "seconds_of_a_run": {count: round(seconds, 2) for count, (_, seconds) in plain.items()},
        "hang_timeout_s": HANG_TIMEOUT_S,
        "faults": results,
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
