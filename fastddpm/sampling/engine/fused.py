"""The U-Net for inference in PyTorch operations: fewer kernels, the same numbers up to rounding.

The time embeddings and their projections are computed once, as rows of a table. q, k and v are one projection.
Upsampling and the convolution after it are one 2x2 convolution. Shortcuts are added by the matrix product that computes
them. Weights are cast and laid out once. The host reads nothing back, so a CUDA graph can be captured.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.config import EngineConfig
from fastddpm.ops import attention, conv3x3_fp8, group_norm_silu
from fastddpm.ops.conv3x3_fp8 import quantised, to_e4m3
from fastddpm.unet import AttnBlock, Down, GroupNormSiLU, Level, ResBlock, UNet, Up, join_heads, split_heads

from .current import Weights

_Layer = Callable[[Tensor], Tensor]


class FusedUNet:
    """Evaluates a U-Net in evaluation mode: `FusedUNet(unet, timesteps, engine, dtype)(x_t, t, label)`.

    `x_t`: floating (N, C, H, W). `t`: int64 (N,) in 0..timesteps-1, the rows of the time table; a `t` expanded from one
    value (stride 0) is looked up once. `label`: int64 (N,) if the network takes labels. The network is computed in
    `dtype`. Returns (N, C or 2C, H, W) in `dtype`. `engine` turns each change to the network on or off. A timestep
    outside the table raises IndexError on a CPU and fails a device-side assertion on a GPU. `stale` tells whether the
    weights have changed since.
    """

    def __init__(self, unet: UNet, timesteps: int, engine: EngineConfig, dtype: torch.dtype) -> None:
        self.unet, self.engine, self.dtype = unet, engine, dtype
        self._weights = Weights(unet)
        cast_to = _Cast(dtype, torch.channels_last if engine.channels_last else torch.contiguous_format)
        self._layout = cast_to.layout
        with torch.no_grad():
            self._time = _Time(unet, timesteps, engine, cast_to)
            self._conv_in, self._conv_out = (
                _Conv3x3(layer, layer.bias, cast_to) for layer in (unet.conv_in, unet.conv_out)
            )
            self._down = [_Level(level, self._time, engine, cast_to) for level in cast(Sequence[Level], unet.down)]
            self._first, self._last = (
                _ResBlock(block, self._time, engine, cast_to) for block in (unet.mid.block1, unet.mid.block2)
            )
            middle = unet.mid.attention
            self._attention: _Layer = _identity if middle is None else _Attention(middle, engine, cast_to)
            self._up = [_Level(level, self._time, engine, cast_to) for level in cast(Sequence[Level], unet.up)]
        # torch.compile makes a program for each batch size and keeps eight. Without fullgraph, a ninth size runs
        # uncompiled and torch logs that; with it, the ninth would be an error.
        self._run = torch.compile(self._forward, dynamic=False) if engine.compile else self._forward

    def stale(self) -> bool:
        """Whether the network's weights have been changed or replaced since this object was made."""
        return self._weights.changed()

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.unet.check(x_t, t, label)
        with torch.no_grad():
            return self._run(x_t.to(self.dtype).contiguous(memory_format=self._layout), self._time(t, label))

    def _forward(self, x_t: Tensor, temb: Tensor) -> Tensor:
        h = self._conv_in(x_t)
        skips = [h]
        for level in self._down:
            for block, attend in level.blocks:
                h = attend(block(h, temb))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h, temb)
                skips.append(h)
        h = self._last(self._attention(self._first(h, temb)), temb)
        for level in self._up:
            for block, attend in level.blocks:
                h = attend(block(h, temb, skips.pop()))
            if level.resample is not None:
                h = level.resample(h, temb)
        return self._conv_out(_norm(self.unet.norm_out, h))


class _Cast:
    """Copies weights to the precision and memory format in which they are read."""

    def __init__(self, dtype: torch.dtype, layout: torch.memory_format) -> None:
        self.dtype, self.layout = dtype, layout

    def __call__(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        weight = weight.detach().to(self.dtype)
        return weight.contiguous(memory_format=self.layout) if weight.ndim == 4 else weight.contiguous()


class _Time:
    """Projects the time embedding for all residual blocks side by side: (N, columns).

    With `engine.time_table` these are rows of a table over all timesteps. With labels the table holds the embedding
    before the activation, because the label's embedding is added there, and one matrix product does the rest. The bias
    of conv1 is part of a row, unless the row scales and shifts: the norm after conv1 adds both at once.
    """

    def __init__(self, unet: UNet, timesteps: int, engine: EngineConfig, cast_to: _Cast) -> None:
        self._unet = unet
        blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
        self._columns: dict[ResBlock, tuple[int, int]] = {}
        end = 0
        for block in blocks:
            self._columns[block] = (end, end + block.temb_proj.out_features)
            end += block.temb_proj.out_features
        biases = [_sum(block.temb_proj.bias, None if block.scale_shift else block.conv1.bias) for block in blocks]
        weight, self._bias = torch.cat([block.temb_proj.weight for block in blocks]), torch.cat(biases)
        self._weight = weight.detach()
        self._table: Tensor | None = None
        if engine.time_table:
            every = torch.arange(timesteps, device=weight.device)
            self._table = unet.embed_time(every) if unet.label is not None else self._project(unet.embed(every, None))

    def columns(self, block: ResBlock) -> tuple[int, int]:
        """Return the first column of `block` and the one after its last."""
        return self._columns[block]

    def _project(self, activated: Tensor) -> Tensor:
        return F.linear(activated, self._weight, self._bias)

    def __call__(self, t: Tensor, label: Tensor | None) -> Tensor:
        shared = len(t) > 0 and t.stride(0) == 0
        if self._table is None:
            return self._project(self._unet.embed(t, label))
        rows = self._table.index_select(0, t[:1] if shared else t)
        if self._unet.label is not None:
            return self._project(F.silu(rows + self._unet.label(label)))
        return rows.expand(len(t), -1)


def _sum(*biases: Tensor | None) -> Tensor:
    return torch.stack([bias.detach() for bias in biases if bias is not None]).sum(0)


def _norm(
    norm: GroupNormSiLU,
    h: Tensor,
    skip: Tensor | None = None,
    temb: Tensor | None = None,
    scale_shift: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    scale, shift = scale_shift
    return group_norm_silu(
        h, norm.weight, norm.bias, norm.groups, norm.eps,
        skip=skip, temb=temb, scale=scale, shift=shift, silu=norm.silu,
    )  # fmt: skip


class _Conv3x3:
    """3x3 convolution with stride 1."""

    def __init__(self, layer: nn.Conv2d, bias: Tensor | None, cast_to: _Cast) -> None:
        self._weight, self._bias = cast_to(layer.weight), None if bias is None else cast_to(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._weight, self._bias, padding=1)


class _Conv8Bit:
    """3x3 convolution with stride 1, of input and weights rounded to e4m3.

    The input is the output of a norm and is within the range of e4m3 without a scale.
    """

    def __init__(self, layer: nn.Conv2d, bias: Tensor | None, cast_to: _Cast) -> None:
        self._weight, self._scale = quantised(layer.weight)
        self._bias = None if bias is None else cast_to(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return conv3x3_fp8(to_e4m3(x), self._weight, self._scale, self._bias, x.dtype)


class _ResBlock:
    """conv2(silu(norm2(conv1(silu(norm1(x))) + temb))) + shortcut(x), x = concat(h, skip), which is never stored.

    With scale and shift in place of temb, and with resampling before conv1 and the shortcut, where the block has them.
    """

    def __init__(self, block: ResBlock, time: _Time, engine: EngineConfig, cast_to: _Cast) -> None:
        self._norm1, self._norm2 = block.norm1, block.norm2
        convolution = _Conv8Bit if engine.fp8 else _Conv3x3
        # The bias of conv1 comes with the time embedding, if that is added right behind it.
        bias = block.conv1.bias if block.scale_shift else None
        self._conv1: _Layer = convolution(block.conv1, bias, cast_to)
        self._resample: _Layer = _identity
        if block.resample == "down":
            self._conv1, self._resample = _After(_average, self._conv1), _average
        elif block.resample == "up":
            phases = engine.phase_convolutions and not engine.fp8
            double = _After(_double, self._conv1)
            self._conv1, self._resample = _PhaseUpsample(block.conv1, bias, cast_to) if phases else double, _double
        self._columns, self._scale_shift = time.columns(block), block.scale_shift
        self._shortcut = None if block.shortcut is None else cast_to(block.shortcut.weight[:, :, 0, 0])
        bias = _sum(block.conv2.bias, None if block.shortcut is None else block.shortcut.bias)
        self._conv2 = convolution(block.conv2, bias, cast_to)
        self._accumulate = engine.accumulate

    def __call__(self, h: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        first, end = self._columns
        residual = self._conv1(_norm(self._norm1, h, skip))
        if self._scale_shift:
            scale, shift = temb[:, first:end].chunk(2, dim=1)
            out = self._conv2(_norm(self._norm2, residual, scale_shift=(scale, shift)))
        else:
            out = self._conv2(_norm(self._norm2, residual, temb=temb[:, first:end]))
        if self._shortcut is None:
            return out.add_(self._resample(h))
        inputs = [h] if skip is None else [h, skip]
        for x, weight in zip(inputs, self._shortcut.split([x.shape[1] for x in inputs], dim=1), strict=True):
            _add_product(out, x, weight, self._accumulate)
        return out


class _After:
    """Two operations, one after the other."""

    def __init__(self, first: _Layer, second: _Layer) -> None:
        self._first, self._second = first, second

    def __call__(self, x: Tensor) -> Tensor:
        return self._second(self._first(x))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _add_product(out: Tensor, x: Tensor, weight: Tensor, accumulate: bool) -> None:
    """Add weight @ x at every pixel to `out`, in place.

    With `accumulate`, and channels last in both, the matrix product adds in its own epilogue.
    """
    flat, rows = out.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    if accumulate and flat.is_contiguous() and rows.is_contiguous():
        flat.view(-1, flat.shape[3]).addmm_(rows.reshape(-1, rows.shape[3]), weight.t())
    else:
        out.add_(F.conv2d(x, weight[:, :, None, None]))


class _Attention:
    """x + proj(attention(q, k, v)), q, k, v linear in group_norm(x)."""

    def __init__(self, block: AttnBlock, engine: EngineConfig, cast_to: _Cast) -> None:
        self._norm = block.norm
        layers = (block.q, block.k, block.v)
        self._weights, self._biases = (
            [cast_to(getattr(layer, name)) for layer in layers] for name in ("weight", "bias")
        )
        if engine.fused_qkv:
            self._weights, self._biases = [torch.cat(self._weights)], [torch.cat(self._biases)]
        self._heads = block.heads
        self._proj, self._proj_bias = cast_to(block.proj.weight), cast_to(block.proj.bias)

    def __call__(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = _norm(self._norm, x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        parts = [F.linear(tokens, *layer) for layer in zip(self._weights, self._biases, strict=True)]
        q, k, v = parts if len(parts) == 3 else parts[0].split(c, dim=-1)
        q, k, v = (split_heads(part, self._heads) for part in (q, k, v))
        out = F.linear(join_heads(attention(q, k, v), self._heads), self._proj, self._proj_bias)
        return out.reshape(n, height, width, c).permute(0, 3, 1, 2).add_(x)


class _Downsample:
    """3x3 convolution with stride 2, padded by one at the right and bottom, and as configured at the left and top."""

    def __init__(self, layer: Down, cast_to: _Cast) -> None:
        self._weight, self._bias = cast_to(layer.conv.weight), cast_to(layer.conv.bias)
        self._symmetric = bool(layer.conv.padding[0])

    def __call__(self, x: Tensor) -> Tensor:
        if self._symmetric:
            return F.conv2d(x, self._weight, self._bias, stride=2, padding=1)
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self._weight, self._bias, stride=2)


class _PhaseUpsample:
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution as one 2x2 convolution of the small image.

    Several of the nine weights of an output pixel fall on the same input pixel. Output row 2i + a reads the input rows
    i - 1 + a and i + a: for a = 0 the former with the first row of weights and the latter with the sum of the other
    two, mirrored for a = 1. The same holds for columns. The 2x2 output pixels of an input pixel are thus four outputs
    of one 2x2 convolution, whose weights are summed in float64: 16 products instead of 36.
    """

    def __init__(self, layer: nn.Conv2d, bias: Tensor | None, cast_to: _Cast) -> None:
        weight = layer.weight.detach().double()
        # selection[a, p, y] is 1 if row y of the weights falls on the p-th of the two input rows.
        selection = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        phases = torch.einsum("apy,bqx,ocyx->abocpq", selection, selection, weight)
        self._weight = cast_to(phases.flatten(0, 2))
        self._bias = None if bias is None else cast_to(bias).repeat(4)
        self._layout = cast_to.layout

    def __call__(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        phases = F.conv2d(x, self._weight, self._bias, padding=1)  # one row and column more than x
        channels = phases.shape[1] // 4
        out = torch.empty(
            (n, channels, 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=self._layout
        )
        for phase, part in enumerate(phases.split(channels, dim=1)):
            a, b = divmod(phase, 2)
            out[:, :, a::2, b::2] = part[:, :, a : a + height, b : b + width]
        return out


class _Level:
    """The residual blocks of one resolution, each with its attention or identity, and the resampling after them."""

    def __init__(self, level: Level, time: _Time, engine: EngineConfig, cast_to: _Cast) -> None:
        blocks = [_ResBlock(block, time, engine, cast_to) for block in cast(Sequence[ResBlock], level.blocks)]
        attentions: list[_Layer] = [_identity] * len(blocks)
        if len(level.attentions):
            attentions = [_Attention(block, engine, cast_to) for block in cast(Sequence[AttnBlock], level.attentions)]
        self.blocks = list(zip(blocks, attentions, strict=True))
        self.resample: Callable[[Tensor, Tensor], Tensor] | None = None
        if isinstance(level.resample, ResBlock):
            self.resample = _ResBlock(level.resample, time, engine, cast_to)
        elif level.resample is not None:
            self.resample = _WithoutTime(_resampling(level.resample, engine, cast_to))


def _resampling(layer: Down | Up, engine: EngineConfig, cast_to: _Cast) -> _Layer:
    if isinstance(layer, Down):
        return _Downsample(layer, cast_to)
    if engine.phase_convolutions:
        return _PhaseUpsample(layer.conv, layer.conv.bias, cast_to)
    return _After(_double, _Conv3x3(layer.conv, layer.conv.bias, cast_to))


class _WithoutTime:
    """A layer that is called as a residual block is, and does not use the time embedding."""

    def __init__(self, layer: _Layer) -> None:
        self._layer = layer

    def __call__(self, h: Tensor, temb: Tensor) -> Tensor:
        return self._layer(h)


def _identity(h: Tensor) -> Tensor:
    return h
