"""Times the CIFAR-10 network in float32 and in bfloat16 on this CPU: which precision is the faster one here."""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.config import EngineConfig
from fastddpm.config.run import Precision
from fastddpm.presets import preset
from fastddpm.unet import UNet

from .denoiser import Denoiser
from .engine import PRECISIONS, precision_of

_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
_ROUNDS, _SECONDS = 5, 10.0  # of timing: rounds, in which the precisions take turns; none begins after so many seconds


@dataclass(frozen=True)
class Timed:
    """The result of one precision.

    `milliseconds`: the median of an evaluation. `difference`: of the outputs from the first precision's, 2-norms.
    """

    precision: str
    milliseconds: float
    difference: float


def run(batch: int) -> list[Timed]:
    """Time an evaluation of the network with random weights, of `batch` images, in each precision computed here.

    A processor without bf16 instructions computes float32 in place of bfloat16, which is then left out.
    """
    network = _network()
    x_t = torch.randn(batch, *network.config.image_shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((batch,), 500)
    engines = {precision: EngineConfig(precision=precision) for precision in _PRECISIONS}
    sides = {
        precision: Denoiser(network, engine)
        for precision, engine in engines.items()
        if precision_of(network, engine) == PRECISIONS[precision]
    }
    begun = time.perf_counter()
    seconds: dict[str, list[float]] = {precision: [] for precision in sides}
    with ExitStack() as held:
        for denoiser in sides.values():  # the weights stay as they are, as in a chain of the sampler
            held.enter_context(denoiser.unchanging())
        outputs = {precision: denoiser(x_t, t).float() for precision, denoiser in sides.items()}
        for done in range(_ROUNDS):
            if done and time.perf_counter() - begun > _SECONDS:
                break
            for precision, denoiser in sides.items():
                seconds[precision].append(_seconds(denoiser, x_t, t))
    first = outputs[_PRECISIONS[0]]
    return [
        Timed(precision, 1e3 * float(np.median(seconds[precision])), float((out - first).norm() / first.norm()))
        for precision, out in outputs.items()
    ]


def _seconds(denoiser: Denoiser, x_t: Tensor, t: Tensor) -> float:
    start = time.perf_counter()
    denoiser(x_t, t)
    return time.perf_counter() - start


def _network() -> UNet:
    """Return the network with numbers in every layer: at initialization the last ones are zero, and the output is."""
    network = UNet(preset("cifar10").unet).eval().channels_last()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                scale = layer.weight[0].numel() ** -0.5
                layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator))
    return network
