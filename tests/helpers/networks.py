"""Small networks for the tests."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.pretrained.model import Model
from fastddpm.unet import UNet

# Two levels, one downsampling, attention in both paths, every kind of block; 6x6 is no power of two.
TINY = UNetConfig(
    image_size=12, image_channels=3, width=8, multipliers=(1, 2), blocks=1, attention_resolutions=(6,), dropout=0.0,
    groups=4,
)  # fmt: skip


# The cheapest network there is, for long chains.
SMALLEST = UNetConfig(
    image_size=4, image_channels=1, width=4, multipliers=(1,), blocks=1, attention_resolutions=(), dropout=0.0, groups=2
)


# For chains and files beside diffusers'.
SMALL = UNetConfig(image_size=8, width=32, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), dropout=0.0)


def tiny(**options: object) -> UNetConfig:
    return dataclasses.replace(TINY, **options)


def shaken(module: nn.Module, amount: float = 0.2) -> nn.Module:
    """Noise on every parameter, so that no branch is near zero and no bias is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return module.eval()


def random_model(config: UNetConfig, diffusion: DiffusionConfig | None = None) -> Model:
    """Every parameter random and of a size that matters, also the norms and the layers that begin near zero."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    diffusion = diffusion or DiffusionConfig()
    preset = Preset("test", config, diffusion, TrainConfig(lr=3e-4), SampleConfig(count=3))
    return Model(unet, Diffusion(diffusion), preset)


def batch(n: int = 2, config: UNetConfig = TINY) -> tuple[Tensor, Tensor]:
    x_t = torch.randn(n, *config.image_shape)
    return x_t, torch.arange(n) * 300 + 7


class Formula(nn.Module):
    """A network given by a formula of (x_t, t as a column, label), with the attributes of the protocol."""

    def __init__(self, formula: Callable[[Tensor, Tensor, Tensor | None], Tensor], **config: Any) -> None:
        super().__init__()
        self.formula = formula
        self.config = dataclasses.replace(SMALLEST, **({"image_size": 2} | config))
        self.image_shape = self.config.image_shape
        self.num_classes = self.config.num_classes
        self.null_label = self.config.num_classes if self.config.label_dropout > 0 else None
        self.device_marker = nn.Parameter(torch.zeros(()))
        self.modes: set[bool] = set()

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.modes.add(self.training)
        assert t.shape == (len(x_t),) and t.dtype == torch.int64
        return self.formula(x_t, t.reshape(-1, 1, 1, 1), label)
