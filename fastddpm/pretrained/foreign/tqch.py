"""Checkpoints of https://github.com/tqch/ddpm-torch."""

import re
from collections.abc import Sequence
from typing import Any

from .format import Format, Published, paper_diffusion, paper_image_size
from .layouts import PIXEL_2D, joined
from .mapping import Family, Place


def name(places: Sequence[Place]) -> list[str]:
    """Return their names of modules. A block and its attention are a pair where the level has attention."""
    attends = {(place.path, place.level) for place in places if place.kind == "attention"}
    named = []
    for place in places:
        if place.path == "mid":
            named.append(f"middle.{1 if place.kind == 'attention' else 2 * place.number}")
            continue
        item = f"{place.path}samples.level_{place.level}.{place.number}"
        if place.kind == "block" and (place.path, place.level) in attends:
            item += ".0"
        elif place.kind != "block":  # after padding or doubling, or after the block
            item += ".1"
        named.append(item)
    return named


def count(names: Sequence[str]) -> tuple[int, int]:
    """Return the number of levels and of blocks per level."""
    pattern = r"downsamples\.level_(\d{1,3})\.(\d{1,3})\.(?:0\.)?conv1\.weight"
    found = [match for each in names if (match := re.fullmatch(pattern, each))]
    return tuple(max((int(match[i]) for match in found), default=-1) + 1 for i in (1, 2))  # type: ignore[return-value]


FAMILY = Family(
    outer={
        "time1": "embed.0",
        "time2": "embed.2",
        "conv_in": "in_conv",
        "norm_out": "out_conv.0",
        "conv_out": "out_conv.2",
    },
    block={layer: layer for layer in ("norm1", "conv1", "norm2", "conv2")} | {"temb_proj": "fc", "shortcut": "skip"},
    attention={"norm": "norm", "qkv": "project_in", "proj": "project_out"},
    name=name,
    count=count,
    layouts={"projection": PIXEL_2D},
    qkv=lambda heads: joined(),
    fixed={"groups": 32},
)

_SMALL: dict[str, Any] = dict(width=128, multipliers=(1, 2, 2, 2), blocks=2)

FORMAT = Format(
    name="tqch",
    repository="https://github.com/tqch/ddpm-torch",
    files="NAME_N.pt",
    signature=("embed.0.weight", "in_conv.weight", "downsamples.level_0.0"),
    family=lambda options: FAMILY,
    diffusion=paper_diffusion,
    sets={"average": "ema/shadow/", "raw": "model/"},
    published={
        "tqch/cifar10": Published(_SMALL | {"image_size": 32, "dropout": 0.1}, {"variance": "fixedlarge"}),
        "tqch/celeba": Published(_SMALL | {"image_size": 64}, {"variance": "fixedsmall"}),
        "tqch/celebahq": Published(
            {"width": 128, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 2, "image_size": 256},
            {"variance": "fixedsmall"},
        ),
    },
    image_size=paper_image_size,
)
