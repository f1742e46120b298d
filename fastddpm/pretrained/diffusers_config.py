"""Configurations of diffusers' UNet2DModel and DDPMScheduler to and from ours; errors name unsupported fields."""

import warnings
from dataclasses import dataclass
from typing import Any

from fastddpm.config import DiffusionConfig, Preset, UNetConfig
from fastddpm.errors import DataError, UsageError, refuse

VERSION = "0.42.1"  # the version of diffusers that these fields and defaults are from


@dataclass(frozen=True)
class Needed:
    """A field that must have one of `values`. `default`: the value that diffusers assumes if the field is missing."""

    default: Any
    values: tuple[Any, ...]


_UNET_NEEDED = {
    "act_fn": Needed("silu", ("silu", "swish")),
    "add_attention": Needed(True, (True,)),
    "attn_norm_num_groups": Needed(None, (None,)),
    "center_input_sample": Needed(False, (False,)),
    "class_embed_type": Needed(None, (None,)),
    "downsample_padding": Needed(1, (0,)),
    "downsample_type": Needed("conv", ("conv",)),
    "flip_sin_to_cos": Needed(True, (False,)),
    "freq_shift": Needed(0, (1,)),
    "mid_block_scale_factor": Needed(1, (1,)),
    "mid_block_type": Needed("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "norm_eps": Needed(1e-5, (1e-6,)),
    "resnet_time_scale_shift": Needed("default", ("default",)),
    "time_embedding_dim": Needed(None, (None,)),
    "time_embedding_type": Needed("positional", ("positional",)),
    "upsample_type": Needed("conv", ("conv",)),
}
_UNET_READ = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": None,
    "up_block_types": None,
    "layers_per_block": 2,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # used only by a learned time embedding
}
_SCHEDULER_NEEDED = {
    "clip_sample_range": Needed(1.0, (1.0,)),
    "rescale_betas_zero_snr": Needed(False, (False,)),
    "thresholding": Needed(False, (False,)),
    "trained_betas": Needed(None, (None,)),
}
_SCHEDULER_READ = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    # These only affect the timesteps of short chains, which `fastddpm.Sampler` spaces itself, and thresholding.
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixedsmall",
    "fixed_small_log": "fixedsmall",
    "fixed_large": "fixedlarge",
    "fixed_large_log": "fixedlarge",
    "learned_range": "learned_range",
}


def read_unet(data: Any, where: str) -> UNetConfig:
    """Convert a UNet2DModel configuration to ours. Raises `DataError`, naming each field that is not supported."""
    values = _fields(data, _UNET_NEEDED, _UNET_READ, where)
    widths = _positive_list(values["block_out_channels"], f"{where}: block_out_channels")
    down, up = values["down_block_types"], values["up_block_types"]
    attends = [block == "AttnDownBlock2D" for block in down] if isinstance(down, list) else []
    if down != [_down_type(attend) for attend in attends] or len(attends) != len(widths):
        raise DataError(f"{where}: down_block_types must be {len(widths)} of DownBlock2D, AttnDownBlock2D; got {down}")
    if up != [_up_type(attend) for attend in reversed(attends)]:
        raise DataError(f"{where}: up_block_types must mirror down_block_types {down}; got {up}")
    if any(width % widths[0] for width in widths):
        raise DataError(f"{where}: block_out_channels must be multiples of the first; got {widths}")

    size = values["sample_size"]
    size = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    if type(size) is not int:
        raise DataError(f"{where}: sample_size must be one integer, the side of square images; got {size!r}")
    head_dim = values["attention_head_dim"]
    attending = {width for width, attend in zip(widths, attends, strict=True) if attend} | {widths[-1]}
    if head_dim is not None and attending != {head_dim}:
        raise DataError(
            f"{where}: attention_head_dim must be null, one head of the full width; got {head_dim} "
            "(diffusers assumes 8 if the field is missing)"
        )
    channels, out_channels = values["in_channels"], values["out_channels"]
    if out_channels not in (channels, 2 * channels):
        raise DataError(f"{where}: out_channels must be in_channels or twice that; got {channels} -> {out_channels}")
    return _build(
        UNetConfig,
        where,
        image_size=size,
        image_channels=channels,
        width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=values["layers_per_block"],
        attention_resolutions=tuple(size >> i for i, attend in enumerate(attends) if attend),
        dropout=float(values["dropout"]),
        groups=values["norm_num_groups"],
        num_classes=values["num_class_embeds"] or 0,
        learned_variance=out_channels == 2 * channels,
    )


def read_scheduler(data: Any, where: str) -> DiffusionConfig:
    """Convert a DDPMScheduler configuration to ours. Raises `DataError`, naming each field that is not supported."""
    values = _fields(data, _SCHEDULER_NEEDED, _SCHEDULER_READ, where)
    variance = _choice(values, "variance_type", _VARIANCES, where)
    return _build(
        DiffusionConfig,
        where,
        timesteps=values["num_train_timesteps"],
        schedule=_choice(values, "beta_schedule", _SCHEDULES, where),
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        prediction=_choice(values, "prediction_type", _PREDICTIONS, where),
        variance=variance,
        loss="hybrid" if variance == "learned_range" else "simple",
        clip_x0=values["clip_sample"],
    )


def write_unet(config: UNetConfig) -> dict[str, Any]:
    """Convert our network's configuration to a complete UNet2DModel configuration.

    Raises `UsageError`, naming each option, for a network that is not written.
    """
    _refuse_options(config)
    attends = config.attends
    values = {name: needed.values[0] for name, needed in _UNET_NEEDED.items()} | {
        "sample_size": config.image_size,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels * (1 + config.learned_variance),
        "block_out_channels": list(config.level_channels),
        "down_block_types": [_down_type(attend) for attend in attends],
        "up_block_types": [_up_type(attend) for attend in reversed(attends)],
        "layers_per_block": config.blocks,
        "dropout": config.dropout,
        "norm_num_groups": config.groups,
        "attention_head_dim": None,
        "num_class_embeds": (config.num_classes + (config.label_dropout > 0)) or None,
        "num_train_timesteps": None,
    }
    return {"_class_name": "UNet2DModel", "_diffusers_version": VERSION} | dict(sorted(values.items()))


def _refuse_options(config: UNetConfig) -> None:
    """Raise `UsageError`, naming all options of the network that are not written to diffusers' files."""
    paper = UNetConfig()
    options = (
        "channels", "middle_attention", "heads", "head_channels", "scale_shift", "resample", "downsample_padding",
        "norm_eps", "freq_shift", "time_scale",
    )  # fmt: skip
    refuse(
        f"a network with {name} {getattr(config, name)} is not written as a diffusers pipeline"
        for name in options
        if getattr(config, name) != getattr(paper, name)
    )


def write_scheduler(config: DiffusionConfig) -> dict[str, Any]:
    """Convert our process to a DDPMScheduler configuration. Raises `UsageError` if diffusers cannot express it."""
    values = {name: needed.values[0] for name, needed in _SCHEDULER_NEEDED.items()} | _SCHEDULER_READ
    values |= {
        "num_train_timesteps": config.timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": _inverse(_SCHEDULES, "schedule", config.schedule),
        "variance_type": _inverse(_VARIANCES, "variance", config.variance),
        "prediction_type": _inverse(_PREDICTIONS, "prediction", config.prediction),
        "clip_sample": config.clip_x0,
    }
    return {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION} | dict(sorted(values.items()))


def check_agreement(preset: Preset, unet: UNetConfig, diffusion: DiffusionConfig, where: str) -> None:
    """Raise `DataError` if fastddpm.json (`preset`) describes another model than diffusers' files (the other two)."""
    pairs = (
        (write_unet(preset.unet), write_unet(unet)),
        (write_scheduler(preset.diffusion), write_scheduler(diffusion)),
    )
    for ours, theirs in pairs:
        for name, value in ours.items():
            if theirs[name] != value:
                raise DataError(f"{where} has {name} = {value!r}, but the diffusers configuration has {theirs[name]!r}")


def _fields(data: Any, needed: dict[str, Needed], read: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise DataError(f"{where} must be a JSON object; got {type(data).__name__}")
    refused = []
    for name, need in needed.items():
        value = data.get(name, need.default)
        if not any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in need.values
        ):
            came = repr(value) if name in data else f"nothing, for which diffusers assumes {value!r}"
            refused.append(f"{name} must be {' or '.join(map(repr, need.values))}; got {came}")
    if refused:
        raise DataError(f"{where} describes a network or process that fastddpm does not support: {'; '.join(refused)}")
    unknown = [name for name in data if name not in needed and name not in read and not name.startswith("_")]
    if unknown:
        warnings.warn(f"{where}: unknown fields are ignored: {', '.join(unknown)}", stacklevel=4)
    return {name: data.get(name, default) for name, default in read.items()}


def _build(cls: type, where: str, **values: Any) -> Any:
    integers = ("image_size", "image_channels", "width", "blocks", "groups", "num_classes", "timesteps")
    for name in integers:
        if name in values and type(values[name]) is not int:
            raise DataError(f"{where}: {name} must be an integer; got {values[name]!r}")
    try:
        return cls(**values)
    except (UsageError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error


def _positive_list(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value or any(type(v) is not int or v < 1 for v in value):
        raise DataError(f"{where} must be a list of positive integers; got {value!r}")
    return value


def _choice(values: dict[str, Any], name: str, table: dict[str, str], where: str) -> str:
    if not isinstance(values[name], str) or values[name] not in table:
        raise DataError(f"{where}: {name} must be one of {', '.join(table)}; got {values[name]!r}")
    return table[values[name]]


def _inverse(table: dict[str, str], name: str, value: str) -> str:
    for theirs, ours in table.items():
        if ours == value:
            return theirs
    raise UsageError(f"diffusers cannot express {name} {value}; it knows {', '.join(dict.fromkeys(table.values()))}")


def _down_type(attend: bool) -> str:
    return "AttnDownBlock2D" if attend else "DownBlock2D"


def _up_type(attend: bool) -> str:
    return "AttnUpBlock2D" if attend else "UpBlock2D"
