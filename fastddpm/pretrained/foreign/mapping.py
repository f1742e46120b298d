"""From the tensors of another implementation's network to ours, by a family's table of names and layouts.

A family names the modules of our network in its own way. What the shapes tell of the configuration is inferred first;
then every tensor must be there, of the expected shape, and none be left over.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastddpm.config import UNetConfig
from fastddpm.errors import DataError
from fastddpm.unet import meta_network

from .layouts import SAME, Layout

_MOST_LEVELS, _MOST_BLOCKS = 12, 64  # as UNetConfig's
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Place(NamedTuple):
    """A module of our network: a residual block, an attention block, or a resampling convolution.

    `level` counts from 0, the full resolution, in both paths. `number`: that of the block in its level; of what
    resamples, the number of blocks before it.
    """

    kind: Literal["block", "attention", "conv"]
    path: Literal["down", "mid", "up"]
    level: int
    number: int
    ours: str

    @property
    def resamples(self) -> bool:
        """Whether the module changes the resolution."""
        return self.ours.endswith((".resample", ".resample.conv"))


class Row(NamedTuple):
    """One tensor of theirs, and those of ours that it holds."""

    theirs: str
    ours: Sequence[str]
    layout: Layout


@dataclass(frozen=True)
class Family:
    """How an implementation names and stores a network, and what is fixed in its code.

    `outer`: its names of time1, time2, label, conv_in, norm_out, conv_out. `block`, `attention`: its names of layers
    in a residual block and in an attention block, either q, k, v or their joint layer qkv. `name`: its names of the
    modules, given ours in the order of evaluation. `count`: the number of levels and of blocks per level, from all
    names, 0 if there are none; not needed if its files tell the configuration. `parameters`: its words for a layer's
    weight and bias, and for those of a norm. `layouts`: of weights, by kind: time1, conv, shortcut, linear, projection;
    those left out are as ours. `qkv`: the layout of joint layers for a number of heads. `fixed`: fields of UNetConfig
    that its code fixes; `tells`: those that its names tell.
    """

    outer: Mapping[str, str]
    block: Mapping[str, str]
    attention: Mapping[str, str]
    name: Callable[[Sequence[Place]], list[str]]
    count: Callable[[Sequence[str]], tuple[int, int]] = lambda names: (0, 0)
    parameters: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: {"layer": (".weight", ".bias"), "norm": (".weight", ".bias")}
    )
    separator: str = "."
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    qkv: Callable[[int], Layout] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tells: Callable[[Sequence[str]], Mapping[str, Any]] = lambda names: {}

    def parameter(self, layer: str, which: Literal["weight", "bias"], kind: str = "layer") -> str:
        """Return their name of a layer's weight or bias."""
        return layer + self.parameters[kind][which == "bias"]


def places(levels: int, blocks: int, attends: Sequence[bool], config: UNetConfig | None = None) -> list[Place]:
    """Return the modules of our network in the order of evaluation; `config` tells how it resamples (default conv)."""
    kind: Literal["block", "conv"] = "block" if config is not None and config.resample == "resblock" else "conv"
    suffix = ".conv" if kind == "conv" else ""
    found = []
    for path in ("down", "mid", "up"):
        if path == "mid":
            found.append(Place("block", "mid", levels - 1, 0, "mid.block1"))
            if config is None or config.middle_attention:
                found.append(Place("attention", "mid", levels - 1, 0, "mid.attention"))
            found.append(Place("block", "mid", levels - 1, 1, "mid.block2"))
            continue
        for number in range(levels):
            level = number if path == "down" else levels - 1 - number
            count = blocks + (path == "up")
            for i in range(count):
                found.append(Place("block", path, level, i, f"{path}.{number}.blocks.{i}"))
                if attends[level]:
                    found.append(Place("attention", path, level, i, f"{path}.{number}.attentions.{i}"))
            if number < levels - 1:
                found.append(Place(kind, path, level, count, f"{path}.{number}.resample{suffix}"))
    return found


def inferred(family: Family, tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Return the fields of UNetConfig that names and shapes tell, and `attends`: whether each level has attention.

    Raises `DataError`, naming a tensor, if one is missing that every network of the family has.
    """
    levels, blocks = family.count(list(tensors))
    if not 1 <= levels <= _MOST_LEVELS or not 1 <= blocks <= _MOST_BLOCKS:
        raise DataError(
            f"{where}: its tensors' names tell of {levels} levels with {blocks} residual blocks each; expected 1 to "
            f"{_MOST_LEVELS} levels of 1 to {_MOST_BLOCKS}"
        )

    def size(name: str, dimension: int) -> int:
        shape = tensors[name].shape if name in tensors else None
        if shape is None or len(shape) <= dimension:
            raise DataError(f"{where}: {name} is {'missing' if shape is None else f'of shape {tuple(shape)}'}")
        return shape[dimension]

    everywhere = places(levels, blocks, [True] * levels)
    named = dict(zip(everywhere, family.name(everywhere), strict=True))
    attention_layer = next(iter(family.attention.values()))
    attends, channels, double = [False] * levels, [0] * levels, False
    for place, name in named.items():
        if place.path != "down" or place.number:
            continue
        if place.kind == "attention":
            prefix = name + family.separator + attention_layer
            attends[place.level] = any(tensor.startswith(prefix) for tensor in tensors)
    exact = places(levels, blocks, attends)
    for place, name in zip(exact, family.name(exact), strict=True):
        if place.path == "down" and place.kind == "block" and place.number == 0:
            layer = name + family.separator
            channels[place.level] = size(family.parameter(layer + family.block["conv2"], "bias"), 0)
            projected = size(family.parameter(layer + family.block["temb_proj"], "bias"), 0)
            double = projected == 2 * channels[place.level]
    first = size(family.parameter(family.outer["conv_in"], "bias"), 0)
    conv_in = family.parameter(family.outer["conv_in"], "weight")
    if size(conv_in, 0) and tensors[conv_in].ndim != 4:
        raise DataError(f"{where}: {conv_in} is of shape {tuple(tensors[conv_in].shape)}; expected a convolution's")
    image_channels = family.layouts.get("conv", SAME).read(tensors[conv_in])[0].shape[1]
    time = size(family.parameter(family.outer["time1"], "bias"), 0)
    width = time // 4
    plain = width > 0 and first == width and all(count % width == 0 for count in channels)
    fields: dict[str, Any] = (
        dict(family.fixed)
        | dict(family.tells(list(tensors)))
        | {
            "image_channels": image_channels,
            "width": width,
            "blocks": blocks,
            "attends": attends,
            "scale_shift": double,
            "learned_variance": size(family.parameter(family.outer["conv_out"], "bias"), 0) == 2 * image_channels,
        }
    )
    if plain:
        fields["multipliers"] = tuple(count // width for count in channels)
    else:
        fields["channels"] = tuple(channels)
    label = family.outer.get("label")
    if label is not None and f"{label}.weight" in tensors:
        fields["num_classes"] = size(f"{label}.weight", 0)
    return fields


def rows(family: Family, config: UNetConfig) -> Iterator[Row]:
    """Yield the table for a network of `config`: every tensor of theirs once, every one of ours once."""
    for ours, theirs in family.outer.items():
        if ours == "label":
            if config.num_classes:
                yield Row(f"{theirs}.weight", ["label.weight"], SAME)
        else:
            kind = {"time1": "time1", "time2": "linear", "norm_out": "norm"}.get(ours, "conv")
            yield from _layer(family, theirs, ours, kind)
    modules = places(len(config.level_channels), config.blocks, config.attends, config)
    channels, before = config.level_channels, config.first_channels
    for place, theirs in zip(modules, family.name(modules), strict=True):
        if place.kind == "conv":
            yield from _layer(family, theirs, place.ours, "conv")
        elif place.kind == "attention":
            yield from _attention_rows(family, place, theirs, config.heads_of(channels[place.level]))
        else:
            shortcut = place.path == "up" or (place.path == "down" and before != channels[place.level])
            yield from _block_rows(family, place, theirs, shortcut=shortcut and not place.resamples)
            before = channels[place.level]


def _block_rows(family: Family, place: Place, theirs: str, *, shortcut: bool) -> Iterator[Row]:
    for layer, name in family.block.items():
        if layer == "shortcut" and not shortcut:
            continue
        kind = {"norm1": "norm", "norm2": "norm", "temb_proj": "linear", "shortcut": "shortcut"}.get(layer, "conv")
        yield from _layer(family, theirs + family.separator + name, f"{place.ours}.{layer}", kind)


def _attention_rows(family: Family, place: Place, theirs: str, heads: int) -> Iterator[Row]:
    for layer, name in family.attention.items():
        full = theirs + family.separator + name
        if layer == "qkv":
            assert family.qkv is not None  # a family with the joint layer says how it is laid out
            for which in ("weight", "bias"):
                ours = [f"{place.ours}.{part}.{which}" for part in "qkv"]
                yield Row(family.parameter(full, which), ours, family.qkv(heads))
        else:
            yield from _layer(family, full, f"{place.ours}.{layer}", "norm" if layer == "norm" else "projection")


def _layer(family: Family, theirs: str, ours: str, kind: str) -> Iterator[Row]:
    words = "norm" if kind == "norm" else "layer"
    layout = family.layouts.get(kind, SAME)
    yield Row(family.parameter(theirs, "weight", words), [f"{ours}.weight"], layout)
    yield Row(family.parameter(theirs, "bias", words), [f"{ours}.bias"], SAME)


def converted(family: Family, config: UNetConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the weights of our network, float32, by our names.

    Raises `DataError`, naming tensors and what is expected, for tensors that are missing, left over, of another shape
    or type, or not finite.
    """
    expected = meta_network(config).state_dict()
    table = list(rows(family, config))
    problems = [f"{row.theirs} is missing" for row in table if row.theirs not in tensors]
    known = {row.theirs for row in table}
    problems += [f"{name} belongs to no layer" for name in tensors if name not in known]
    weights: dict[str, Tensor] = {}
    for row in table:
        if row.theirs not in tensors:
            continue
        tensor = tensors[row.theirs]
        shape = tuple(row.layout.write([expected[name] for name in row.ours]).shape)
        if tuple(tensor.shape) != shape:
            problems.append(f"{row.theirs} is of shape {tuple(tensor.shape)}, expected {shape}")
        elif tensor.dtype not in _FLOATS:
            problems.append(f"{row.theirs} is {str(tensor.dtype).removeprefix('torch.')}, expected floating numbers")
        elif not bool((numbers := tensor.to(torch.float32)).isfinite().all()):
            problems.append(f"{row.theirs} has numbers that are not finite in float32; expected finite ones")
        else:
            parts = row.layout.read(numbers)
            weights |= {name: part.contiguous() for name, part in zip(row.ours, parts, strict=True)}
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"{where}: the tensors do not fit the network: {'; '.join(problems[:3])}{more}")
    return weights
