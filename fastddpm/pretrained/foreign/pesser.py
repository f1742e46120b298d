"""The paper's checkpoints as PyTorch files: https://github.com/pesser/pytorch_diffusion."""

from collections.abc import Sequence
from typing import Any

from . import hojonathanho
from .format import Format, Published, paper_diffusion, paper_image_size
from .layouts import PIXEL_2D
from .mapping import Family, Place


def name(places: Sequence[Place]) -> list[str]:
    """Return their names of modules: TensorFlow's with dots, and numbers as items of a list."""
    return [
        each.replace("/", ".") if place.path == "mid" else each.replace("/", ".").replace("_", ".")
        for place, each in zip(places, hojonathanho.name(places), strict=True)
    ]


def count(names: Sequence[str]) -> tuple[int, int]:
    """Return the number of levels and of blocks per level."""
    ends = ".conv1.weight"
    parts = [each.removesuffix(ends).split(".") for each in names if each.endswith(ends)]
    theirs = [f"down_{p[1]}/block_{p[3]}/conv1/W" for p in parts if len(p) == 4 and (p[0], p[2]) == ("down", "block")]
    return hojonathanho.count(theirs)


FAMILY = Family(
    outer={**hojonathanho.FAMILY.outer, "time1": "temb.dense.0", "time2": "temb.dense.1"},
    block=hojonathanho.FAMILY.block,
    attention=hojonathanho.FAMILY.attention,
    name=name,
    count=count,
    layouts={"projection": PIXEL_2D},
    fixed={"groups": 32},
)

_CIFAR10: dict[str, Any] = dict(image_size=32, width=128, multipliers=(1, 2, 2, 2), blocks=2)
_LSUN: dict[str, Any] = dict(image_size=256, width=128, multipliers=(1, 1, 2, 2, 4, 4), blocks=2)
_PUBLISHED = {"cifar10": Published(_CIFAR10 | {"dropout": 0.1}, {"variance": "fixedlarge"})} | {
    f"lsun_{kind}": Published(_LSUN, {"variance": "fixedsmall"}) for kind in ("bedroom", "cat", "church")
}

FORMAT = Format(
    name="pesser",
    repository="https://github.com/pesser/pytorch_diffusion",
    files="diffusion_*_model-N.ckpt and ema_diffusion_*_model-N.ckpt",
    signature=("temb.dense.0.weight", "conv_in.weight", "down.0.block.0.conv1.weight"),
    family=lambda options: FAMILY,
    diffusion=paper_diffusion,
    published={f"pesser/{prefix}{name}": model for name, model in _PUBLISHED.items() for prefix in ("", "ema_")},
    image_size=paper_image_size,
)
