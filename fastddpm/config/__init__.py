"""All settings of a run as frozen dataclasses, whose field docstrings are the help texts. Imports no torch."""

from .run import (
    MAX_TIMESTEPS,
    MOST_IN_GRID,
    CodecOptions,
    DiffusionConfig,
    EngineConfig,
    Loss,
    Method,
    Precision,
    Prediction,
    Preset,
    SampleConfig,
    Schedule,
    Spacing,
    TrainConfig,
    Variance,
)
from .unet import UNetConfig

__all__ = [
    "MAX_TIMESTEPS",
    "MOST_IN_GRID",
    "CodecOptions",
    "DiffusionConfig",
    "EngineConfig",
    "Loss",
    "Method",
    "Precision",
    "Prediction",
    "Preset",
    "SampleConfig",
    "Schedule",
    "Spacing",
    "TrainConfig",
    "UNetConfig",
    "Variance",
]
