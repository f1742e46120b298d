"""diffusers' names of the network's tensors, as a table for both reading and writing."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from fastddpm.config import UNetConfig

from .foreign.layouts import COSINES_FIRST
from .foreign.mapping import Family, Place, rows

_PARTS = {"block": "resnets", "attention": "attentions"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _name(places: Sequence[Place]) -> list[str]:
    """Return their names of modules, whose levels count in the order of evaluation, as ours."""
    named = []
    for place in places:
        if place.path == "mid":
            named.append(f"mid_block.{_PARTS[place.kind]}.{place.number}")
            continue
        number = place.ours.split(".")[1]
        level = f"{place.path}_blocks.{number}"
        if place.resamples:
            named.append(f"{level}.{place.path}samplers.0{'.conv' if place.kind == 'conv' else ''}")
        else:
            named.append(f"{level}.{_PARTS[place.kind]}.{place.number}")
    return named


def family(*, cosines_first: bool = False) -> Family:
    """Return the table; `cosines_first`: whether the time embedding has cosines before sines."""
    return Family(
        outer={
            "time1": "time_embedding.linear_1",
            "time2": "time_embedding.linear_2",
            "label": "class_embedding",
            "conv_in": "conv_in",
            "norm_out": "conv_norm_out",
            "conv_out": "conv_out",
        },
        block={
            "norm1": "norm1",
            "conv1": "conv1",
            "temb_proj": "time_emb_proj",
            "norm2": "norm2",
            "conv2": "conv2",
            "shortcut": "conv_shortcut",
        },
        attention={"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"},
        name=_name,
        layouts={"time1": COSINES_FIRST} if cosines_first else {},
    )


def their_names(config: UNetConfig) -> dict[str, str]:
    """Return diffusers' name of each of our parameters."""
    return {row.ours[0]: row.theirs for row in rows(family(), config)}


def theirs(config: UNetConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights by diffusers' names, with sines before cosines."""
    return {row.theirs: row.layout.write([weights[name] for name in row.ours]) for row in rows(family(), config)}


def renewed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by today's names: attention layers had others once, and were convolutions of one pixel."""
    return dict(map(_renewed, tensors.items()))


def _renewed(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    name, tensor = item
    match = re.fullmatch(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    if match:
        name = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
    projection = re.fullmatch(r".*attentions\.\d+\.to_(q|k|v|out\.0)\.weight", name)
    if projection and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return name, tensor
