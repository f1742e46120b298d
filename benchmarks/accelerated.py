"""diffusers' own networks against the same ones after `fastddpm.accelerate`, on a CPU without gradients.

python benchmarks/accelerated.py [--network cifar10 stable-diffusion] [--batch 1 8] [--rounds 9] [--compile]
    [--training] [--out FILE.json]

diffusers runs in the faster of its two layouts, contiguous and channels_last, and ours on the same weights. The sides
take turns in one process. Times are CPU time of the process, on one thread unless --threads says more: on a machine
that other programs share, wall clock measures those. Errors are of the 2-norm against diffusers in float64.
`cifar10` is UNet2DModel with the paper's CIFAR-10 network (35.7 M parameters), `stable-diffusion` a
UNet2DConditionModel of its kind, smaller (137 M; widths 128 to 512, 32x32, 8 heads, 77x256 tokens).
"""

import copy
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastddpm

sys.path.insert(0, str(Path(__file__).parent))
import machine

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def network(name: str) -> Any:
    """With numbers in every weight, in evaluation mode."""
    import diffusers

    torch.manual_seed(0)
    if name == "cifar10":
        unet = diffusers.UNet2DModel(
            sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
        )  # fmt: skip
    else:
        unet = diffusers.UNet2DConditionModel(
            sample_size=32, block_out_channels=(128, 256, 512, 512), cross_attention_dim=256, attention_head_dim=8,
            layers_per_block=2,
        )  # fmt: skip
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return unet.eval()


def inputs(unet: Any, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, unet.config.in_channels, 32, 32, generator=generator)
    tokens = (torch.randn(batch, 77, 256, generator=generator),) if "Condition" in type(unet).__name__ else ()
    return x, torch.tensor(500), *tokens


def evaluation(unet: Any, arguments: tuple[Tensor, ...], layout: torch.memory_format) -> Callable[[], Tensor]:
    x = arguments[0].contiguous(memory_format=layout)

    def run() -> Tensor:
        with torch.no_grad():
            sample: Tensor = unet(x, *arguments[1:]).sample
            return sample

    return run


def step(unet: Any, arguments: tuple[Tensor, ...], layout: torch.memory_format) -> Callable[[], Tensor]:
    """Forward and backward."""
    x = arguments[0].contiguous(memory_format=layout)

    def run() -> Tensor:
        for parameter in unet.parameters():
            parameter.grad = None
        loss: Tensor = unet(x, *arguments[1:]).sample.square().mean()
        loss.backward()
        return loss

    return run


def measure(name: str, batch: int, rounds: int, *, compile: bool, training: bool) -> dict[str, Any]:
    unet = network(name)
    arguments = inputs(unet, batch)
    doubled = [value.double() if value.is_floating_point() else value for value in arguments]
    with torch.no_grad():
        exact = copy.deepcopy(unet).double()(*doubled).sample
    sides: dict[str, Callable[[], Tensor]] = {}
    errors = {}
    make = step if training else evaluation
    ours = copy.deepcopy(unet)
    report = fastddpm.accelerate(ours)
    for side, layout in [*LAYOUTS.items(), ("fastddpm", torch.channels_last)]:
        one = ours if side == "fastddpm" else copy.deepcopy(unet).to(memory_format=layout)
        errors[side] = float((evaluation(one, arguments, layout)().double() - exact).norm() / exact.norm())
        called = torch.compile(one, dynamic=False) if compile else one
        sides[side] = make(called, arguments, layout)
    seconds = machine.alternating(list(sides.values()), rounds, time.process_time)
    times = {side: [1e3 * one for one in own] for side, own in zip(sides, seconds, strict=True)}
    best = min(LAYOUTS, key=lambda layout: median(times[layout]))
    return {
        "network": name, "batch": batch, "compiled": compile, "training": training, "diffusers": best,
        "ratio": median(times[best]) / median(times["fastddpm"]),
        "ratio_of_fastest": min(times[best]) / min(times["fastddpm"]),
        "cpu_ms": {side: {"median": median(own), "fastest": min(own)} for side, own in times.items()},
        "error": errors, "replaced": {what: len(names) for what, names in report.replaced.items()},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(rounds=9)
    parser.add_argument("--network", nargs="+", choices=("cifar10", "stable-diffusion"), default=["cifar10"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="both sides under torch.compile")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    options = machine.parse(parser, arguments)
    try:
        version = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        print("this compares with diffusers, which is not installed: pip install -e '.[diffusers]'", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.network:
        for batch in options.batch:
            row = measure(name, batch, options.rounds, compile=options.compile, training=options.training)
            rows.append(row)
            print(f"{name}, batch {batch}: {row['ratio']:.2f} times as fast as diffusers in {row['diffusers']}")
            for side, own in row["cpu_ms"].items():
                print(f"  {side:14} {own['median']:8.1f} ms   error {row['error'][side]:.1e}", flush=True)
    machine.write(options, {"diffusers": version}, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
