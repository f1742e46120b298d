"""A forward pass of a preset's network on the CPU: prepared, and peers with the same weights.

python benchmarks/inference.py [--preset cifar10] [--batch 1 8] [--rounds 15] [--no-compile] [--out FILE.json]

Ours is `fastddpm.Denoiser`; "module" is the plain `UNet` under torch.inference_mode. diffusers' UNet2DModel runs in
channels_last, eager and under torch.compile with freezing; onnxruntime runs our network as `python -m fastddpm.export`
writes it, and is left out, by name, where it or the exporter is not installed. The ratio is to the fastest peer. The
sides take turns in one process. Errors are of the 2-norm against float64. Peak memory is the largest resident set of a
process of its own for each side, imports and weights included: read from Linux's /proc, and unknown ("-", null in JSON)
on other systems.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastddpm
from fastddpm.config import UNetConfig
from fastddpm.pretrained import diffusers as interchange
from fastddpm.pretrained.model import Model
from fastddpm.sampling import export

sys.path.insert(0, str(Path(__file__).parent))
import machine
from onnx_session import onnx_session

T = 500
ONNX_FILE = "denoiser.onnx"
OURS = ("prepared", "module")
SIDES = (*OURS, "eager", "compiled", "onnxruntime")
Side = Callable[[Tensor], Tensor]


def random_weights(preset: str = "cifar10") -> fastddpm.UNet:
    """The network at initialization has zeros in the last layer of every block, and an output of zero."""
    torch.manual_seed(0)
    unet = fastddpm.UNet(fastddpm.preset(preset).unet).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise / 10 if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5 / 2)
    return unet.channels_last()


def _model(unet: fastddpm.UNet) -> Model:
    preset = replace(fastddpm.preset("cifar10"), unet=unet.config)
    return Model(unet, fastddpm.Diffusion(preset.diffusion), preset)


def save_for_diffusers(unet: fastddpm.UNet, folder: Path) -> Path:
    """The folder from which diffusers reads the network."""
    interchange.save(_model(unet), folder / "pipeline")
    return folder / "pipeline" / "unet"


def save_for_onnxruntime(unet: fastddpm.UNet, folder: Path) -> None:
    """The file that `side` reads; `folder` as from `save_for_diffusers`."""
    export.write(export.denoiser(_model(unet)), folder / ONNX_FILE, "onnx")


def without_onnx() -> list[str]:
    """The libraries that onnxruntime as a side needs and that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def inputs(x: Tensor, config: UNetConfig) -> tuple[Tensor, ...]:
    """x_t, t, and if the network has classes, labels."""
    labels = (torch.arange(len(x)) % config.num_classes,) if config.num_classes else ()
    return x, torch.full((len(x),), T), *labels


def side(name: str, network: torch.nn.Module | None, config: UNetConfig, folder: Path) -> Side:
    """One call of `network`: ours for the sides in `OURS`, otherwise diffusers'; onnxruntime reads its own."""
    if name == "onnxruntime":
        session = onnx_session(folder / ONNX_FILE)

        def run_onnx(x: Tensor) -> Tensor:
            names = (given.name for given in session.get_inputs())
            values = (value.numpy() for value in inputs(x, config))
            (out,) = session.run(None, dict(zip(names, values, strict=True)))
            return torch.from_numpy(out)

        return run_onnx
    assert network is not None
    if name == "prepared":
        denoiser = fastddpm.Denoiser(network)
        return lambda x: denoiser(*inputs(x, config))
    if name == "compiled":
        from torch._inductor import config as inductor

        inductor.freezing = True
        network = torch.compile(network)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode() if name in OURS else torch.no_grad():
            out = network(*inputs(x.contiguous(memory_format=torch.channels_last), config))
            return out if name in OURS else out.sample

    return run


def in_float64(unet: fastddpm.UNet, x: Tensor) -> Tensor:
    with torch.no_grad(), fastddpm.ops.use_backend("reference"):
        return copy.deepcopy(unet).double()(*inputs(x.double(), unet.config))


def peak_memory(name: str, preset: str, batch: int, folder: Path) -> float | None:
    """MiB, of a process that runs one side a few times; `folder` as from `save_for_diffusers`. None: unknown here."""
    if machine.peak_resident_set() is None:
        return None
    command = [sys.executable, __file__, "--memory-of", name, str(folder), "--preset", preset, "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def run_for_memory(name: str, folder: str, preset: str, batch: int) -> None:
    """Freshly initialized on either side: what reading weights takes is another matter."""
    config, network = fastddpm.preset(preset).unet, None
    if name in OURS:
        network = fastddpm.UNet(config).eval().channels_last()
    elif name != "onnxruntime":
        from diffusers import UNet2DModel

        network = UNet2DModel.from_config(UNet2DModel.load_config(folder)).eval().to(memory_format=torch.channels_last)
    run, x = side(name, network, config, Path(folder)), torch.randn(batch, *config.image_shape)
    for _ in range(3):
        run(x)
    print(machine.peak_resident_set())


def measure(
    unet: fastddpm.UNet, sides: dict[str, Side], preset: str, batch: int, rounds: int, folder: Path
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
    ratio = min(time for name, time in times.items() if name not in OURS) / times["prepared"]
    memory = {name: peak_memory(name, preset, batch, folder) for name in sides}
    return {"batch": batch, "ms": times, "ratio": ratio, "error": errors, "peak_mib": memory}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--preset", choices=("cifar10", "mnist"), default="cifar10")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = machine.parse(parser, arguments)
    if options.memory_of:
        run_for_memory(*options.memory_of, options.preset, options.batch[0])
        return 0
    try:
        import diffusers
    except ImportError:
        print("this compares with diffusers, which is not installed: pip install -e '.[diffusers]'", file=sys.stderr)
        return 2
    unet = random_weights(options.preset)
    left_out = {"compiled"} if options.no_compile else set()
    if absent := without_onnx():
        print(f"without onnxruntime: {', '.join(absent)} not installed (pip install -e '.[onnx]')", file=sys.stderr)
        left_out.add("onnxruntime")
    names = [name for name in SIDES if name not in left_out]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_diffusers(unet, Path(temporary))
        theirs = diffusers.UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
        theirs = theirs.to(memory_format=torch.channels_last)
        if "onnxruntime" in names:
            save_for_onnxruntime(unet, folder)
        sides = {name: side(name, unet if name in OURS else theirs, unet.config, folder) for name in names}
        for batch in options.batch:
            rows.append(measure(unet, sides, options.preset, batch, options.rounds, folder))
            print(f"batch {batch}: {rows[-1]['ratio']:.2f} times as fast as the fastest peer")
            for name in names:
                ms, error, mib = (rows[-1][key][name] for key in ("ms", "error", "peak_mib"))
                memory = "-" if mib is None else f"{mib:.0f}"
                print(f"  {name:11} {ms:8.1f} ms   error {error:.1e}   {memory:>6} MiB", flush=True)
    versions = {"diffusers": diffusers.__version__}
    if "onnxruntime" in names:
        versions["onnxruntime"] = importlib.metadata.version("onnxruntime")
    machine.write(options, versions, preset=options.preset, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
