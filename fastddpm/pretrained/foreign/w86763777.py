"""Checkpoints of https://github.com/w86763777/pytorch-ddpm."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from .format import Format, Published, paper_diffusion, paper_image_size
from .layouts import INTERLEAVED, PIXEL_2D
from .mapping import Family, Place


def name(places: Sequence[Place]) -> list[str]:
    """Return their names of modules: one list for each path, of blocks, with their attention, and of resampling."""
    named, numbers = [], {"down": -1, "mid": -1, "up": -1}
    for place in places:
        numbers[place.path] += place.kind != "attention"
        item = f"{'middle' if place.path == 'mid' else place.path}blocks.{numbers[place.path]}"
        named.append(item + {"block": "", "attention": ".attn", "conv": ".main"}[place.kind])
    return named


def count(names: Sequence[str]) -> tuple[int, int]:
    """Return the number of levels and of blocks per level."""
    levels = 1 + sum(bool(re.fullmatch(r"downblocks\.\d+\.main\.weight", each)) for each in names)
    blocks = sum(bool(re.fullmatch(r"downblocks\.\d+\.block1\.2\.weight", each)) for each in names)
    return levels, blocks // levels


FAMILY = Family(
    outer={
        "time1": "time_embedding.timembedding.1",
        "time2": "time_embedding.timembedding.3",
        "conv_in": "head",
        "norm_out": "tail.0",
        "conv_out": "tail.2",
    },
    block={
        "norm1": "block1.0",
        "conv1": "block1.2",
        "temb_proj": "temb_proj.1",
        "norm2": "block2.0",
        "conv2": "block2.3",
        "shortcut": "shortcut",
    },
    attention={"norm": "group_norm", "q": "proj_q", "k": "proj_k", "v": "proj_v", "proj": "proj"},
    name=name,
    count=count,
    layouts={"projection": PIXEL_2D, "time1": INTERLEAVED},
    fixed={"groups": 32, "norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0},
)


def image_size(attends: Sequence[bool], others: Mapping[str, Tensor]) -> int | None:
    """Return the image size from x_T, the noise of the previews, (N, 3, size, size); without one as for the paper."""
    noise = others.get("x_T")
    return noise.shape[3] if noise is not None and noise.ndim == 4 else paper_image_size(attends, others)


FORMAT = Format(
    name="w86763777",
    repository="https://github.com/w86763777/pytorch-ddpm",
    files="ckpt.pt",
    signature=("time_embedding.timembedding.1.weight", "head.weight", "downblocks.0.block1.2.weight"),
    family=lambda options: FAMILY,
    diffusion=paper_diffusion,
    sets={"average": "ema_model/", "raw": "net_model/"},
    ignored=("time_embedding.timembedding.0.weight",),  # the sinusoids
    published={
        "w86763777/cifar10": Published(
            {"image_size": 32, "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "dropout": 0.1},
            {"variance": "fixedlarge"},
        )
    },
    image_size=image_size,
)
