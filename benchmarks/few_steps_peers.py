"""Seconds of a few-step chain, beside diffusers' pipeline with the same scheduler and weights in the same run.

    python benchmarks/few_steps_peers.py [--steps 10 20 50] [--methods ancestral dpm2m] [--batch 1 8] [--rounds 3]
        [--compile] [--out FILE.json]

Ours is `Sampler.sample` of the CIFAR-10 network, with the spacing of their scheduler. Theirs is DDPMPipeline with
UNet2DModel in channels_last; with `--compile` also under torch.compile with freezing. The sides take turns, and each is
called once before it is timed. Weights are random: a chain takes the same time with any.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastddpm

sys.path.insert(0, str(Path(__file__).parent))
import machine
from inference_sides import random_weights, save_for_diffusers

SPACINGS = {"ancestral": "leading", "ddim": "leading", "dpm2m": "linspace", "dpm2m-sde": "linspace"}
"""Each method's spacing: the default of diffusers' scheduler."""


def scheduler(method: str, folder: Path) -> Any:
    """diffusers' scheduler of `method`, from the DDPMScheduler saved in `folder`."""
    import diffusers

    base = diffusers.DDPMScheduler.from_pretrained(folder)
    if method == "ancestral":
        return base
    if method == "ddim":
        return diffusers.DDIMScheduler.from_config(base.config)
    algorithm = "sde-dpmsolver++" if method == "dpm2m-sde" else "dpmsolver++"
    return diffusers.DPMSolverMultistepScheduler.from_config(
        base.config, algorithm_type=algorithm, timestep_spacing=SPACINGS[method]
    )


def theirs(network: Any, method: str, folder: Path, batch: int, steps: int) -> Callable[[], object]:
    """One call of diffusers' DDPMPipeline."""
    import diffusers

    pipeline = diffusers.DDPMPipeline(network, scheduler(method, folder))
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(batch, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--methods", nargs="+", choices=tuple(SPACINGS), default=list(SPACINGS))
    parser.add_argument("--compile", action="store_true", help="also diffusers under torch.compile")
    options = machine.parse(parser, arguments)
    try:
        import diffusers
    except ImportError:
        print("this compares with diffusers, which is not installed: pip install -e '.[diffusers]'", file=sys.stderr)
        return 2
    unet, rows = random_weights(), []
    diffusion = fastddpm.Diffusion(fastddpm.preset("cifar10").diffusion)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_diffusers(unet, Path(temporary))
        peer = diffusers.UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
        networks: dict[str, Any] = {"diffusers": peer.to(memory_format=torch.channels_last)}
        if options.compile:
            from torch._inductor import config

            config.freezing = True
            networks["diffusers compiled"] = torch.compile(peer)
        for batch in options.batch:
            for method in options.methods:
                for steps in options.steps:
                    sampler = fastddpm.Sampler(unet, diffusion, steps, method, spacing=SPACINGS[method])
                    sides: dict[str, Callable[[], object]] = {"fastddpm": partial(sampler.sample, range(batch))}
                    for name, network in networks.items():
                        sides[name] = theirs(network, method, folder.parent / "scheduler", batch, steps)
                    seconds = dict(zip(sides, machine.medians(list(sides.values()), options.rounds), strict=True))
                    ratio = min(t for name, t in seconds.items() if name != "fastddpm") / seconds["fastddpm"]
                    rows.append({"method": method, "spacing": SPACINGS[method], "steps": steps, "batch": batch,
                                 "seconds": seconds, "ratio": ratio})  # fmt: skip
                    figures = "  ".join(f"{name} {time:.2f} s" for name, time in seconds.items())
                    print(f"{method:9} {steps:3} steps, batch {batch}: {figures}  ratio {ratio:.2f}", flush=True)
                    machine.write(options, {"diffusers": diffusers.__version__}, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
