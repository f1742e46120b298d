"""The Inception network of FID, Inception-v3 as in the graph of 2015-12-05, and the search for its weights.

Layers have the names of the published PyTorch file, pt_inception-2015-12-05-6726825d.pth. Three details differ from
other versions of Inception, and each changes scores by whole points: images are resized as TensorFlow 1 did, average
pools leave the padding out of the average, and the last block uses a maximum pool.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastddpm.data.cache import default_directory

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE = "pt_inception-2015-12-05-6726825d.pth"
_OTHER_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the same file under torch-fidelity's name
DIMENSION, CLASSES = 2048, 1008
_SIZE = 299

Kernel = int | tuple[int, int]


class Step(NamedTuple):
    """A convolution of a branch, with its name in the weights file."""

    name: str
    channels: int
    kernel: Kernel = 1
    stride: int = 1


class Branch(NamedTuple):
    """A `trunk` of consecutive steps, then one or two `heads` on its output, whose outputs are concatenated."""

    trunk: tuple[Step, ...]
    heads: tuple[Step, ...]


def _chain(*steps: Step) -> Branch:
    return Branch(steps[:-1], steps[-1:])


def _forked(*steps: Step) -> Branch:
    return Branch(steps[:-2], steps[-2:])


class Convolution(nn.Module):
    """Convolution, batch normalization, ReLU. Padded to keep the size only if the stride is 1 and `pad` is True."""

    def __init__(self, in_channels: int, channels: int, kernel: Kernel, stride: int = 1, *, pad: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_channels, channels, (height, width), stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches and a pooling branch, concatenated.

    `pool`: "average" and "max" keep the size, "reduce" halves it. `pooled`: channels of the convolution after the
    pool, 0 for no convolution.
    """

    def __init__(self, in_channels: int, branches: tuple[Branch, ...], pool: str, pooled: int) -> None:
        super().__init__()
        self._branches, self._pool, self._pooled = branches, pool, pooled
        for branch in branches:
            channels = in_channels
            for step in branch.trunk:
                self.add_module(step.name, Convolution(channels, step.channels, step.kernel, step.stride))
                channels = step.channels
            for step in branch.heads:
                self.add_module(step.name, Convolution(channels, step.channels, step.kernel, step.stride))
        if pooled:
            self.branch_pool = Convolution(in_channels, pooled, 1)
        self.channels = (pooled or in_channels) + sum(step.channels for branch in branches for step in branch.heads)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            h = x
            for step in branch.trunk:
                h = self.get_submodule(step.name)(h)
            outputs += [self.get_submodule(step.name)(h) for step in branch.heads]
        if self._pool == "reduce":
            pooled = F.max_pool2d(x, 3, stride=2)
        elif self._pool == "max":
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat([*outputs, self.branch_pool(pooled) if self._pooled else pooled], 1)


def _block_35(pooled: int, in_channels: int) -> Mixed:
    branches = (
        _chain(Step("branch1x1", 64)),
        _chain(Step("branch5x5_1", 48), Step("branch5x5_2", 64, 5)),
        _chain(Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3)),
    )
    return Mixed(in_channels, branches, "average", pooled)


def _to_17(in_channels: int) -> Mixed:
    branches = (
        _chain(Step("branch3x3", 384, 3, stride=2)),
        _chain(Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3, stride=2)),
    )
    return Mixed(in_channels, branches, "reduce", 0)


def _block_17(width: int, in_channels: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    branches = (
        _chain(Step("branch1x1", 192)),
        _chain(Step("branch7x7_1", width), Step("branch7x7_2", width, row), Step("branch7x7_3", 192, column)),
        _chain(
            Step("branch7x7dbl_1", width), Step("branch7x7dbl_2", width, column), Step("branch7x7dbl_3", width, row),
            Step("branch7x7dbl_4", width, column), Step("branch7x7dbl_5", 192, row),
        ),
    )  # fmt: skip
    return Mixed(in_channels, branches, "average", 192)


def _to_8(in_channels: int) -> Mixed:
    branches = (
        _chain(Step("branch3x3_1", 192), Step("branch3x3_2", 320, 3, stride=2)),
        _chain(
            Step("branch7x7x3_1", 192), Step("branch7x7x3_2", 192, (1, 7)), Step("branch7x7x3_3", 192, (7, 1)),
            Step("branch7x7x3_4", 192, 3, stride=2),
        ),
    )  # fmt: skip
    return Mixed(in_channels, branches, "reduce", 0)


def _block_8(pool: str, in_channels: int) -> Mixed:
    row, column = (1, 3), (3, 1)
    branches = (
        _chain(Step("branch1x1", 320)),
        _forked(Step("branch3x3_1", 384), Step("branch3x3_2a", 384, row), Step("branch3x3_2b", 384, column)),
        _forked(
            Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, 3),
            Step("branch3x3dbl_3a", 384, row), Step("branch3x3dbl_3b", 384, column),
        ),
    )  # fmt: skip
    return Mixed(in_channels, branches, pool, 192)


class InceptionV3(nn.Module):
    """Images uint8 (N, 3, H, W) to the last block's spatial means, float32 (N, 2048), and logits (N, 1008).

    Logits are without bias, as in the published code of the Inception Score.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, pad=False)
        self.Mixed_5b = _block_35(32, 192)
        self.Mixed_5c = _block_35(64, self.Mixed_5b.channels)
        self.Mixed_5d = _block_35(64, self.Mixed_5c.channels)
        self.Mixed_6a = _to_17(self.Mixed_5d.channels)
        self.Mixed_6b = _block_17(128, self.Mixed_6a.channels)
        self.Mixed_6c = _block_17(160, self.Mixed_6b.channels)
        self.Mixed_6d = _block_17(160, self.Mixed_6c.channels)
        self.Mixed_6e = _block_17(192, self.Mixed_6d.channels)
        self.Mixed_7a = _to_8(self.Mixed_6e.channels)
        self.Mixed_7b = _block_8("average", self.Mixed_7a.channels)
        self.Mixed_7c = _block_8("max", self.Mixed_7b.channels)
        self.fc = nn.Linear(DIMENSION, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (resized_as_tensorflow_1(images.float(), _SIZE) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight)

    def folded(self) -> "InceptionV3":
        """Fold each batch normalization into the convolution before it, in place; return self in evaluation mode."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Convolution) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def resized_as_tensorflow_1(x: Tensor, size: int) -> Tensor:
    """Resize bilinearly to (N, C, size, size), sampling pixel i at i * (old / new): no half-pixel offset, no filter."""
    for dim in (3, 2):
        old = x.shape[dim]
        scale = torch.tensor(old / size, dtype=torch.float32)
        position = torch.arange(size, dtype=torch.float32, device=x.device) * scale
        low = position.long()
        weight = (position - low).to(x.dtype)
        if dim == 2:
            weight = weight[:, None]
        start = x.index_select(dim, low)
        x = start + (x.index_select(dim, (low + 1).clamp(max=old - 1)) - start) * weight
    return x


def places() -> list[Path]:
    """Return the paths where the published weights are looked for: fastddpm's cache, then torch.hub's."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [folder / name for folder in (default_directory(), hub) for name in (FILE, _OTHER_FILE)]


def find_weights() -> Path | None:
    """Return the first of `places` that is a file, None if there is none."""
    return next((path for path in places() if os.path.isfile(path)), None)


def how_to_get_them() -> str:
    """Return one line that says how to get missing weights."""
    return (
        f"the Inception weights are missing: download {FILE} (from the releases of pytorch-fid; sha256 {SHA256[:8]}..) "
        f"and put it at {places()[0]}, or name it by --features PATH"
    )
