"""The layers of FusedUNet: norms and convolutions between images that may still lack a residual and a bias."""

import itertools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.ops import conv3x3_fp8, conv3x3_in, group_norm_silu, inference_norm
from fastddpm.ops.conv3x3_fp8 import E4M3, quantised, to_e4m3
from fastddpm.unet import Down, GroupNormSiLU

Layer = Callable[[Tensor], Tensor]


class Image:
    """A feature map (N, C, H, W): `tensor`, plus `residual` until an operation needs the sum and stores it.

    A bias that it lacks besides is known when the network is prepared: whatever reads it has been given the bias.
    """

    __slots__ = ("residual", "tensor")

    def __init__(self, tensor: Tensor, residual: Tensor | None = None) -> None:
        self.tensor, self.residual = tensor, residual

    def settled(self) -> Tensor:
        """Return the sum, which is stored from then on."""
        if self.residual is not None:
            self.tensor, self.residual = self.tensor + self.residual, None
        return self.tensor


class Cast:
    """Copies weights to the precision and memory format in which they are read.

    `mirrored`: the images are turned by 180 degrees, and so are the kernels of convolutions (`kernel`).
    """

    def __init__(self, dtype: torch.dtype, layout: torch.memory_format, *, mirrored: bool = False) -> None:
        self.dtype, self.layout, self.mirrored = dtype, layout, mirrored

    def kernel(self, layer: nn.Conv2d) -> Tensor:
        """Return the weights of a convolution of the images as they are turned, not yet cast."""
        weight = layer.weight.detach()
        return weight.flip(2, 3) if self.mirrored else weight

    def __call__(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        weight = weight.detach().to(self.dtype)
        return weight.contiguous(memory_format=self.layout) if weight.ndim == 4 else weight.contiguous()

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self(bias)


def total(*biases: Tensor | None) -> Tensor | None:
    """Return the sum of those that are not None, or None."""
    given = [bias.detach() for bias in biases if bias is not None]
    return torch.stack(given).sum(0) if given else None


def side_by_side(first: Tensor | None, second: Tensor | None, channels: tuple[int, int]) -> Tensor | None:
    """Return the biases of two images' channels, zeros where there is none, or None if both are."""
    given = next((bias for bias in (first, second) if bias is not None), None)
    if given is None:
        return None
    parts = zip((first, second), channels, strict=True)
    return torch.cat([given.new_zeros(count) if bias is None else bias for bias, count in parts])


class Norm:
    """A norm with what precedes it: the sum with a residual, the concatenation, and a bias `added` per channel.

    `rounded`: the result is stored in e4m3, for a convolution that reads it so.
    """

    def __init__(self, norm: GroupNormSiLU, added: Tensor | None = None, *, rounded: bool = False) -> None:
        self.norm, self._rounded = norm, rounded
        self.added = None if added is None else added.detach()

    def __call__(
        self,
        h: Image,
        skip: Image | None = None,
        temb: Tensor | None = None,
        scale_shift: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        norm, (scale, shift) = self.norm, scale_shift
        if temb is None and self.added is not None:
            temb = self.added.expand(len(h.tensor), -1)
        behind = None if skip is None else skip.settled()
        if h.residual is None and not self._rounded:
            return group_norm_silu(
                h.tensor, norm.weight, norm.bias, norm.groups, norm.eps,
                skip=behind, temb=temb, scale=scale, shift=shift, silu=norm.silu,
            )  # fmt: skip
        y, h.tensor = inference_norm(
            h.tensor, norm.weight, norm.bias, norm.groups, norm.eps, residual=h.residual, skip=behind, temb=temb,
            scale=scale, shift=shift, silu=norm.silu, dtype=E4M3 if self._rounded else None,
        )  # fmt: skip
        h.residual = None
        return y


class Conv3x3:
    """3x3 convolution with stride 1. `padded`: input or output channels are filled up to a multiple of 8 with zeros."""

    def __init__(
        self, layer: nn.Conv2d, bias: Tensor | None, cast_to: Cast, *, padded: Literal["in", "out"] | None = None
    ) -> None:
        weight = cast_to.kernel(layer)
        if padded is not None:
            inputs, outputs = (-weight.shape[1] % 8, 0) if padded == "in" else (0, -weight.shape[0] % 8)
            weight = F.pad(weight, (0, 0, 0, 0, 0, inputs, 0, outputs))
            bias = None if bias is None else F.pad(bias.detach(), (0, outputs))
        self.outputs, self.inputs = weight.shape[:2]
        self._weight, self._bias = cast_to(weight), cast_to.bias(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._weight, self._bias, padding=1)


class DirectConv:
    """The 3x3 convolution of images of up to 7 channels as they come: of any dtype, contiguous, not yet turned."""

    def __init__(self, layer: nn.Conv2d, cast_to: Cast) -> None:
        self._weight, self._mirrored = cast_to(cast_to.kernel(layer)), cast_to.mirrored

    def __call__(self, x: Tensor) -> Tensor:
        return conv3x3_in(x, self._weight, mirrored=self._mirrored)


class Conv8Bit:
    """3x3 convolution with stride 1, of input and weights rounded to e4m3.

    The input is the output of a norm and is within the range of e4m3 without a scale.
    """

    def __init__(self, layer: nn.Conv2d, bias: Tensor | None, cast_to: Cast) -> None:
        self._weight, self._scale = quantised(cast_to.kernel(layer))
        self._bias, self._dtype = cast_to.bias(bias), cast_to.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return conv3x3_fp8(x if x.dtype == E4M3 else to_e4m3(x), self._weight, self._scale, self._bias, self._dtype)


class After:
    """Two operations, one after the other."""

    def __init__(self, first: Layer, second: Layer) -> None:
        self._first, self._second = first, second

    def __call__(self, x: Tensor) -> Tensor:
        return self._second(self._first(x))


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample:
    """3x3 convolution with stride 2, padded by one at the right and bottom, and as configured at the left and top.

    Padding at the right and bottom alone needs a copy of the image, but for two ways. With padding on every side, the
    last row and column of it are never read, and of a mirrored image these are the ones at the left and top. With
    `unpadded`, a 4x4 kernel, whose first row and column are zero, may be padded on every side.
    """

    def __init__(self, layer: Down, bias: Tensor | None, cast_to: Cast, *, unpadded: bool) -> None:
        everywhere = bool(layer.conv.padding[0])
        widened = not everywhere and not cast_to.mirrored and unpadded
        self._padding = int(everywhere or cast_to.mirrored or widened)
        weight = cast_to.kernel(layer.conv)
        self._weight = cast_to(F.pad(weight, (1, 0, 1, 0)) if widened else weight)
        self._bias = cast_to.bias(bias)

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self._padding else F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self._weight, self._bias, stride=2, padding=self._padding)


class PhaseUpsample:
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution as one 2x2 convolution of the small image.

    Several of the nine weights of an output pixel fall on the same input pixel. Output row 2i + a reads the input rows
    i - 1 + a and i + a: for a = 0 the former with the first row of weights and the latter with the sum of the other
    two, mirrored for a = 1. The same holds for columns. The 2x2 output pixels of an input pixel are thus four outputs
    of one 2x2 convolution, whose weights are summed in float64: 16 products instead of 36.
    """

    def __init__(self, layer: nn.Conv2d, bias: Tensor | None, cast_to: Cast) -> None:
        self._weight = cast_to(_phases(cast_to.kernel(layer)).flatten(0, 2))
        self._bias = None if bias is None else cast_to(bias).repeat(4)
        self._layout = cast_to.layout

    def __call__(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        phases = F.conv2d(x, self._weight, self._bias, padding=1)  # one row and column more than x
        channels = phases.shape[1] // 4
        rows = phases.permute(0, 2, 3, 1)
        if self._layout == torch.channels_last and rows.is_contiguous():
            return _woven(rows, channels, height, width).permute(0, 3, 1, 2)
        out = torch.empty(
            (n, channels, 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=self._layout
        )
        for phase, part in enumerate(phases.split(channels, dim=1)):
            a, b = divmod(phase, 2)
            out[:, :, a::2, b::2] = part[:, :, a : a + height, b : b + width]
        return out


def _phases(weight: Tensor) -> Tensor:
    """Return the 2x2 weights of the 2x2 phases, float64 (2, 2, K, C, 2, 2), from those of a 3x3 convolution."""
    weight = weight.detach().double()
    # selection[a, p, y] is 1 if row y of the weights falls on the p-th of the two input rows.
    selection = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    return torch.einsum("apy,bqx,ocyx->abocpq", selection, selection, weight)


class TransposedUpsample:
    """The same as PhaseUpsample, as one transposed 4x4 convolution with stride 2, which writes the image itself.

    Row 2i + a of its output is made of the input rows i - 1 + a + p with row 3 - a - 2p of its weights, for p = 0, 1.
    """

    def __init__(self, layer: nn.Conv2d, bias: Tensor | None, cast_to: Cast) -> None:
        phases = _phases(cast_to.kernel(layer))
        weight = phases.new_empty(*phases.shape[2:4], 4, 4)
        for a, p, b, q in itertools.product((0, 1), repeat=4):
            weight[:, :, 3 - a - 2 * p, 3 - b - 2 * q] = phases[a, b, :, :, p, q]
        self._weight, self._bias = cast_to(weight.transpose(0, 1)), cast_to.bias(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self._weight, self._bias, stride=2, padding=1)


def _woven(rows: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return the four phases, (N, height + 1, width + 1, 4 channels), as one image (N, 2 height, 2 width, channels).

    Phase (a, b) of pixel (i, j) lies at (i + a, j + b, channels (2 a + b)): an offset that is linear in i, a, j and b.
    Therefore one strided copy does it, of 8 bytes at a time where channels allow it.
    """
    dtype = rows.dtype
    if channels * rows.element_size() % 8 == 0:
        channels = channels * rows.element_size() // 8
        rows = rows.view(torch.int64)
    n, step_n, step_h, step_w = len(rows), *rows.stride()[:3]
    shape = (n, height, 2, width, 2, channels)
    strides = (step_n, step_h, step_h + 2 * channels, step_w, step_w + channels, 1)
    woven = rows.as_strided(shape, strides).reshape(n, 2 * height, 2 * width, channels)
    return woven.view(dtype) if woven.dtype != dtype else woven


def identity(h: Tensor) -> Tensor:
    return h
