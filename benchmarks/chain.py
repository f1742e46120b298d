"""The whole 1000-step chain of the CIFAR-10 network on the CPU, against diffusers' in the same run.

python benchmarks/chain.py [--batch 1 8] [--steps 1000] [--no-compile] [--out FILE.json]

Ours is `Sampler.trajectory`. diffusers is `UNet2DModel` with the same weights in channels_last, eager and under
torch.compile with freezing, and `DDPMScheduler.step`, as its `DDPMPipeline` runs them. All chains advance side by side,
20 steps of each in turn, so that a machine that slows down slows all of them; a chain's time is the sum of its own. The
ratio is to the faster peer's.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import fastddpm

sys.path.insert(0, str(Path(__file__).parent))
import machine
from inference_sides import random_weights, save_for_diffusers

SEGMENT = 20


def ours(unet: fastddpm.UNet, batch: int, steps: int) -> Iterator[Tensor]:
    """The state after every segment."""
    sampler = fastddpm.Sampler(unet, fastddpm.Diffusion(fastddpm.preset("cifar10").diffusion), steps)
    watch = range(SEGMENT - 1, steps, SEGMENT)
    for state in sampler.trajectory(range(batch), watch=watch):
        yield state.x


def theirs(network: Callable[..., Any], scheduler: Any, batch: int, steps: int) -> Iterator[Tensor]:
    """The loop of diffusers' DDPMPipeline."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            x = scheduler.step(network(x, t).sample, t, x, generator=generator).prev_sample
        if (i + 1) % SEGMENT == 0:
            yield x


def side_by_side(sides: dict[str, Iterator[Tensor]]) -> dict[str, list[float]]:
    """Seconds of every segment of every side; RuntimeError where a state is not finite."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    running = dict(sides)
    while running:
        for name, chain in list(running.items()):
            start = perf_counter()
            state = next(chain, None)
            elapsed = perf_counter() - start
            if state is None:
                del running[name]
                continue
            seconds[name].append(elapsed)
            if not state.isfinite().all():
                raise RuntimeError(f"{name}: the state after segment {len(seconds[name])} is not finite")
    return seconds


def row(seconds: dict[str, list[float]], batch: int, steps: int) -> dict[str, Any]:
    """One line of the table: seconds of the whole chain, images/s, and how many times as fast ours is."""
    whole = {name: sum(times) for name, times in seconds.items()}
    peers = [time for name, time in whole.items() if name != "fastddpm"]
    return {
        "batch": batch,
        "steps": steps,
        "seconds": whole,
        "images_per_s": {name: batch / time for name, time in whole.items()},
        "ratio": min(peers) / whole["fastddpm"],
        "segments_s": {name: [round(time, 4) for time in times] for name, times in seconds.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("--steps", type=int, default=1000, help=f"a multiple of {SEGMENT}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = machine.parse(parser, arguments)
    if options.steps < SEGMENT or options.steps % SEGMENT:
        parser.exit(2, f"--steps must be a multiple of {SEGMENT}; got {options.steps}\n")
    try:
        import diffusers
    except ImportError:
        print("this compares with diffusers, which is not installed: pip install -e '.[diffusers]'", file=sys.stderr)
        return 2
    unet, rows = random_weights(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_diffusers(unet, Path(temporary))
        peer = diffusers.UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
        scheduler = folder.parent / "scheduler"
        networks: dict[str, Callable[..., Any]] = {"diffusers": peer.to(memory_format=torch.channels_last)}
        if not options.no_compile:
            from torch._inductor import config

            config.freezing = True
            networks["diffusers compiled"] = torch.compile(peer)
        for batch in options.batch:
            sides = {"fastddpm": ours(unet, batch, options.steps)} | {
                name: theirs(network, diffusers.DDPMScheduler.from_pretrained(scheduler), batch, options.steps)
                for name, network in networks.items()
            }
            for chain in (ours(unet, batch, SEGMENT), *(
                theirs(network, diffusers.DDPMScheduler.from_pretrained(scheduler), batch, SEGMENT)
                for network in networks.values()
            )):  # fmt: skip
                next(chain)  # compiles, allocates
            rows.append(row(side_by_side(sides), batch, options.steps))
            print(f"batch {batch}, {options.steps} steps: {rows[-1]['ratio']:.2f} times as fast as the faster peer")
            for name, time in rows[-1]["seconds"].items():
                print(f"  {name:20} {time:8.1f} s   {batch / time:.4f} images/s", flush=True)
            machine.write(options, {"diffusers": diffusers.__version__}, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
