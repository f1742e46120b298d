"""A forward pass while other programs keep the cores busy: prepared, and the same network in PyTorch's operators.

python benchmarks/busy.py [--preset mnist cifar10] [--batch 1 8] [--programs 0 2] [--rounds 5] [--out FILE.json]

Ours is `Sampler.denoise`'s network. The sides take turns in one process, a block of calls each; the figure is the
median of the blocks' time over their calls, so what a side loses between calls counts. By default no program runs, then
one on each core. `--before FOLDER` names another build of the compiled library, the `_native.so` of `csrc/build.py` in
another checkout, and adds it as a side. Needs a system that can stop programs.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor

import fastddpm
from fastddpm.kernels import native
from fastddpm.sampling.engine import PreparedUNet

sys.path.insert(0, str(Path(__file__).parent))
import machine
from inference_sides import random_weights
from plain import PlainUNet

T = 500
SPIN = "print(flush=True)\nwhile True: pass"
Side = Callable[[], object]


class Programs:
    """Programs that do nothing but take a core each; all are stopped until `run`.

    Linux shares cores among sessions first, so each has one of its own, as other users' programs have.
    """

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-c", SPIN]
        self._processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) for _ in range(count)
        ]
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def run(self, count: int) -> Iterator[None]:
        """Let `count` of them run inside the block."""
        for process in self._processes[:count]:
            process.send_signal(signal.SIGCONT)
        sleep(0.1)  # for the scheduler to spread them
        try:
            yield
        finally:
            for process in self._processes[:count]:
                process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def library_of(folder: Path | None) -> Iterator[None]:
    """Use the compiled library in `folder` inside the block; None: the installed one."""
    installed = native._FOLDER
    native._FOLDER = installed if folder is None else folder
    native._loaded.cache_clear()
    try:
        native.library()
        yield
    finally:
        native._FOLDER = installed
        native._loaded.cache_clear()


def sides(unet: fastddpm.UNet, batch: int, before: Path | None) -> dict[str, Side]:
    """The calls to time, each having run."""
    config = unet.config
    x = torch.randn(batch, config.image_channels, config.image_size, config.image_size)
    x, t = x.contiguous(memory_format=torch.channels_last), torch.full((batch,), T)
    label = torch.arange(batch) % config.num_classes if config.num_classes else None
    plain = PlainUNet(unet)

    def prepared(folder: Path | None) -> Side:
        with library_of(folder):
            network = PreparedUNet(unet, [T])
            network(x, t, label)  # keeps the library's functions
        return lambda: network(x, t, label)

    def in_operators() -> Tensor:
        with torch.no_grad():
            return plain(x, t, label)

    found = {"prepared": prepared(None), "plain": in_operators}
    if before is not None:
        found = {"before": prepared(before), **found}
    in_operators()
    return found


def block(call: Side, seconds: float) -> float:
    """Milliseconds a call, of at least two calls in a row, after one that reads what the side before it left."""
    call()
    calls, start = 0, perf_counter()
    while calls < 2 or perf_counter() - start < seconds:
        call()
        calls += 1
    return 1e3 * (perf_counter() - start) / calls


def measure(calls: dict[str, Side], states: Sequence[int], programs: Programs, options: Any) -> list[dict[str, Any]]:
    """One row for each number of busy programs."""
    rows = []
    for count in states:
        times: dict[str, list[float]] = {name: [] for name in calls}
        with programs.run(count):
            for number in range(options.rounds):
                for name in list(calls) if number % 2 == 0 else list(reversed(calls)):
                    times[name].append(block(calls[name], options.seconds))
        ms = {name: median(found) for name, found in times.items()}
        row = {"programs": count, "ms": ms, "ratio": ms["prepared"] / ms["plain"], "blocks": times}
        if "before" in times:  # block by block, as neighbours in time are alike
            row["to_before"] = median(new / old for new, old in zip(times["prepared"], times["before"], strict=True))
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = machine.parser(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--preset", nargs="+", default=["mnist", "cifar10"])
    parser.add_argument("--programs", type=int, nargs="+", default=[0, cores], help="how many are busy, in turn")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block")
    parser.add_argument("--before", type=Path, help="folder of another build of the compiled library")
    options = machine.parse(parser, arguments)
    rows = []
    programs = Programs(max(options.programs))
    try:
        for preset in options.preset:
            unet = random_weights(preset)
            for batch in options.batch:
                calls = sides(unet, batch, options.before)
                for row in measure(calls, options.programs, programs, options):
                    rows.append({"preset": preset, "batch": batch, **row})
                    ms = "   ".join(f"{name} {value:8.2f} ms" for name, value in row["ms"].items())
                    print(
                        f"{preset:8} batch {batch}, {row['programs']} busy: {ms}   ratio {row['ratio']:.2f}", flush=True
                    )
    finally:
        programs.end()
    machine.write(options, cores=cores, seconds=options.seconds, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
