"""What a feature network is to the metrics, and how one with known weights is called."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastddpm.errors import UsageError

_AT_ONCE = 64  # images: a large network at 299x299 keeps some 20 MB of each


class Activations(NamedTuple):
    """Of N images: `features` float32 (N, d), and `logits` float32 (N, K) of a network that tells classes apart."""

    features: Tensor
    logits: Tensor | None


class FeatureNetwork(Protocol):
    """What turns images into the features that are compared. Any object with these will do.

    `name`: for people and file names. `checksum`: sha256 of the weights, hexadecimal, stored with every score.
    `dimension`: d. `classes`: K, 0 without. `is_inception`: whether a score from it may be called FID.
    """

    @property
    def name(self) -> str: ...
    @property
    def checksum(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def classes(self) -> int: ...
    @property
    def is_inception(self) -> bool: ...

    def __call__(self, images: Tensor) -> Activations:
        """Features of images uint8 (N, C, H, W), on whatever device they are."""
        ...


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A `FeatureNetwork` from a module that maps uint8 (N, `channels`, H, W) to features and logits.

    Grey images are given to a network for colour as three equal channels. Images go through 64 at a time in float32,
    without TF32. Raises `UsageError` for images of another kind.
    """

    name: str
    checksum: str
    dimension: int
    classes: int
    is_inception: bool
    channels: int
    module: nn.Module

    def __call__(self, images: Tensor) -> Activations:
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, self.channels):
            raise UsageError(
                f"network {self.name} takes images uint8 (N, {self.channels}, H, W); "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        images = images.expand(-1, self.channels, -1, -1)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            parts = [self.module(part) for part in images.split(_AT_ONCE)]
        features, logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Activations(features, logits)
