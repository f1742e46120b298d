"""Decoding a pack ahead of training: fastddpm's worker processes beside DataLoader, threads and loky.

python benchmarks/data_libraries.py speed --out FILE.json
python benchmarks/data_libraries.py faults --out FILE.json

loky is measured if it is installed (pip install loky).

Speed: every side in turn, each time in a new process, on packs of 20,000 JPEGs of 32x32 and 4,000 of 256x256; medians
over the rounds. Faults: what becomes of a training process when a worker is killed or hangs, and of the workers when
the training process is. Both with two workers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import data
import machine
from decoders import SIDES, Decoder
from PIL import __version__ as pillow_version

HERE = Path(__file__).parent
WORKERS = 2
SETS = ((32, 20_000, 128, 6_000), (256, 4_000, 64, 20_000))  # pixels, images, batch, small operations between batches
FAULTS = ("killed", "hangs", "hangs, training raises", "training killed", "damaged", "no main guard", "64 MiB /dev/shm")
LIMIT_S = 40.0  # for a process to end after a fault
REPORT_S = 110.0  # for a process to report one: DataLoader's own timeout is 60 s until it is set


# One side, in a process of its own


def speed(name: str, pack: Path, batch: int, operations: int, seconds: float) -> dict[str, float]:
    """Start-up, rate, processor time and memory of one side; `operations` stand for a training step's launches."""
    import torch

    torch.set_num_threads(1)
    x = torch.zeros(16)

    def paced(wait: Callable[[int], object], first: int) -> float:
        step, started = first, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(operations):
                x.add_(1)
            wait(step)
            step += 1
        return (step - first) / (time.perf_counter() - started)

    started = time.perf_counter()
    decoder = SIDES[name](pack, batch, WORKERS)
    decoder.at(0)
    first_batch = time.perf_counter() - started
    step = 1
    while step < 6:
        decoder.at(step)
        step += 1
    workers = descendants(os.getpid())
    in_workers, here, began = sum(map(processor_seconds, workers)), time.process_time(), time.perf_counter()
    first = step
    while time.perf_counter() - began < seconds:
        decoder.at(step)
        step += 1
    took, count = time.perf_counter() - began, step - first
    row = {
        "first_batch_s": first_batch,
        "images_per_s": count * batch / took,
        "training_process_ms_per_batch": 1e3 * (time.process_time() - here) / count,
        "workers_ms_per_batch": 1e3 * (sum(map(processor_seconds, workers)) - in_workers) / count,
        "processes": len(workers),
        "workers_pss_mib": sum(map(pss, workers)),
        "all_pss_mib": sum(map(pss, [os.getpid(), *workers])),
    }
    alone = paced(lambda _: None, 0)
    row["paced_share"] = paced(decoder.at, step) / alone
    decoder.close()
    return row


def fault(name: str, kind: str, pack: Path) -> None:
    """Let one thing go wrong; prints the workers, then what was raised where and after how long."""
    import fcntl

    lock = (pack.parent / "lock").open("a")
    if kind == "training killed":  # a run's directory is locked while it trains
        fcntl.flock(lock, fcntl.LOCK_EX)
    size, _, batch, _ = SETS[1] if "shm" in kind else SETS[0]
    batch *= 2 if "shm" in kind else 1  # three batches of 128 images of 256x256 have 75 MB
    decoder = SIDES[name](pack.with_name(f"{'damaged' if kind == 'damaged' else size}.fdpack"), batch, WORKERS)
    report = {"workers": []}
    where, started = "at", time.perf_counter()
    try:
        if kind == "damaged":
            where = through(decoder, 12)
        else:
            decoder.at(0)
            report["workers"] = workers_of(os.getpid())
            print(json.dumps(report), flush=True)
            if kind == "no main guard":
                where = through(decoder, 4)
            elif kind == "64 MiB /dev/shm":
                time.sleep(8.0)  # three batches are decoded in that time
                where = through(decoder, 8)
            elif kind == "training killed":
                os.kill(os.getpid(), 9)
            elif kind == "killed":
                os.kill(report["workers"][0], 9) if report["workers"] else None
                where, started = "training", time.perf_counter()
                while time.perf_counter() - started < 1.0:
                    sum(range(1000))
                where = "at"
                where = through(decoder, 40)
            else:
                decoder.set_timeout(2.0)
                os.kill(report["workers"][0], 19) if report["workers"] else None
                started = time.perf_counter()
                if kind == "hangs, training raises":
                    raise ZeroDivisionError("in the training loop")
                where = through(decoder, 40)
        report["outcome"] = where
    except ZeroDivisionError:
        raise
    except Exception as error:
        if kind == "no main guard":
            raise
        report |= {"outcome": f"raised in {where}", "error": type(error).__name__, "message": str(error)[:300]}
    report["seconds"] = round(time.perf_counter() - started, 2)
    print(json.dumps(report), flush=True)
    decoder.close()


def through(decoder: Decoder, steps: int) -> str:
    """Take steps from 1 on; an error is one of its own step if the next step comes."""
    from fastddpm.errors import DataError

    failed = None
    for step in range(1, steps):
        try:
            decoder.at(step)
        except DataError as error:
            if "checksum" not in str(error):
                raise
            failed = step
        else:
            if failed is not None:
                return f"DataError at step {failed}, step {step} came"
    return "all steps came"


def descendants(process: int) -> list[int]:
    """Return the processes below a process, in the order of their start."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return sorted(found)


def workers_of(process: int) -> list[int]:
    """Return the descendants without those that multiprocessing and loky start for themselves."""

    def command(number: int) -> str:
        return Path(f"/proc/{number}/cmdline").read_text()

    own = command(process)
    helpers = ("resource_tracker", "from multiprocessing.forkserver")
    found = [n for n in descendants(process) if command(n) == own or not any(word in command(n) for word in helpers)]
    forkserver = [n for n in descendants(process) if "forkserver" in command(n)]
    return found or forkserver[1:]  # the first is the server, the others are its forks


def alive(process: int) -> bool:
    """Return whether a process runs or is stopped; one that has ended and is not reaped yet does neither."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processor_seconds(process: int) -> float:
    """Return the user and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss(process: int) -> float:
    """Return a process's share of the memory that it uses, MiB; pages of k processes count 1/k in each."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


# All sides


def child(mode: str, *arguments: object, guard: bool = True, shm: bool = False) -> "subprocess.Popen[str]":
    """Start one measurement in a new process; without the main guard, or with a small /dev/shm, if asked."""
    call = [sys.executable, str(HERE / "data_libraries.py"), mode, *map(str, arguments)]
    if not guard:
        script = Path(str(arguments[-1])).with_name("unguarded.py")
        name, kind, pack = map(str, arguments)
        script.write_text(
            f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
            f"from pathlib import Path; import data_libraries; data_libraries.fault({name!r}, {kind!r}, Path({pack!r}))"
        )
        call = [sys.executable, str(script)]
    if shm:
        call = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh", *call]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def speeds(names: Sequence[str], folder: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Medians of every side on every set, the sides in turn."""
    rows = []
    for size, _, batch, operations in SETS:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                out, error = child("one", name, folder / f"{size}.fdpack", batch, operations, seconds).communicate()
                if not out:
                    raise SystemExit(f"{name}: {error}")
                runs[name].append(json.loads(out.splitlines()[-1]))
        for name, found in runs.items():
            middle = {key: round(statistics.median(run[key] for run in found), 3) for key in found[0]}
            spread = sorted(round(run["images_per_s"]) for run in found)
            rows.append({"size": size, "batch": batch, "side": name, **middle, "images_per_s_of_rounds": spread})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def faults(names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """What every side does in every fault."""
    rows = []
    for name in names:
        for kind in FAULTS:
            if name == "threads" and kind not in ("damaged", "no main guard", "64 MiB /dev/shm"):
                continue  # there is no process that could be killed or stopped
            process = child("fault", name, kind, folder / "x", guard=kind != "no main guard", shm="shm" in kind)
            rows.append({"side": name, "fault": kind} | watched(process, kind, folder))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def watched(process: "subprocess.Popen[str]", kind: str, folder: Path) -> dict[str, Any]:
    """Wait for a process, its workers and the lock that it held."""
    import fcntl
    import threading

    lines: list[tuple[float, str]] = []
    assert process.stdout is not None and process.stderr is not None
    out, err = process.stdout, process.stderr
    errors: list[str] = []
    readers = [
        threading.Thread(target=lambda: lines.extend((time.monotonic(), line) for line in out), daemon=True),
        threading.Thread(target=lambda: errors.extend(err), daemon=True),
    ]
    for reader in readers:
        reader.start()
    reports: list[tuple[float, dict[str, Any]]] = []
    deadline = time.monotonic() + REPORT_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        reports = [(at, json.loads(line)) for at, line in lines if line.startswith("{")]
        if reports and ("outcome" in reports[-1][1] or "raises" in kind):
            deadline = min(deadline, reports[-1][0] + LIMIT_S)
    ended = time.monotonic()
    time.sleep(0.2)
    reports = [(at, json.loads(line)) for at, line in lines if line.startswith("{")]
    row: dict[str, Any] = reports[-1][1] if reports else {"workers": []}
    workers = row.pop("workers")
    row["exit_code"] = process.poll()
    row["seconds_to_exit"] = round(ended - reports[-1][0], 1) if reports and process.poll() is not None else None
    row["stderr"] = [line.strip() for line in errors if "Error" in line][-3:]
    started = time.monotonic()
    with (folder / "lock").open("a") as lock:
        while time.monotonic() - started < LIMIT_S / 2:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                row["lock_free_after_s"] = round(time.monotonic() - started, 1)
                break
            except BlockingIOError:
                time.sleep(0.05)
    while time.monotonic() - started < LIMIT_S / 2 and any(map(alive, workers)):
        time.sleep(0.05)
    left = [worker for worker in workers if alive(worker)]
    row |= {"workers_left": len(left), "workers_gone_after_s": None if left else round(time.monotonic() - started, 1)}
    for number in [*left, *([process.pid] if process.poll() is None else [])]:
        os.kill(number, 9)
    process.wait()
    return row


def packs(folder: Path) -> None:
    """Write the packs: one for each set, and one with a damaged image in the batch of step 4."""
    from fastddpm.data.image import Preprocessing
    from fastddpm.data.order import batch_indices
    from fastddpm.data.pack.format import open_pack
    from fastddpm.data.pack.writer import write_pack
    from fastddpm.data.sources import open_image_source

    for size, count, _, _ in SETS:
        source = data.write("folder", folder / f"images-{size}", data.images(count, size, "JPEG", 90), count)
        write_pack(open_image_source(source), folder / f"{size}.fdpack", Preprocessing(size, 3), report=print)
    (size, count, batch, _), path = SETS[0], folder / "damaged.fdpack"
    path.write_bytes((folder / f"{size}.fdpack").read_bytes())
    number = int(batch_indices(4, count, batch, 0)[70])
    offset = int(open_pack(path).index[number]["offset"])
    with path.open("r+b") as file:
        file.seek(offset + 40)
        byte = file.read(1)[0]
        file.seek(offset + 40)
        file.write(bytes([byte ^ 4]))


def versions() -> dict[str, str | None]:
    """Return the versions of Pillow and loky, None for loky if it is not installed."""
    try:
        return {"pillow": pillow_version, "loky": version("loky")}
    except PackageNotFoundError:
        return {"pillow": pillow_version, "loky": None}


def installed() -> list[str]:
    """Return the sides whose libraries are here."""
    return [name for name in SIDES if name != "loky" or versions()["loky"]]


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["one"]:
        name, pack, batch, operations, seconds = arguments[1:]
        print(json.dumps(speed(name, Path(pack), int(batch), int(operations), float(seconds))), flush=True)
        return
    if arguments[:1] == ["fault"]:
        fault(arguments[1], arguments[2], Path(arguments[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "faults"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=installed())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timed loop (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packs(folder)
        if options.what == "faults":
            measured = {"limit_s": LIMIT_S, "rows": faults(options.sides, folder)}
        else:
            rows = speeds(options.sides, folder, options.rounds, options.seconds)
            measured = {"rounds": options.rounds, "seconds": options.seconds, "rows": rows}
    document = {
        "machine": machine.description() | versions(), "cores": os.cpu_count(), "load": os.getloadavg(),
        "workers": WORKERS, **measured,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
