"""Presets: the paper's configurations, and one for two CPU cores. Imports no torch."""

from pathlib import Path
from typing import Any

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.errors import UsageError
from fastddpm.storage.documents import difference, from_dict, read_json, shown, stored_fields, to_dict
from fastddpm.storage.files import write_json

# All but mnist are from section 4 and appendix B of the paper, and from its released code.
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
        # Small enough for two CPU cores: the same network and process, on 16x16 digits. Changes for a run of 1000 small
        # steps: v instead of eps and a cosine schedule, which learn faster at this size; classes with guidance; a
        # learning rate that falls to zero instead of a long average; the smaller variance, which suits a chain of fewer
        # steps.
        Preset(
            "mnist",
            UNetConfig(
                image_size=16,
                image_channels=1,
                width=32,
                multipliers=(1, 2),
                blocks=1,
                dropout=0.0,
                groups=8,
                num_classes=10,
                label_dropout=0.1,
            ),
            DiffusionConfig(schedule="cosine", prediction="v", variance="fixedsmall"),
            TrainConfig(
                steps=1000,
                batch=16,
                lr=2e-3,
                warmup=50,
                decay="cosine",
                ema=0.99,
                flip=False,
                save_every=500,
                preview_every=250,
                preview_steps=10,
            ),
            SampleConfig(steps=150, guidance=2.0),
        ),
    )
}


def preset(name: str) -> Preset:
    """Return the preset called `name`. Raises `UsageError`, listing the names, if there is none."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def read_preset(path: Path) -> Preset:
    """Read the configuration that a run saved.

    Raises `UsageError` if there is none or a value is impossible, and `DataError` if the file is damaged.
    """
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return from_dict(Preset, data, str(path))


def describe(preset: Preset, base: Preset) -> str:
    """Return the configuration as text: a line for each part, and the differences from `base`."""
    lines = [f"configuration {preset.name}"]
    for part in ("unet", "diffusion", "train", "sample"):
        values = stored_fields(getattr(preset, part))
        lines.append(f"  {part}: " + ", ".join(f"{name}={_plain(value)}" for name, value in values))
    changed = difference(base, preset)
    if changed:
        lines.append(f"changed from preset {base.name}: " + "; ".join(changed))
    return "\n".join(lines)


def _plain(value: object) -> str:
    text = shown(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) and text == str(value) else text


def write_preset(preset: Preset, path: Path) -> None:
    """Write a configuration as JSON, atomically. Raises `StorageError` if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_dict(preset))
