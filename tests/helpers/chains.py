"""Chains of a small network, and step tables as arrays."""

from typing import Any

import numpy as np
import torch
from helpers.networks import SMALLEST, shaken
from torch import Tensor

from fastddpm.config import DiffusionConfig, EngineConfig, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.sampling import chain as chains
from fastddpm.sampling.engine import FusedUNet
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.step_table import step_table
from fastddpm.unet import UNet

FUSED = EngineConfig(native=False)


STEPS = 6


def sampler(config: UNetConfig = SMALLEST, **options: Any) -> Sampler:
    options = {"steps": STEPS, "engine": FUSED} | options
    diffusion = options.pop("diffusion", Diffusion(DiffusionConfig(prediction="x0")))
    torch.manual_seed(0)
    unet = shaken(UNet(config))
    assert isinstance(unet, UNet)
    return Sampler(unet, diffusion, **options)


def chain_of(owner: Sampler, batch: int, images: list[int], label: list[int] | None = None) -> chains.ReverseChain:
    network = FusedUNet(owner.network, 1000, FUSED, torch.float32)

    def predict(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return owner._predict(network, x, t, label)

    chain = chains.ReverseChain(predict, owner.tables(torch.device("cpu")), batch, labels=label is not None)
    with torch.no_grad():
        chain.begin(torch.tensor(images), None if label is None else torch.tensor(label))
    return chain


def coefficient_table(diffusion: Diffusion, timesteps: np.ndarray, method: str, eta: float) -> np.ndarray:
    """The step table as `reverse_step` reads it, float64 (S, 9)."""
    return np.stack(step_table(diffusion, timesteps, method, eta), axis=1)
