"""Configurations of diffusers' UNet2DModel as our network's, and back; errors name unsupported fields."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastddpm.config import DiffusionConfig, Preset, UNetConfig
from fastddpm.errors import DataError, refuse

from .diffusers_fields import VERSION, Needed, build, choice, fields_of
from .diffusers_scheduler import write_scheduler

_NEEDED = {
    "act_fn": Needed("silu", ("silu", "swish")),
    "center_input_sample": Needed(default=False, values=(False,)),
    "class_embed_type": Needed(None, (None,)),
    "downsample_padding": Needed(1, (0, 1)),
    "flip_sin_to_cos": Needed(default=True, values=(False, True)),
    "freq_shift": Needed(0, (1, 0)),
    "mid_block_scale_factor": Needed(1, (1,)),
    "mid_block_type": Needed("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "time_embedding_type": Needed("positional", ("positional",)),
}
_READ: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attn_norm_num_groups": None,
    "attention_head_dim": 8,
    "add_attention": True,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "time_embedding_dim": None,
    "num_train_timesteps": None,  # used only by a learned time embedding
}
# (attention, resamples by residual blocks; None: as downsample_type and upsample_type say) of each type of level.
_DOWN = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
_UP = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")}
_RESAMPLE = {"conv": "conv", "resnet": "resblock"}
_SCALE_SHIFT = {"default": "", "scale_shift": "scale_shift"}


def read_unet(data: Any, where: str, image_size: int | Sequence[int] | None = None) -> UNetConfig:
    """Convert a UNet2DModel configuration to ours. Raises `DataError`, naming each field that is not supported.

    `image_size`: for a configuration whose sample_size is null, as diffusers' default is.
    """
    name = data.get("_class_name", "UNet2DModel") if isinstance(data, dict) else "UNet2DModel"
    if name != "UNet2DModel":
        raise DataError(
            f"{where}: _class_name must be UNet2DModel, a network without text or other input; got {name!r}"
        )
    values = fields_of(data, _NEEDED, _READ, where)
    widths = _positive_list(values["block_out_channels"], f"{where}: block_out_channels")
    attends, resample = _levels(values, len(widths), where)
    size = _image_size(values["sample_size"], image_size, where)
    channels, out_channels = values["in_channels"], values["out_channels"]
    if out_channels not in (channels, 2 * channels if isinstance(channels, int) else None):
        raise DataError(f"{where}: out_channels must be in_channels or twice that; got {channels} -> {out_channels}")
    if values["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise DataError(
            f"{where}: time_embedding_dim must be null or four times the first of block_out_channels, "
            f"{4 * widths[0]}; got {values['time_embedding_dim']!r:.100}"
        )
    if not isinstance(values["add_attention"], bool):
        raise DataError(f"{where}: add_attention must be true or false; got {values['add_attention']!r:.100}")
    scale_shift = bool(choice(values, "resnet_time_scale_shift", _SCALE_SHIFT, where))
    _check_middle_norm(values, scale_shift, where)
    multiples = all(width % widths[0] == 0 for width in widths)
    height = size if isinstance(size, int) else size[0]
    return build(
        UNetConfig,
        where,
        image_size=size,
        image_channels=channels,
        width=widths[0],
        **(
            {"multipliers": tuple(width // widths[0] for width in widths)} if multiples else {"channels": tuple(widths)}
        ),
        blocks=values["layers_per_block"],
        attention_resolutions=tuple(height >> i for i, attend in enumerate(attends) if attend),
        dropout=_number(values, "dropout", where),
        groups=values["norm_num_groups"],
        num_classes=0 if values["num_class_embeds"] is None else values["num_class_embeds"],
        learned_variance=out_channels == 2 * channels,
        middle_attention=values["add_attention"],
        **_heads(values, widths, attends, where),
        scale_shift=scale_shift,
        resample=_RESAMPLE[resample],
        downsample_padding=data.get("downsample_padding", 1),
        norm_eps=_number(values, "norm_eps", where),
        freq_shift=data.get("freq_shift", 0),
    )


def cosines_first(data: Mapping[str, Any]) -> bool:
    """Return whether the network of a UNet2DModel configuration has cosines before sines in the time embedding."""
    return bool(data.get("flip_sin_to_cos", True))


def _levels(values: Mapping[str, Any], levels: int, where: str) -> tuple[list[bool], str]:
    """Return which levels have attention, and by what all resample: conv or resnet."""
    down, up = values["down_block_types"], values["up_block_types"]
    for field, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if not isinstance(types, list) or len(types) != levels or any(each not in known for each in types):
            raise DataError(f"{where}: {field} must be {levels} of {', '.join(known)}; got {types!r:.300}")
    attends = [_DOWN[each][0] for each in down]
    if [_UP[each][0] for each in up] != attends[::-1]:
        raise DataError(f"{where}: up_block_types must have attention where down_block_types have it; got {up}, {down}")
    kinds: dict[str, str] = {}
    for field, types, known in (("downsample_type", down, _DOWN), ("upsample_type", up, _UP)):
        default = values[field] or "conv"
        if default not in _RESAMPLE:
            raise DataError(f"{where}: {field} must be conv or resnet; got {default!r:.100}")
        kinds |= {f"{each} ({field} {default})": known[each][1] or default for each in types[:-1]}
    if len(set(kinds.values())) > 1:
        raise DataError(f"{where}: all levels must resample alike, by conv or by resnet; got {', '.join(kinds)}")
    return attends, next(iter(kinds.values()), "conv")


def _image_size(stored: Any, given: int | Sequence[int] | None, where: str) -> int | tuple[int, ...]:
    if stored is None and given is None:
        raise DataError(
            f"{where}: sample_size is null, so the size of the images is not told; convert it with "
            'python -m fastddpm.convert DIRECTORY OUT --config FILE.json of {"image_size": 64}'
        )
    size = given if stored is None else stored
    if isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int for side in size):
        return tuple(size)
    if type(size) is not int:
        raise DataError(f"{where}: sample_size must be an integer, or a height and a width; got {size!r:.100}")
    return size


def _check_middle_norm(values: Mapping[str, Any], scale_shift: bool, where: str) -> None:
    """Raise `DataError` unless the middle's attention has the norm of all others.

    diffusers leaves it out with scale_shift if attn_norm_num_groups is null.
    """
    groups, others = values["attn_norm_num_groups"], values["norm_num_groups"]
    if values["add_attention"] and groups != others and (groups is not None or scale_shift):
        because = ", with which diffusers leaves that norm out" if groups is None else ""
        raise DataError(
            f"{where}: attn_norm_num_groups must be norm_num_groups, {others!r:.100}"
            f"{' with resnet_time_scale_shift scale_shift' if groups is None else ' or null'}; got {groups!r:.100}"
            f"{because}"
        )


def _heads(values: Mapping[str, Any], widths: Sequence[int], attends: Sequence[bool], where: str) -> dict[str, int]:
    """Return head_channels, or nothing for one head of the full width."""
    size = values["attention_head_dim"]
    if size is None:
        return {}
    if type(size) is not int or size < 1:
        raise DataError(f"{where}: attention_head_dim must be null or a positive integer; got {size!r:.100}")
    attending = {width for width, attend in zip(widths, attends, strict=True) if attend}
    attending |= {widths[-1]} if values["add_attention"] else set()
    if any(width % size for width in attending):
        raise DataError(
            f"{where}: attention_head_dim must divide the channels of each attention block, "
            f"{', '.join(map(str, sorted(attending)))}; got {size}"
        )
    return {"head_channels": size} if attending != {size} else {}


def _number(values: Mapping[str, Any], name: str, where: str) -> float:
    if type(values[name]) not in (int, float):
        raise DataError(f"{where}: {name} must be a number; got {values[name]!r:.100}")
    return float(values[name])


def write_unet(config: UNetConfig) -> dict[str, Any]:
    """Convert our network's configuration to a complete UNet2DModel configuration.

    Raises `UsageError`, naming the options, for a network that diffusers cannot express.
    """
    widths, attends = config.level_channels, config.attends
    attending = {width for width, attend in zip(widths, attends, strict=True) if attend}
    attending |= {widths[-1]} if config.middle_attention else set()
    sizes = {width // config.heads_of(width) for width in attending}
    problems = []
    if config.first_channels != widths[0]:
        problems.append(f"first_channels {config.first_channels} (diffusers: those of the first level)")
    if config.width != widths[0]:
        problems.append(f"width {config.width} (diffusers: the channels of the first level, {widths[0]})")
    if config.heads > 1 and len(sizes) > 1:
        problems.append(f"heads {config.heads} (diffusers: heads of one size; give head_channels)")
    if config.time_scale != 1:
        problems.append(f"time_scale {config.time_scale:g} (diffusers: 1)")
    refuse(f"a network with {each} is not written as a diffusers pipeline" for each in problems)
    one_head = all(config.heads_of(width) == 1 for width in attending)
    resnet = config.resample == "resblock"
    size = config.image_size
    values: dict[str, Any] = {name: needed.values[0] for name, needed in _NEEDED.items()} | {
        "sample_size": size if isinstance(size, int) else list(size),
        "in_channels": config.image_channels,
        "out_channels": config.image_channels * (1 + config.learned_variance),
        "block_out_channels": list(widths),
        "down_block_types": [_type_of(_DOWN, attend, resnet) for attend in attends],
        "up_block_types": [_type_of(_UP, attend, resnet) for attend in reversed(attends)],
        "layers_per_block": config.blocks,
        "dropout": config.dropout,
        "norm_num_groups": config.groups,
        "norm_eps": config.norm_eps,
        "attn_norm_num_groups": config.groups if config.scale_shift else None,
        "attention_head_dim": None if one_head else next(iter(sizes)),
        "add_attention": config.middle_attention,
        "num_class_embeds": (config.num_classes + (config.label_dropout > 0)) or None,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "downsample_padding": config.downsample_padding,
        "freq_shift": config.freq_shift,
        "time_embedding_dim": None,
        "num_train_timesteps": None,
    }
    return {"_class_name": "UNet2DModel", "_diffusers_version": VERSION} | dict(sorted(values.items()))


def _type_of(types: Mapping[str, tuple[bool, str | None]], attends: bool, resnet: bool) -> str:
    wanted = (attends, None if attends else "resnet" if resnet else "conv")
    return next(name for name, kind in types.items() if kind == wanted)


def check_agreement(
    preset: Preset, unet: UNetConfig, diffusion: DiffusionConfig, where: str, untold: Sequence[str] = ()
) -> None:
    """Raise `DataError` if fastddpm.json (`preset`) describes another model than diffusers' files (the other two).

    `untold`: fields of the scheduler that diffusers' file does not tell.
    """
    pairs = (
        (write_unet(preset.unet), write_unet(unet)),
        (write_scheduler(preset.diffusion), write_scheduler(diffusion)),
    )
    for ours, theirs in pairs:
        for name, value in ours.items():
            if theirs[name] != value and name not in untold:
                raise DataError(f"{where} has {name} = {value!r}, but the diffusers configuration has {theirs[name]!r}")


def _positive_list(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value or any(type(v) is not int or v < 1 for v in value):
        raise DataError(f"{where} must be a list of positive integers; got {value!r:.300}")
    return value
