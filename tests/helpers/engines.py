"""What the tests of the engines share: a network, its inputs, and its output in float64."""

import copy

import torch
from helpers.architectures import reference
from helpers.networks import batch, shaken
from torch import Tensor

from fastddpm import ops
from fastddpm.config import UNetConfig
from fastddpm.unet import UNet


def network(config: UNetConfig) -> UNet:
    unet = shaken(UNet(config), 0.05)
    assert isinstance(unet, UNet)
    return unet


def arguments(n: int, config: UNetConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_t, t and the labels of `n` images; None without classes."""
    label = torch.arange(n) % (config.num_classes + 1) if config.num_classes else None
    return *batch(n, config), label


def in_float64(unet: UNet, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    with torch.no_grad(), ops.use_backend("reference"):
        return copy.deepcopy(unet).double().eval()(x_t.double(), t, label)


def expected_of(unet: UNet, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """The output in float64 by the implementation of `helpers.architectures`, which has none of the network's code."""
    with torch.no_grad():
        return reference(unet.config, dict(unet.named_parameters()), x_t, t, label)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm())
