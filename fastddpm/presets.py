"""The paper's configurations, and one for two CPU cores."""

from typing import Any

from .config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from .errors import UsageError

# Section 4 and appendix B of the paper, and its released code, for everything but mnist.
_256: dict[str, Any] = dict(image_size=256, multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
_TRAIN_256: dict[str, Any] = dict(batch=64, lr=2e-5)
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("cifar10"),
        Preset(
            "celebahq256",
            UNetConfig(**_256),
            DiffusionConfig(variance="fixedsmall"),
            TrainConfig(**_TRAIN_256, steps=500_000),
        ),
        Preset(
            "lsun256",
            UNetConfig(**_256),
            DiffusionConfig(variance="fixedsmall"),
            TrainConfig(**_TRAIN_256, steps=1_200_000),
        ),
        Preset(
            "lsun256-large",
            UNetConfig(**_256, width=192),
            DiffusionConfig(variance="fixedsmall"),
            TrainConfig(**_TRAIN_256, steps=1_150_000, flip=False),
        ),
        # Small enough for two CPU cores: the same network and sampler, on 16x16 digits.
        Preset(
            "mnist",
            UNetConfig(image_size=16, image_channels=1, width=32, multipliers=(1, 2), blocks=1, dropout=0.0, groups=8),
            DiffusionConfig(),
            TrainConfig(steps=1000, batch=32, lr=1e-3, warmup=50, ema=0.99, flip=False),
            SampleConfig(),
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`; `UsageError` lists the names when there is none."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
