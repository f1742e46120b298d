"""What a damaged or forged file does to the commands that read it: no traceback, no hang, no growth.

    python benchmarks/fuzz.py [--tries N] [--kinds WORD ..] [--seed N] [--out FILE]
    python benchmarks/fuzz.py --only "run: log.jsonl" --seed 17      # one try again, with all that it printed

Each try copies a small tree of files, damages one (`fuzz_mutations.py`: flipped bits, cuts, forged values with
checksums that fit, pipes and links in its place) and runs a command that reads it, in a child forked from a process
that has imported everything. `survived`: exit code 0. `refused`: one message "error: ..", and exit code 2, 3, 4 or 5.
Everything else is a failure and is printed with the seed that repeats it: `traceback` (an exception that nobody caught,
or death by a signal), `hang` (more than 20 s of computing and waiting), `growth` (500 MB more than the same command on
whole files, or "not enough memory"), `untidy` (an exit code without its message, or control characters in a message).

Kinds that are in FILE already are not repeated, so that a stopped run continues.
"""

import argparse
import contextlib
import faulthandler
import fnmatch
import gc
import importlib.metadata
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import fuzz_mutations
import fuzz_trees
import machine
import torch
from fuzz_trees import CASES, Case, Line

LIMIT_S = 20.0
GROWTH_BYTES = 500 * 2**20
_ADDRESSES = 6 * 2**30  # bytes that a child may map beyond what it starts with, so that no try harms the machine
_FILE_BYTES = 2**29  # of a file that a child writes
_POLL_S = 0.25
_REFUSALS = (2, 3, 4, 5)
_DEVICES = ("/dev/zero", "/dev/null", "/dev/full")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
LIBRARIES = ("numpy", "pillow", "safetensors", "pyarrow", "lmdb")
FAILURES = ("traceback", "hang", "growth", "untidy")


class Ended(NamedTuple):
    """How a child ended: exit code (negative: signal; None: it was killed for taking too long), and what it took."""

    code: int | None
    seconds: float
    peak_bytes: int
    output: str


@dataclass
class Count:
    """What became of the tries of one kind of file."""

    tries: int = 0
    refused: int = 0
    survived: int = 0
    traceback: int = 0
    hang: int = 0
    growth: int = 0
    untidy: int = 0
    slowest_s: float = 0.0
    most_growth_mb: float = 0.0


def run_child(work: Callable[[], None], directory: Path, limit_s: float = LIMIT_S) -> Ended:
    """Run `work` in a forked child whose current directory, home, cache and temporary files are in `directory`."""
    output = directory.with_suffix(".output")
    pid = os.fork()
    if pid == 0:
        _child(work, directory, output)
    waited, ended = _waited(pid, limit_s)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # workers that it left
    code = os.waitstatus_to_exitcode(status) if ended else None
    seconds = usage.ru_utime + usage.ru_stime + waited
    return Ended(code, seconds, usage.ru_maxrss * 1024, output.read_text(encoding="utf-8", errors="surrogateescape"))


def _waited(pid: int, limit_s: float) -> tuple[float, bool]:
    """Wait for a child, as long as it takes no more than `limit_s` seconds of computing and waiting together.

    Return the seconds that it waited, and whether it ended. A thread that could run and may not, because the machine
    is busy with others, does not wait.
    """
    waited = 0.0
    descriptor = os.pidfd_open(pid)
    try:
        while True:
            begun = time.monotonic()
            if select.select([descriptor], [], [], _POLL_S)[0]:
                return waited, True
            threads = []
            for path in Path(f"/proc/{pid}/task").glob("*/stat"):
                with contextlib.suppress(OSError):
                    threads.append(path.read_text().rpartition(") ")[2].split())
            if all(thread[0] != "R" for thread in threads):
                waited += time.monotonic() - begun
            computed = sum(int(thread[11]) + int(thread[12]) for thread in threads) / os.sysconf("SC_CLK_TCK")
            if computed + waited > limit_s:
                return waited, False
    finally:
        os.close(descriptor)


def _child(work: Callable[[], None], directory: Path, output: Path) -> None:
    """Do the work and end the process. Never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
        faulthandler.enable(sys.stderr)
        for signal_ in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_, signal.default_int_handler if signal_ == signal.SIGINT else signal.SIG_DFL)
        os.chdir(directory)
        (directory / "tmp").mkdir(exist_ok=True)
        os.environ |= {
            "HOME": str(directory), "XDG_CACHE_HOME": str(directory / "cache"), "TMPDIR": str(directory / "tmp")
        }  # fmt: skip
        tempfile.tempdir = None
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESSES,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command(line: Line) -> Callable[[], None]:
    """The work of a command line."""

    def work() -> None:
        from fastddpm.runtime import cli

        sys.argv = [f"fastddpm.{line[0]}", *line[1:]]
        cli.run(fuzz_trees.main_of(line))

    return work


def judged(ended: Ended, whole_bytes: int) -> str:
    """Return refused, survived, or the failure; `whole_bytes`: the peak memory of the same command on whole files."""
    if ended.code is None:
        return "hang"
    if ended.code not in (0, *_REFUSALS) or "Traceback (most recent call last)" in ended.output:
        return "traceback"
    if ended.peak_bytes - whole_bytes > GROWTH_BYTES or "not enough memory" in ended.output:
        return "growth"
    errors = [line for line in ended.output.split("\n") if line.startswith("error: ")]
    if _CONTROL.search(ended.output) or (ended.code != 0 and len(errors) != 1):
        return "untidy"
    return "refused" if ended.code else "survived"


class Fuzzer:
    """Runs tries in `directory`, with one prepared tree of each kind and one place that every try is made in.

    Always the same place, because the cache of images knows a source by its path.
    """

    def __init__(self, directory: Path) -> None:
        self._kept, self._place = directory / "kept", directory / "here"
        self._kept.mkdir()
        self._whole: dict[Line, int] = {}

    def _set_up(self, tree: str) -> None:
        """Put the whole files of `tree` in place."""
        kept = self._kept / tree
        shutil.rmtree(self._place, ignore_errors=True)
        if not kept.exists():
            self._place.mkdir()
            ended = run_child(fuzz_trees.TREES[tree], self._place, 600.0)
            if ended.code != 0:
                raise RuntimeError(f"the tree {tree} could not be made:\n{ended.output}")
            shutil.copytree(self._place, kept)
        else:
            shutil.copytree(kept, self._place)

    def peak_on_whole_files(self, tree: str, line: Line) -> int:
        """Return the peak memory of a command on whole files, where it must succeed."""
        if line not in self._whole:
            self._set_up(tree)
            ended = self._ran(line)
            if ended.code != 0:
                raise RuntimeError(f"{' '.join(line)} fails on whole files:\n{ended.output}")
            self._whole[line] = ended.peak_bytes
        return self._whole[line]

    def _ran(self, line: Line, limit_s: float = LIMIT_S) -> Ended:
        self._place.with_suffix(".output").unlink(missing_ok=True)
        return run_child(command(line), self._place, limit_s)

    def attempt(self, case: Case, seed: int) -> tuple[str, str, Ended, float]:
        """Damage one file and run one command: the outcome, what was done, how the command ended, growth in MB."""
        draw = random.Random(f"{case.name}/{seed}")
        kept = self._kept / case.tree
        if not kept.exists():
            self._set_up(case.tree)
        files = sorted(path for path in kept.glob(case.files) if path.is_file())
        chosen = draw.choice(files)
        line = draw.choice(fuzz_trees.lines_of(case, chosen))
        whole = self.peak_on_whole_files(case.tree, line)
        self._set_up(case.tree)
        file = self._place / chosen.relative_to(kept)
        others = sorted(path for path in kept.rglob("*") if path.is_file() and path != chosen)
        what = fuzz_mutations.damage(draw, file, others, written=case.written, content_only=case.sealed)
        if case.sealed:
            _seal(file.parent)
        ended = self._ran(line)
        for device in _DEVICES:
            if not stat.S_ISCHR(os.stat(device).st_mode):
                raise RuntimeError(f"{device} is no device any more, after {case.name}, seed {seed}: {what}")
        growth = (ended.peak_bytes - whole) / 2**20
        described = f"{file.relative_to(self._place)}: {what}; python -m fastddpm.{' '.join(line)}"
        return judged(ended, whole), described, ended, growth


def _seal(directory: Path) -> None:
    """Write a manifest that fits the files of a checkpoint as they are."""
    from fastddpm.storage import manifest

    for name in manifest.NAMES:
        (directory / name).unlink()
    files = {path.name: manifest.entry_of(path) for path in sorted(directory.iterdir())}
    manifest.seal(directory, int(directory.name.removeprefix("step-")), files)


def fuzzed(fuzzer: Fuzzer, case: Case, tries: int, first_seed: int) -> Count:
    """Try one kind of file and print each failure."""
    count = Count()
    for seed in range(first_seed, first_seed + tries):
        outcome, what, ended, growth = fuzzer.attempt(case, seed)
        count.tries += 1
        setattr(count, outcome, getattr(count, outcome) + 1)
        count.slowest_s = max(count.slowest_s, round(ended.seconds, 2))
        count.most_growth_mb = max(count.most_growth_mb, round(growth, 1))
        if outcome in FAILURES:
            print(f'{outcome}: --only "{case.name}" --seed {seed}: {what}: {ended.code}, {growth:.0f} MB')
            print(ended.output[-1500:].encode("ascii", "backslashreplace").decode(), flush=True)
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100, help="of each kind of file")
    parser.add_argument("--kinds", nargs="+", default=["*"], help="patterns of the kinds to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND", help="make one try again and print everything")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    fuzz_trees.prepare()
    gc.freeze()  # a collection in a child would copy every page
    with tempfile.TemporaryDirectory() as name:
        fuzzer = Fuzzer(Path(name))
        if options.only:
            case = next(case for case in CASES if case.name == options.only)
            outcome, what, ended, growth = fuzzer.attempt(case, options.seed)
            print(f"{outcome}: {what}: {ended.code} after {ended.seconds:.1f} s, {growth:.0f} MB\n{ended.output}")
            return 1 if outcome in FAILURES else 0
        return _measure(fuzzer, options)


def _measure(fuzzer: Fuzzer, options: argparse.Namespace) -> int:
    kinds: dict[str, dict[str, float]] = {}
    if options.out and options.out.exists():
        kinds = json.loads(options.out.read_text(encoding="utf-8"))["kinds"]
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    for case in CASES:
        if case.name in kinds or not any(fnmatch.fnmatch(case.name, pattern) for pattern in options.kinds):
            continue
        kinds[case.name] = asdict(fuzzed(fuzzer, case, options.tries, options.seed))
        print(f"{case.name}: {kinds[case.name]}", flush=True)
        document = {
            "machine": machine.description() | versions,
            "limits": {"seconds": LIMIT_S, "growth_mb": GROWTH_BYTES / 2**20},
            "first_seed": options.seed,
            "sum": _sum(kinds),
            "kinds": {case.name: kinds[case.name] for case in CASES if case.name in kinds},
        }
        if options.out:
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(_sum(kinds))
    return 1 if any(_sum(kinds)[name] for name in FAILURES) else 0


def _sum(kinds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(kind[name] for kind in kinds.values()) for name in ("tries", "refused", "survived", *FAILURES)}


if __name__ == "__main__":
    sys.exit(main())
