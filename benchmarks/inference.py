"""A forward pass of a network on the CPU, in float32 and bfloat16: prepared, and peers with the same weights.

python benchmarks/inference.py [--preset cifar10] [--precision fp32 bf16] [--batch 1 8] [--rounds 15] [--no-compile]
    [--weights random|initial|trained|RUN] [--seed 0] [--no-memory] [--out FILE.json]

inference_sides.py says who is compared; onnxruntime is left out, by name, where it or the exporter is not installed.
The sides take turns in one process. The ratio of a precision is the time of its fastest peer over that of the prepared
network in that precision; "bf16 to any" is that of the fastest peer of all over the prepared network in bfloat16.
Errors are of the 2-norm against float64. Peak memory is the largest resident set of a process of its own for each side,
imports and weights included: read from Linux's /proc, and unknown ("-", null in JSON) on other systems.

Random weights are the preset's, with numbers in every layer; initial ones are PyTorch's for each layer. Trained ones of
mnist come with the package; for cifar10 name a run, or what else `fastddpm.load` reads: then the network is that
model's, whatever `--preset` says.
"""

import argparse
import copy
import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastddpm
from fastddpm.pretrained import read_preset

sys.path.insert(0, str(Path(__file__).parent))
import machine
from inference_sides import (
    BF16_WEIGHTS,
    ONNX_FILES,
    OURS,
    PREPARED,
    SIDES,
    Side,
    in_float64,
    initial_weights,
    random_weights,
    save_for_diffusers,
    save_for_onnxruntime,
    side,
    without_onnx,
)

TRAINED = {"mnist": "digits"}


def peak_memory(name: str, batch: int, folder: Path) -> float | None:
    """MiB, of a process that runs one side a few times; `folder` as from `save_for_diffusers`. None: unknown here."""
    if machine.peak_resident_set() is None:
        return None
    command = [sys.executable, __file__, "--memory-of", name, str(folder), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def run_for_memory(name: str, folder: Path, batch: int) -> None:
    """Freshly initialized on either side: what reading weights takes is another matter."""
    config, network = read_preset(folder.parent).unet, None
    if name in OURS:
        network = fastddpm.UNet(config).eval().channels_last()
    elif name not in ONNX_FILES:
        from diffusers import UNet2DModel

        torch.set_default_dtype(torch.bfloat16 if name in BF16_WEIGHTS else torch.float32)
        network = UNet2DModel.from_config(UNet2DModel.load_config(folder)).eval().to(memory_format=torch.channels_last)
        torch.set_default_dtype(torch.float32)
    run, x = side(name, network, config, folder), torch.randn(batch, *config.image_shape)
    for _ in range(3):
        run(x)
    print(machine.peak_resident_set())


def ratios(times: dict[str, float], precisions: Sequence[str]) -> dict[str, float]:
    """How many times as fast as the fastest peer: in each of `precisions`, and in bfloat16 among peers of any."""
    peers = {p: [times[name] for name in SIDES[p] if name in times and name not in OURS] for p in precisions}
    found = {p: min(peers[p]) / times[PREPARED[p]] for p in precisions}
    if len(precisions) > 1:
        found["bf16 to any"] = min(map(min, peers.values())) / times[PREPARED["bf16"]]
    return found


def measure(
    unet: fastddpm.UNet, sides: dict[str, Side], precisions: Sequence[str], batch: int, rounds: int
) -> dict[str, Any]:
    """One line of the table."""
    x = torch.randn(batch, *unet.config.image_shape, generator=torch.Generator().manual_seed(batch))
    for run in sides.values():  # compiles, allocates
        run(x)
        run(x)
    calls = [lambda run=run: run(x) for run in sides.values()]
    times = dict(zip(sides, (1e3 * seconds for seconds in machine.medians(calls, rounds)), strict=True))
    expected = in_float64(unet, x)
    errors = {name: float((run(x).double() - expected).norm() / expected.norm()) for name, run in sides.items()}
    return {"batch": batch, "ms": times, "ratio": ratios(times, precisions), "error": errors}


def network(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[fastddpm.UNet, dict[str, Any]]:
    """The network that the options ask for, and what the file says of its weights."""
    if options.weights == "random":
        return random_weights(options.preset, options.seed), {"weights": "random", "seed": options.seed}
    if options.weights == "initial":
        return initial_weights(options.preset, options.seed), {"weights": "initial", "seed": options.seed}
    if options.weights == "trained" and options.preset not in TRAINED:
        parser.exit(2, f"no trained weights of {options.preset} come with the package; name a run by --weights RUN\n")
    model = fastddpm.load(TRAINED[options.preset] if options.weights == "trained" else options.weights)
    return model.unet.channels_last(), {"weights": f"trained, {model.preset.name}", "steps": model.steps}


def wanted(options: argparse.Namespace) -> list[str]:
    """The sides by name, without those that are not installed, which are told on stderr."""
    names = [name for precision in options.precision for name in SIDES[precision]]
    if options.no_compile:
        names = [name for name in names if "compiled" not in name]
    if absent := without_onnx():
        print(f"without onnxruntime: {', '.join(absent)} not installed (pip install -e '.[onnx]')", file=sys.stderr)
        names = [name for name in names if name not in ONNX_FILES]
    return names


def show(row: dict[str, Any]) -> None:
    for kind, ratio in row["ratio"].items():
        print(f"batch {row['batch']}, {kind}: {ratio:.2f} times as fast as the fastest peer")
    for name, ms in row["ms"].items():
        mib = row["peak_mib"][name]
        memory = "-" if mib is None else f"{mib:.0f}"
        print(f"  {name:22} {ms:8.1f} ms   error {row['error'][name]:.1e}   {memory:>6} MiB", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--preset", choices=("cifar10", "mnist"), default="cifar10")
    parser.add_argument("--precision", choices=tuple(SIDES), nargs="+", default=list(SIDES))
    parser.add_argument("--weights", default="random", metavar="random|initial|trained|RUN")
    parser.add_argument("--seed", type=int, default=0, help="of random and initial weights")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out, which takes a process a side")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = machine.parse(parser, arguments)
    if options.memory_of:
        run_for_memory(options.memory_of[0], Path(options.memory_of[1]), options.batch[0])
        return 0
    try:
        import diffusers
    except ImportError:
        print("this compares with diffusers, which is not installed: pip install -e '.[diffusers]'", file=sys.stderr)
        return 2
    unet, about = network(parser, options)
    names, rows = wanted(options), []
    versions = {"diffusers": diffusers.__version__}
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_diffusers(unet, Path(temporary))
        theirs = diffusers.UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
        theirs = theirs.to(memory_format=torch.channels_last)
        if set(names) & set(ONNX_FILES):
            save_for_onnxruntime(unet, folder, names)
            versions["onnxruntime"] = importlib.metadata.version("onnxruntime")
        sides = {name: side(name, unet if name in OURS else copy.deepcopy(theirs), unet.config, folder)
                 for name in names}  # fmt: skip
        for batch in options.batch:
            row = measure(unet, sides, options.precision, batch, options.rounds)
            row["peak_mib"] = {name: None if options.no_memory else peak_memory(name, batch, folder) for name in names}
            show(row)
            rows.append(row)
            machine.write(options, versions, preset=options.preset, **about, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
