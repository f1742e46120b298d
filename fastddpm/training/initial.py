"""A run that begins with another model's weights (--init): what may differ from that model, and its weights fitted.

Imports torch only if there is such a model.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastddpm.config import Preset, UNetConfig
from fastddpm.errors import UsageError
from fastddpm.runtime.image_size import size_text
from fastddpm.runtime.progress import announced
from fastddpm.storage.documents import difference

if TYPE_CHECKING:
    from torch import Tensor

    from fastddpm.unet import UNet

_OF_THE_WEIGHTS = (  # what they were trained with; the tensors of some of these would fit others
    "image_channels", "width", "multipliers", "channels", "blocks", "groups", "learned_variance", "middle_attention",
    "heads", "head_channels", "scale_shift", "resample", "downsample_padding", "norm_eps", "freq_shift", "time_scale",
)  # fmt: skip
_TABLE = "label.weight"


@dataclass(frozen=True)
class Origin:
    """origin.json of a checkpoint: the model that the run began with.

    `source`: what --init named. `sha256`: of its weights. `steps`: the training steps that they had taken, if known.
    """

    source: str
    sha256: str
    steps: int | None = None


def preset_of_model(source: str | None) -> Preset | None:
    """Return the configuration of the model that --init names; None without one. Raises as `pretrained.load`."""
    if source is None:
        return None
    from fastddpm.pretrained import read_preset

    return read_preset(source)


def starting_preset(model: Preset, base: Preset, *, chosen: bool) -> Preset:
    """Return the configuration that a run starts from: `base` with network and diffusion of a model.

    `chosen`: whether the user chose `base`; otherwise training and sampling are as in the model's own configuration.
    """
    if not chosen:
        return model
    sample = base.sample if model.unet.label_dropout else dataclasses.replace(base.sample, guidance=1.0)
    return Preset(base.name, model.unet, model.diffusion, base.train, sample)


def fitted(wanted: UNetConfig, of_model: UNetConfig) -> UNetConfig:
    """Return `wanted` with attention at the levels where the model has it, whatever the image size.

    Raises `UsageError`, with both values, for a network that the model's weights do not fit.
    """
    wrong = [
        f"{name} is {getattr(of_model, name)} in the model and {getattr(wanted, name)} here"
        for name in _OF_THE_WEIGHTS
        if getattr(of_model, name) != getattr(wanted, name)
    ]
    if wrong:
        raise UsageError(
            f"the weights that --init names do not fit: {'; '.join(wrong)}. Leave these options out, or --init"
        )
    levels = attention_levels(of_model)
    if attention_levels(wanted) == levels:
        return wanted
    heights = tuple(wanted.image_shape[1] >> level for level in levels)
    if wanted.attention_resolutions != of_model.attention_resolutions:
        raise UsageError(
            f"for images of {_pixels(wanted)} pixels the weights that --init names have attention at "
            f"{_named(wanted, heights)}, not at {_named(wanted, wanted.attention_resolutions)}; leave "
            "--attention-resolutions out"
        )
    return dataclasses.replace(wanted, attention_resolutions=heights)


def attention_levels(config: UNetConfig) -> list[int]:
    """Return the levels, 0 for the full resolution, whose residual blocks are followed by attention."""
    return [i for i, attends in enumerate(config.attends) if attends]


def begin(
    source: str | None, wanted: Preset, report: Callable[[str], None]
) -> "tuple[UNet, Origin] | tuple[None, None]":
    """Read the model `source` and return a network of `wanted.unet` with its weights, and what is recorded of it.

    `report` gets a line for all that differs from the model. Without a source there is neither. Raises as
    `pretrained.load`, and `UsageError` if the weights do not fit.
    """
    if source is None:
        return None, None
    from fastddpm import pretrained
    from fastddpm.runtime.network import checksum
    from fastddpm.unet import network_with

    with announced(f"reading {source}", report):
        model = pretrained.load(source)
    old, new = model.preset.unet, fitted(wanted.unet, model.preset.unet)
    origin = Origin(source, checksum(model.unet), model.steps)
    taken = "" if model.steps is None else f" after {model.steps:,} steps"
    report(f"beginning with the weights of {source}{taken}, sha256 {origin.sha256[:12]}")
    if old.image_size != new.image_size:
        report(
            f"images of {_pixels(new)} pixels instead of {_pixels(old)}; attention stays at the same levels, "
            f"{_named(new, tuple(new.image_shape[1] >> level for level in attention_levels(new)))}"
        )
    process = difference(model.preset.diffusion, wanted.diffusion)
    if process:
        report(f"note: the weights were trained for another diffusion: {'; '.join(process)}")
    weights = dict(model.unet.state_dict())
    line = _fit_classes(weights, old, new)
    if line is not None:
        report(line)
    return network_with(new, weights).requires_grad_(True), origin


def _fit_classes(weights: "dict[str, Tensor]", old: UNetConfig, new: UNetConfig) -> str | None:
    """Replace the table of classes in `weights` by one of `new`, and return a line about it; None if it stays.

    New rows are that of "no label", or if there is none the mean of all, so that the network first draws what it drew
    without a class.
    """
    import torch

    null, wants_null = old.label_dropout > 0, new.label_dropout > 0
    if (old.num_classes, null) == (new.num_classes, wants_null):
        return None
    table = weights.pop(_TABLE, None)
    if table is None:
        neutral = torch.zeros_like(weights["time2.bias"])
    else:
        neutral = table[old.num_classes] if null else table.mean(0)
    if not new.num_classes:
        weights["time2.bias"] = weights["time2.bias"] + neutral
        return f"without classes, of which the model has {old.num_classes}: it draws as it did without a label"
    if table is not None and old.num_classes == new.num_classes:
        rows, line = table[: old.num_classes], f'the label "no label" is {"new" if wants_null else "left out"}'
    else:
        rows = neutral.expand(new.num_classes, -1)
        line = f"the table of {new.num_classes} classes is new; the model has {old.num_classes}"
    weights[_TABLE] = torch.cat([rows, neutral.unsqueeze(0)]) if wants_null else rows.clone()
    return line


def _pixels(config: UNetConfig) -> str:
    return str(config.image_size) if isinstance(config.image_size, int) else size_text(config.image_size)


def _named(config: UNetConfig, heights: tuple[int, ...]) -> str:
    """Name the feature maps of these heights."""
    _, height, width = config.image_shape
    return ", ".join(size_text((map_height, map_height * width // height)) for map_height in heights) or "no resolution"
