"""Measure seconds and peak memory of `python -m fastddpm.data`, and images/s of a pack's worker processes.

python benchmarks/data.py --out FILE.json      two numbers of images, in a folder, a zip and tar shards

Images are smoothed noise, JPEG of 32x32 (quality 90) and WebP of 256x256 (quality 75). Decoding them takes as long as
decoding photographs of their size, within a factor of two. Every command runs in a process of its own, whose VmHWM is
its peak memory.
"""

import argparse
import io
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

sys.path.insert(0, str(Path(__file__).parent))
import machine

ROOT = Path(__file__).parent.parent
LAYOUTS = ("folder", "tar", "zip")
CLASSES = 10
PROGRAM = """
import sys, time
from pathlib import Path
started = time.perf_counter()
from fastddpm.data.__main__ import main
main(sys.argv[1:])
seconds = time.perf_counter() - started
status = Path("/proc/self/status").read_text().splitlines()
print(seconds, next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")))
"""


def images(count: int, size: int, kind: str, quality: int) -> Iterator[tuple[str, bytes]]:
    """Yield names, in ten folders one after the other, and encoded images, no two of them equal."""
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.resize((size, size), Image.Resampling.BICUBIC).save(file, kind, quality=quality)
        yield f"{i * CLASSES // count}/{i:07}.{kind.lower()}", file.getvalue()


def write(layout: str, path: Path, files: Iterator[tuple[str, bytes]], count: int) -> Path:
    """Write a data set in one of the layouts and return the path to open."""
    if layout == "folder":
        for name, data in files:
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return path
    if layout == "zip":
        source = path.with_suffix(".zip")
        with zipfile.ZipFile(source, "w", zipfile.ZIP_STORED) as packed:
            for name, data in files:
                packed.writestr(name, data)
        return source
    path.mkdir()
    for shard in range(CLASSES):
        with tarfile.open(path / f"{shard:04}.tar", "w") as packed:
            for name, data in itertools.islice(files, count // CLASSES):
                for member, content in ((name, data), (f"{name.partition('.')[0]}.cls", name[:1].encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    packed.addfile(info, io.BytesIO(content))
    return path


def run(*arguments: str) -> dict[str, float]:
    """Run one command in a new process and return its seconds and peak MiB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    return {"seconds": round(seconds, 2), "peak_mib": round(peak, 1)}


def commands(counts: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Measure inspect, pack and verify for every layout and number of images."""
    rows = []
    for count in counts:
        for layout in LAYOUTS:
            source = write(layout, folder / f"{layout}-{count}", images(count, 32, "JPEG", 90), count)
            out = folder / f"{layout}-{count}.fdpack"
            row: dict[str, Any] = {"images": count, "layout": layout}
            row["inspect"] = run("inspect", str(source))
            row["pack"] = run("pack", str(source), str(out), "--image-size", "32")
            row["pack"]["bytes"] = out.stat().st_size
            row["verify"] = run("verify", str(out))
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def reading(folder: Path, workers: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Measure images/s of `Batches.at`, by stored format and number of workers, with nothing else to do."""
    import torch

    from fastddpm.data.batches import Batches
    from fastddpm.data.image import Preprocessing
    from fastddpm.data.pack.writer import write_pack
    from fastddpm.data.sources import open_image_source

    rows = []
    for original, kind, quality, size, batch, count in (
        (32, "JPEG", 90, 32, 128, 5000),
        (256, "WEBP", 75, 256, 64, 640),
        (320, "WEBP", 75, 256, 64, 640),
    ):
        source = write("folder", folder / f"{original}-{kind}", images(count, original, kind, quality), count)
        pack = write_pack(
            open_image_source(source), folder / f"{original}.fdpack", Preprocessing(size, 3, "area"), report=print
        )
        stored = kind if original == size else "PNG, resized when packed"
        for number in workers:
            with Batches(pack.dataset(), batch, 0, torch.device("cpu"), workers=number) as batches:
                for step in range(3):
                    batches.at(step)
                started, step = time.perf_counter(), 3
                while time.perf_counter() - started < seconds:
                    batches.at(step)
                    step += 1
                rate = (step - 3) * batch / (time.perf_counter() - started)
            mean = pack.path.stat().st_size / len(pack)
            row = {"size": size, "stored": stored, "bytes": round(mean), "batch": batch, "workers": number}
            rows.append(row | {"images_per_s": round(rate)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000], help="numbers of images")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=8.0, help="of reading, for each row (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        read = reading(Path(folder), options.workers, options.seconds)
        made = commands(options.images, Path(folder))
        document = {"machine": machine.description() | {"pillow": pillow_version}, "commands": made, "reading": read}
        if options.out:
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
