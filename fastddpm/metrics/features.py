"""The interface of feature networks, and the class that runs one from its module."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastddpm.errors import UsageError

_AT_ONCE = 64  # images per forward pass: a large network at 299x299 needs about 20 MB for each


class Activations(NamedTuple):
    """Outputs for N images: `features` float32 (N, d); `logits` float32 (N, K), None if the network has no classes."""

    features: Tensor
    logits: Tensor | None


class FeatureNetwork(Protocol):
    """A network that computes the features that scores compare. Any object with these attributes will do.

    `name`: shown to people and used in file names. `checksum`: sha256 of the weights, hexadecimal, stored with every
    score. `dimension`: d. `classes`: K, 0 if the network has no logits. `is_inception`: whether it is the published
    Inception network, whose scores are called FID, IS and KID.
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
        """Compute the features of images uint8 (N, C, H, W), on the device that they are on."""
        ...


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A `FeatureNetwork` from a module that maps uint8 (N, `channels`, H, W) to features and logits.

    Grey images are repeated to the network's three channels. Images are evaluated 64 at a time in float32, without
    TF32. A call raises `UsageError` for images of another dtype, rank or number of channels.
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
