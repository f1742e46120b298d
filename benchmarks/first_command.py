"""How long the first command of README.md takes, part by part, without the download of packages.

python benchmarks/first_command.py [--rounds 1] [--out FILE.json]

Parts: compiling the library for the CPU and, where there is nvcc, the one for CUDA, each from nothing; then
`python -m fastddpm.train` to its end, with the picture, in a folder of its own.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent))
import machine

sys.path.insert(0, str(Path(__file__).parent.parent))
from csrc import build


def seconds_to_build(name: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        build.build(name, base=Path(folder))
        return perf_counter() - start


def seconds_to_train() -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        subprocess.run([sys.executable, "-m", "fastddpm.train"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        taken = perf_counter() - start
        assert (Path(folder) / "runs" / "mnist" / "samples.png").is_file()
        return taken


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(rounds=1)
    options = machine.parse(parser, arguments)
    parts = {"compile for the CPU": lambda: seconds_to_build("_native")}
    if build.find_nvcc():
        parts["compile for CUDA"] = lambda: seconds_to_build("_native_cuda")
    parts["train and draw"] = seconds_to_train
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.rounds):
        for name, part in parts.items():
            seconds[name].append(part())
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    machine.write(options, seconds=seconds, medians={name: median(taken) for name, taken in seconds.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
