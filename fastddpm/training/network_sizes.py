"""The networks that --network names: their widths and depths by image size, and the memory that training takes.

Imports no torch.
"""

import dataclasses
from typing import Literal, NamedTuple

from fastddpm.config import UNetConfig
from fastddpm.presets import PRESETS
from fastddpm.runtime.image_size import ImageSize, sides

NetworkSize = Literal["tiny", "small", "base", "paper"]
# Channels of each level as multiples of the width, by the number of levels; the last two are the paper's for 128 and
# 256 pixels.
_MULTIPLIERS = {1: (1,), 2: (1, 2), 3: (1, 2, 4), 4: (1, 2, 4, 4), 5: (1, 1, 2, 2, 4), 6: (1, 1, 2, 2, 4, 4)}
_LOWEST_MAP = 8


class Size(NamedTuple):
    """A network's width, blocks per level, dropout and learning rate."""

    width: int
    blocks: int
    dropout: float
    lr: float


NETWORK_SIZES: dict[NetworkSize, Size] = {
    "tiny": Size(16, 1, 0.0, 1e-3),
    "small": Size(64, 2, 0.1, 5e-4),
    "base": Size(96, 2, 0.1, 3e-4),
    "paper": Size(128, 2, 0.1, 2e-4),
}


def unet_of(network: NetworkSize, image_size: ImageSize, channels: int, num_classes: int) -> UNetConfig:
    """Return the network called `network` for images of this size.

    A level is added while the lowest feature map can be halved to 8 pixels or more on both sides; attention is at the
    largest map of at most 16. `paper` is the paper's own network for 32 and 256 pixels. Raises `UsageError` for
    impossible values.
    """
    labels = {"num_classes": num_classes, "label_dropout": 0.1 if num_classes else 0.0}
    own = {32: PRESETS["cifar10"], 256: PRESETS["lsun256"]}.get(image_size) if isinstance(image_size, int) else None
    if network == "paper" and own is not None:
        return dataclasses.replace(own.unet, image_channels=channels, **labels)  # type: ignore[arg-type]
    maps = [sides(image_size)]
    while all(side % 2 == 0 and side // 2 >= _LOWEST_MAP for side in maps[-1]) and len(maps) < len(_MULTIPLIERS):
        height, across = maps[-1]
        maps.append((height // 2, across // 2))
    width, blocks, dropout, _ = NETWORK_SIZES[network]
    return UNetConfig(
        image_size=image_size,
        image_channels=channels,
        width=width,
        multipliers=_MULTIPLIERS[len(maps)],
        blocks=blocks,
        attention_resolutions=tuple(height for height, across in maps if max(height, across) <= 16)[:1],
        dropout=dropout,
        groups=8 if width < 64 else 32,
        **labels,  # type: ignore[arg-type]
    )


def bytes_per_image(unet: UNetConfig) -> int:
    """Return about how many bytes of float32 activations the backward pass of one image needs, seldom too few.

    Eight feature maps of each residual block, down and up, and where attention follows it six more, or ten if it has
    several heads.
    """
    blocks, total = 2 * unet.blocks + 1, 0
    _, height, width = unet.image_shape
    levels = list(zip(unet.level_channels, unet.attends, strict=True))
    for i, (channels, attends) in enumerate(levels):
        pixels = (height >> i) * (width >> i)
        attention = 0 if not attends else 6 if unet.heads_of(channels) == 1 else 10
        total += blocks * (8 + attention) * pixels * channels
        if unet.resample == "resblock":  # on the way up to this level, and down to it
            from_below = levels[i + 1][0] if i + 1 < len(levels) else 0
            from_above = levels[i - 1][0] if i else 0
            total += 8 * pixels * (from_below + from_above)
    return 4 * total
