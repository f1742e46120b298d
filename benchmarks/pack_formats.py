"""A pack beside a stored zip of the same PNGs, as EDM's dataset.zip: memory and time to open, and random reads.

python benchmarks/pack_formats.py --out FILE.json

The zip holds members 00000/img00000000.png, .. and dataset.json with a label for each; it is opened by Python's
zipfile, dataset.json as EDM reads it. Each opening is in a process of its own, which has imported what it needs
before. Both files are in the page cache. Times are of the processor, which other programs disturb less than a clock's.
Medians over the rounds; a line through the sizes gives 3,000,000 images.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import __version__ as pillow_version

sys.path.insert(0, str(Path(__file__).parent))
import data
import machine

KINDS = ("zip", "pack")
DISTINCT = 512  # images; the others repeat them
WANTED = 3_000_000


def write_zip(path: Path, count: int) -> None:
    """Write a zip of `count` PNGs of 32x32."""
    files = [content for _, content in data.images(DISTINCT, 32, "PNG", 90)]
    labels = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(count):
            name = f"{i // 1000:05}/img{i:08}.png"
            archive.writestr(name, files[i % DISTINCT])
            labels.append([name, i % 10])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def write_pack(source: Path, path: Path) -> None:
    """Pack the images of a zip, with labels that are as many."""
    from fastddpm.data.image import Preprocessing
    from fastddpm.data.pack.writer import write_pack
    from fastddpm.data.sources import open_image_source

    write_pack(open_image_source(source), path, Preprocessing(32, 3), report=print)


def opened(kind: str, path: Path, reads: int) -> dict[str, float]:
    """Open a file in this process, and read images from it in random order."""
    import fastddpm.data.pack.format as pack_format

    before, started = resident(), time.process_time()
    read: Callable[[int], bytes]
    if kind == "zip":
        archive = zipfile.ZipFile(path)
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        with archive.open("dataset.json") as file:
            by_name = dict(json.load(file)["labels"])
        labels = np.array([by_name[name] for name in names])
        del by_name

        def read(number: int) -> bytes:
            with archive.open(names[number]) as member:
                return member.read()
    else:
        pack = pack_format.open_pack(path)
        images, labels = pack.images(), pack.labels
        names, read = range(len(images)), images.encoded  # type: ignore[assignment]
    seconds, memory = time.process_time() - started, resident() - before
    assert labels is None or len(labels) == len(names)
    numbers = np.random.default_rng(0).integers(0, len(names), reads).tolist()
    started = time.process_time()
    for number in numbers:
        read(number)
    return {"open_s": seconds, "mib": memory, "us_per_read": 1e6 * (time.process_time() - started) / reads}


def resident() -> float:
    """Return the memory of this process that is in RAM, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def line(counts: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Fit a line through the sizes, and take it to WANTED images."""
    slope, start = np.polyfit(counts, values, 1)
    worst = max(abs(start + slope * n - v) / v for n, v in zip(counts, values, strict=True))
    return {
        "at_0": start,
        "per_million": 1e6 * slope,
        "worst_relative_error": worst,
        "at_3_million": start + WANTED * slope,
    }


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["open"]:
        print(json.dumps(opened(arguments[1], Path(arguments[2]), int(arguments[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[50_000, 100_000, 200_000, 300_000])
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for count in options.images:
        with tempfile.TemporaryDirectory() as folder:
            paths = {kind: Path(folder) / f"images.{'fdpack' if kind == 'pack' else kind}" for kind in KINDS}
            write_zip(paths["zip"], count)
            write_pack(paths["zip"], paths["pack"])
            runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for _ in range(options.rounds):
                for kind in KINDS:
                    call = [sys.executable, __file__, "open", kind, str(paths[kind]), str(options.reads)]
                    done = subprocess.run(call, capture_output=True, text=True, check=True)
                    runs[kind].append(json.loads(done.stdout))
            for kind in KINDS:
                middle = {key: statistics.median(run[key] for run in runs[kind]) for key in runs[kind][0]}
                rows.append({"images": count, "kind": kind, "bytes": paths[kind].stat().st_size, **middle})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    fits = {
        kind: {
            key: line(options.images, [row[key] for row in rows if row["kind"] == kind]) for key in ("open_s", "mib")
        }
        for kind in KINDS
    }
    print(json.dumps(fits, indent=1), file=sys.stderr)
    document = {
        "machine": machine.description() | {"pillow": pillow_version, "numpy": np.__version__},
        "cores": os.cpu_count(), "load": os.getloadavg(), "rounds": options.rounds, "rows": rows, "fits": fits,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
