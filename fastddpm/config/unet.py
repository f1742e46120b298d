"""Configuration of the U-Net."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Suppress, arg

from fastddpm.errors import refuse
from fastddpm.runtime.checks import choice_problems, positive, range_problems
from fastddpm.runtime.image_size import ImageSize, image_size, sides

_MAX_WIDTH, _MAX_MULTIPLIER = 4096, 64


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net. Without a preset the defaults are the paper's CIFAR-10 model."""

    image_size: Annotated[ImageSize, arg(metavar="N [N]")] = 32
    """Height and width of the images in pixels, one number if they are equal; must be divisible by 2^(levels - 1)."""
    image_channels: int = 3
    """Channels of the images: 1 for grey, 3 for colour."""
    width: int = 128
    """Channels of the first level; even, at least 4."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, as multiples of width. Every level but the last ends with a downsampling by 2."""
    blocks: int = 2
    """Residual blocks per level of the downsampling path; the upsampling path has one more."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Heights of feature maps, in pixels, at which attention follows every residual block."""
    dropout: float = 0.1
    """Dropout probability, between the second SiLU and the second convolution of each residual block."""
    groups: int = 32
    """Groups of each GroupNorm; must divide the width and every level's channels."""
    num_classes: int = 0
    """Number of classes of a class-conditional model. 0: no labels."""
    label_dropout: float = 0.0
    """Fraction of training labels that are replaced by "no label". Classifier-free guidance needs more than 0."""
    learned_variance: Annotated[bool, Suppress] = False
    """Whether the output has C more channels, for the variance. Set from the diffusion's variance."""
    channels: tuple[int, ...] | None = None
    """Channels of each level, in place of multipliers, which are then ignored. The first convolution has those of the
    first level, and width is only that of the time embedding. Default: multiples of width."""
    middle_attention: bool = True
    """Attention between the two middle blocks."""
    heads: int = 1
    """Heads of each attention block, which divide its channels."""
    head_channels: int | None = None
    """Channels of each attention head, in place of heads. Default: those of the feature map divided by heads."""
    scale_shift: bool = False
    """Let the time embedding scale and shift the second norm's output, (1 + scale) y + shift. Default: it is added
    before that norm."""
    resample: Literal["conv", "resblock"] = "conv"
    """Down- and upsampling: a convolution, or a residual block that averages or doubles pixels (resblock)."""
    downsample_padding: Literal[0, 1] = 0
    """Zeros at the top and left of a downsampling convolution, besides one at the bottom and right. 0 is the paper's, 1
    that of most PyTorch code."""
    norm_eps: float = 1e-6
    """Epsilon of each GroupNorm. Other code often has 1e-5."""
    freq_shift: Literal[0, 1] = 1
    """The time embedding's frequencies are 10000^(-i / (width / 2 - freq_shift)). 1 is the paper's, 0 OpenAI's."""
    time_scale: float = 1.0
    """Factor of t before the time embedding, as 1000 / T for OpenAI's rescaled timesteps."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", image_size(self.image_size))
        if self.channels is not None:  # the one representation of such a network
            object.__setattr__(self, "multipliers", ())
        refuse(self._problems())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.image_channels, *sides(self.image_size)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, that of the full resolution first."""
        if self.channels is not None:
            return self.channels
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def first_channels(self) -> int:
        """Channels after the first convolution."""
        return self.width if self.channels is None else self.channels[0]

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether attention follows the residual blocks of each level."""
        height = self.image_shape[1]
        return tuple(height >> i in self.attention_resolutions for i in range(len(self.level_channels)))

    def heads_of(self, channels: int) -> int:
        """Return the number of heads of an attention block with `channels`."""
        return self.heads if self.head_channels is None else channels // self.head_channels

    def _problems(self) -> Iterator[str]:
        sizes = list(self._impossible_sizes())
        yield from sizes or self._misfits()
        yield from range_problems(self, "dropout", 0.0, 0.999)
        yield from range_problems(self, "label_dropout", 0.0, 1.0)
        if self.num_classes < 0:
            yield f"num_classes must be 0 or more; got {self.num_classes}"
        if self.label_dropout > 0 and self.num_classes == 0:
            yield "label_dropout needs num_classes > 0"
        for name in ("resample", "downsample_padding", "freq_shift"):
            yield from choice_problems(self, name)
        if not 0 < self.norm_eps < 1:
            yield f"norm_eps must be in (0, 1); got {self.norm_eps}"
        if not 0 < self.time_scale < math.inf:
            yield f"time_scale must be positive and finite; got {self.time_scale}"
        if self.heads > 1 and self.head_channels is not None:
            yield f"heads and head_channels exclude each other; got {self.heads} and {self.head_channels}"

    def _impossible_sizes(self) -> Iterator[str]:
        yield from positive(self, "image_channels", "width", "blocks", "groups", "heads")
        if self.head_channels is not None:
            yield from positive(self, "head_channels")
        size = self.image_size
        lengths: tuple[int, ...] = ()
        if isinstance(size, int) or (isinstance(size, tuple) and [type(side) for side in size] == [int, int]):
            lengths = sides(size)
            if min(lengths) < 1:
                yield f"image_size must be positive; got {size}"
        else:
            yield f"image_size must be an integer, or a height and a width; got {size!r:.100}"
        levels, name = (self.multipliers, "multiplier") if self.channels is None else (self.channels, "level")
        if not levels or min(levels) < 1:
            yield (
                f"{'multipliers' if self.channels is None else 'channels'} must be one or more positive integers; "
                f"got {levels}"
            )
        most = {
            "image_size": (max(lengths, default=0), 4096),
            "image_channels": (self.image_channels, 64),
            "width": (self.width, _MAX_WIDTH),
            "blocks": (self.blocks, 64),
            "levels": (len(levels), 12),
            f"the largest {name}": (
                max(levels, default=0),
                _MAX_MULTIPLIER if self.channels is None else _MAX_MULTIPLIER * _MAX_WIDTH,
            ),
            "num_classes": (self.num_classes, 1_000_000),
        }
        for limited, (value, limit) in most.items():
            if value > limit:
                yield f"{limited} must be at most {limit}; got {value}"

    def _misfits(self) -> Iterator[str]:
        if self.width % 2 or self.width < 4:
            yield f"width must be even and at least 4 (the time embedding halves it); got {self.width}"
        levels = len(self.level_channels)
        if any(side % 2 ** (levels - 1) for side in self.image_shape[1:]):
            yield f"image_size must be divisible by {2 ** (levels - 1)} for {levels} levels; got {self.image_size}"
        for channels in (self.first_channels, *self.level_channels):
            if channels % self.groups:
                yield f"groups must divide each level's channels; {self.groups} does not divide {channels}"
        split, name = (self.heads, "heads") if self.head_channels is None else (self.head_channels, "head_channels")
        attending = [channels for channels, attends in zip(self.level_channels, self.attends, strict=True) if attends]
        for channels in [*attending, *([self.level_channels[-1]] if self.middle_attention else [])]:
            if channels % split:
                yield f"{name} must divide the channels of each attention block; {split} does not divide {channels}"
