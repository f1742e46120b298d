"""The cost of noticing that a network has changed: once before a chain, beside the steps of the chain.

python benchmarks/weights_check.py [--preset mnist cifar10] [--batch 1] [--rounds 15] [--out FILE.json]

A sampler compares every byte of the weights, and every module, with what it prepared. The two sides, that comparison
and one step of the chain, take turns; `share` is the comparison's part of a whole chain of the preset's own length and
guidance, and `steps` the length from which on it is below 1%.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastddpm
from fastddpm.sampling.engine import is_current

sys.path.insert(0, str(Path(__file__).parent))
import machine
from inference_sides import random_weights


def measure(preset: str, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of the comparison and of a step, and what part of a chain the comparison takes."""
    unet, config = random_weights(preset), fastddpm.preset(preset)
    chain = config.sample
    diffusion = fastddpm.Diffusion(config.diffusion)
    sampler = fastddpm.Sampler(unet, diffusion, steps=chain.steps, guidance=chain.guidance)
    x = torch.randn(batch, config.unet.image_channels, config.unet.image_size, config.unet.image_size)
    sampler.probe(x)
    with sampler.unchanging():
        network = sampler._prepared
        assert network is not None and is_current(network, unet, sampler.engine)
        sides = [lambda: is_current(network, unet, sampler.engine), lambda: sampler.probe(x)]
        check, step = machine.medians(sides, rounds)
    return {
        "preset": preset,
        "batch": batch,
        "weight_bytes": sum(p.numel() * p.element_size() for p in unet.parameters()),
        "check_ms": 1e3 * check,
        "step_ms": 1e3 * step,
        "chain_steps": sampler.steps,
        "share": check / (check + sampler.steps * step),
        "steps": math.ceil(99 * check / step),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(batch=[1])
    parser.add_argument("--preset", nargs="+", default=["mnist", "cifar10"])
    options = machine.parse(parser, arguments)
    rows = []
    for preset in options.preset:
        for batch in options.batch:
            rows.append(row := measure(preset, batch, options.rounds))
            print(
                f"{preset:8} batch {batch}: check {row['check_ms']:.2f} ms, step {row['step_ms']:.2f} ms; "
                f"{row['share']:.3%} of {row['chain_steps']} steps, below 1% from {row['steps']} steps on",
                flush=True,
            )
    machine.write(options, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
