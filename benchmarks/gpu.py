"""Everything that only a GPU can show, in one command that goes on where it was stopped.

    python benchmarks/gpu.py DIR                     # every stage, in order
    python benchmarks/gpu.py DIR tests memcheck      # some of them
    python benchmarks/gpu.py DIR --seconds 540       # what fits into nine minutes; the same command goes on later
    python -m benchmarks.report DIR/unet-*.json DIR/sampler-*.json --store RESULT.json    # the parts as one

Each stage is a command of its own; what it prints goes to DIR/STAGE.log, and DIR/gpu.json says how each ended, on which
machine. A stage that has passed is not run again, unless --again is given. The tests, also under the sanitizers, are
taken file by file, each as a stage of its own; of the benchmark suite, a stopped stage leaves what it measured and goes
on with the rest. A stage that fails does not stop the next ones; the exit code is then 1. Nothing here changes the
device's settings.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch

from fastddpm.storage.files import write_json

ROOT = Path(__file__).parent.parent
PYTEST = (sys.executable, "-m", "pytest")
# Our kernels by their mangled names: Triton's are called as their functions, those of csrc live in a namespace.
OURS = (
    "fastddpm|^_(add_bias|add_product|attention|channel_sums|conv3x3|convert_image|group_norm_silu|philox|q_sample|"
    "random_normal|reverse_step)"
)
# Of the operator tests, those that launch kernels, eagerly.
KERNELS = (
    "(numbers or layouts or gradient or precision or batch or nan or dropout)"
    " and not (graph or float64 or compiles or refuses)"
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = {"sampling-step": ("--batch", "256"), "training-step": ("--batch", "128", "--training")}
SUITE = ("kernels", "sampler", "train", "unet", "scaling")
# In order: what is right comes before what is fast.
STAGES = ("doctor", "operators", "tests", *SANITIZERS, *STEPS, *SUITE, "tiles", "backends")
NO_TESTS = 5  # exit code of pytest
PATIENCE = 30.0  # seconds that an interrupted command has to write what it has


@dataclass(frozen=True)
class Stage:
    """A command, what it changes in the environment, and a program that it needs."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None


def pieces(name: str) -> list[str]:
    """The parts of a stage that are run, and passed, one by one: of tests, their files."""
    if name == "operators" or name in SANITIZERS:
        files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    elif name == "tests":
        found = sorted((ROOT / "tests").glob("*/test_*.py"))
        files = [file for file in found if file.parent.name != "ops" and "mark.gpu" in file.read_text("utf-8")]
    else:
        return [name]
    return [f"{name}-{file.parent.name}-{file.stem}" for file in files]


def stage(name: str, out: Path) -> Stage:
    """The stage called `name`, which leaves its files in `out`; or a piece of one."""
    kind, _, file = name.partition("-")
    if name in STEPS:
        command = (sys.executable, "benchmarks/step_measured.py", *STEPS[name], "--out", str(out / f"{name}.json"))
        return Stage(command)
    if file:
        path = "tests/" + file.replace("-", "/", 1) + ".py"
        if kind in SANITIZERS:
            return sanitizer(kind, path)
        marked = ("-m", "", "--device", "cuda") if kind == "operators" else ("-m", "gpu")
        return Stage((*PYTEST, *marked, path))
    if name in SUITE:
        return suite(name, out)
    return {
        "doctor": Stage((sys.executable, "-m", "fastddpm.doctor")),
        "tiles": Stage((sys.executable, "benchmarks/tune.py", "--preset", "cifar10", "--out",
                        str(out / "triton-tiles.json"))),
        "backends": Stage((sys.executable, "benchmarks/tune_backends.py", "--preset", "cifar10", "--out",
                           str(out / "backends.json"))),
    }[name]  # fmt: skip


def sanitizer(tool: str, path: str = "tests/ops") -> Stage:
    """The operator tests in `path` under a tool of NVIDIA's compute-sanitizer, which looks at our kernels alone.

    Every tensor is an allocation of its own: PyTorch's pools would hide what is read or written beside one.
    """
    options = ("--tool", tool, "--error-exitcode", "9", "--kernel-name", f"regex={OURS}")
    tests = (*PYTEST, "-x", "-m", "gpu", "-k", KERNELS, path)
    return Stage(
        ("compute-sanitizer", *options, *tests), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, needs="compute-sanitizer"
    )


def suite(name: str, out: Path) -> Stage:
    """What the files of earlier runs in `out` have not measured of benchmarks/bench_NAME.py."""
    files = sorted(out.glob(f"{name}-*.json"))
    measured = [found["fullname"] for file in files for found in load(file).get("benchmarks", [])]
    options = ("--benchmark-only", "--benchmark-json", str(out / f"{name}-{len(files) + 1}.json"))
    return Stage((*PYTEST, f"benchmarks/bench_{name}.py", *options, *(f"--deselect={test}" for test in measured)))


def run(stage: Stage, log: Path, seconds: float) -> dict[str, Any]:
    """How it ended: `passed`, its exit code (None where it did not start or was stopped), seconds, and why not."""
    if stage.needs is not None and shutil.which(stage.needs) is None:
        return {"passed": False, "code": None, "seconds": 0.0, "reason": f"{stage.needs} is not on PATH"}
    start, reason = time.monotonic(), None
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env={**os.environ, **stage.environment}, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_hear_interrupts,
        )  # fmt: skip
        try:
            code = process.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            code, reason = None, f"stopped after {seconds:.0f} s"
        finally:
            stop(process)
    if code == NO_TESTS and "pytest" in stage.command:  # the file has none for this device
        code = 0
    if code:
        reason = f"exit code {code}: {log.name}"
    return {"passed": code == 0, "code": code, "seconds": round(time.monotonic() - start, 1), "reason": reason}


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a command that is still running, so that pytest writes what it has; then ends it and its children."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(path: Path, ended: Mapping[str, Any], device: str) -> None:
    write_json(path, {"machine": machine.description() | {"device": device}, "stages": dict(ended)})


def drive(chosen: Mapping[str, Stage], out: Path, seconds: float, again: bool, device: str) -> dict[str, Any]:
    """Runs the stages that have not passed, while time is left; returns how each of all so far ended."""
    path = out / "gpu.json"
    ended: dict[str, Any] = load(path).get("stages", {})
    deadline = time.monotonic() + seconds
    for name, stage in chosen.items():
        left = deadline - time.monotonic()
        if ended.get(name, {}).get("passed") and not again:
            continue
        if left < 1:
            print(f"{name:10} left for the next run: no time")
            continue
        ended[name] = run(stage, out / f"{name}.log", left)
        save(path, ended, device)
        one = ended[name]
        print(f"{name:10} {'passed' if one['passed'] else one['reason']} ({one['seconds']:.0f} s)", flush=True)
    return ended


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("stage", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start and leave running nothing beyond")
    parser.add_argument("--again", action="store_true", help="run what has passed, too")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    unknown = [name for name in options.stage if name not in STAGES]
    if unknown:
        parser.error(f"no stage is called {unknown[0]!r}; there are {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        parser.exit(2, "this is for a machine with a GPU, and torch sees none\n")
    out.mkdir(parents=True, exist_ok=True)
    chosen = {piece: stage(piece, out) for name in options.stage or STAGES for piece in pieces(name)}
    ended = drive(chosen, out, options.seconds, options.again, torch.cuda.get_device_name())
    return 0 if all(ended.get(name, {}).get("passed") for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
