"""The U-Net for inference in PyTorch operations: fewer kernels, the same numbers up to rounding.

The time embeddings and their projections are computed once, as rows of a table. Biases are added where the next
operation reads, residuals by the norm that follows, and shortcuts by the product that computes them. Of the four linear
layers of an attention block two are left. Upsampling and the convolution after it are one 2x2 convolution. Weights are
cast and laid out once. The host reads nothing back, so a CUDA graph can be captured.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.config import EngineConfig
from fastddpm.ops import convert_image
from fastddpm.runtime.device import fastest_convolutions
from fastddpm.unet import Down, Level, ResBlock, UNet

from .current import Weights
from .fused_blocks import FusedAttention, FusedLevel, FusedResBlock
from .fused_layers import Cast, Conv3x3, DirectConv, Image, Norm, total


class FusedUNet:
    """Evaluates a U-Net in evaluation mode: `FusedUNet(unet, timesteps, engine, dtype)(x_t, t, label)`.

    `x_t`: floating (N, C, H, W). `t`: int64 (N,) in 0..timesteps-1, the rows of the time table; with 0 timesteps there
    is no table, and t may be any. A `t` expanded from one value (stride 0) is looked up once. `label`: int64 (N,) if
    the network takes labels. The network is computed in `dtype`. Returns (N, C or 2C, H, W) in `dtype`. `engine` turns
    each change to the network on or off. A timestep outside the table raises IndexError on a CPU and fails a
    device-side assertion on a GPU. `stale` tells whether the weights have changed since.
    """

    def __init__(self, unet: UNet, timesteps: int, engine: EngineConfig, dtype: torch.dtype) -> None:
        self.unet, self.engine, self.dtype = unet, engine, dtype
        self._weights = Weights(unet)
        one_sided = any(isinstance(module, Down) and not module.conv.padding[0] for module in unet.modules())
        self._mirrored = engine.mirrored and one_sided
        layout = torch.channels_last if engine.channels_last else torch.contiguous_format
        cast_to = Cast(dtype, layout, mirrored=self._mirrored)
        with torch.no_grad():
            self._time = _Time(unet, timesteps, engine)
            carried, padded = engine.carried_biases, engine.padded_channels
            bias = unet.conv_in.bias
            self._conv_in: DirectConv | Conv3x3
            if engine.direct_input and engine.channels_last and carried and unet.conv_in.in_channels <= 7:
                self._conv_in = DirectConv(unet.conv_in, cast_to)
            else:
                filled: Literal["in"] | None = "in" if padded else None
                self._conv_in = Conv3x3(unet.conv_in, None if carried else bias, cast_to, padded=filled)
            lacks = bias.detach() if carried and bias is not None else None
            skips = [(lacks, unet.conv_in.out_channels)]
            self._down: list[FusedLevel] = []
            for level in cast(Sequence[Level], unet.down):
                self._down.append(FusedLevel(level, self._time, engine, cast_to, lacks))
                lacks = self._down[-1].lacks
                skips += self._down[-1].outputs
            self._first = FusedResBlock(unet.mid.block1, self._time, engine, cast_to, lacks)
            middle, lacks = unet.mid.attention, self._first.lacks
            self._attention = None if middle is None else FusedAttention(middle, engine, cast_to, lacks)
            lacks = lacks if middle is None else None
            self._last = FusedResBlock(unet.mid.block2, self._time, engine, cast_to, lacks)
            lacks = self._last.lacks
            self._up: list[FusedLevel] = []
            for level in cast(Sequence[Level], unet.up):
                self._up.append(FusedLevel(level, self._time, engine, cast_to, lacks, skips))
                lacks = self._up[-1].lacks
            self._norm_out = Norm(unet.norm_out, lacks)
            # The copy that ends the network adds the bias, which would be a kernel of its own.
            bias = unet.conv_out.bias
            self._conv_out = Conv3x3(
                unet.conv_out, None if carried else bias, cast_to, padded="out" if padded else None
            )
            self._last_bias: Tensor | None = None
            if carried and bias is not None:
                self._last_bias = F.pad(bias.detach(), (0, self._conv_out.outputs - len(bias)))
        # torch.compile makes a program for each batch size and keeps eight. Without fullgraph, a ninth size runs
        # uncompiled and torch logs that; with it, the ninth would be an error.
        self._run = torch.compile(self._forward, dynamic=False) if engine.compile else self._forward

    def stale(self) -> bool:
        """Whether the network's weights have been changed or replaced since this object was made."""
        return self._weights.changed()

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.unet.check(x_t, t, label)
        with torch.no_grad(), fastest_convolutions(x_t.device, self.engine.timed_convolutions):
            return self._run(self._input(x_t), self._time(t, label))

    def _input(self, x_t: Tensor) -> Tensor:
        """Return x_t as conv_in reads it: in the network's precision, layout, direction and channels, or as it is."""
        if isinstance(self._conv_in, DirectConv):
            return x_t
        return convert_image(
            x_t, channels=self._conv_in.inputs, mirrored=self._mirrored, dtype=self.dtype,
            channels_last=self.engine.channels_last,
        )  # fmt: skip

    def _output(self, out: Tensor) -> Tensor:
        """Return what conv_out computed in the direction of x_t, with its bias and without channels of zeros."""
        channels = self.unet.conv_out.out_channels
        if self._last_bias is None and not self._mirrored:
            return out[:, :channels]
        return convert_image(
            out, bias=self._last_bias, channels=channels, mirrored=self._mirrored,
            channels_last=self.engine.channels_last,
        )  # fmt: skip

    def _forward(self, x_t: Tensor, temb: Tensor) -> Tensor:
        """Evaluate the network; the highest resolution by `engine.chunk` images at a time."""
        size = self.engine.chunk or max(1, len(x_t))
        pieces = [slice(start, start + size) for start in range(0, max(1, len(x_t)), size)]
        tops = []
        for piece in pieces:
            h = Image(self._conv_in(x_t[piece]))
            skips = [h]
            tops.append((_descend(self._down[0], h, temb[piece], skips), skips))
        h, skips = tops[0]
        if len(pieces) > 1:
            h = Image(torch.cat([part.settled() for part, _ in tops]))
            skips = [h]  # of the images side by side, which the level below takes
        inner = [] if len(self._down) == 1 else [skips[-1]]
        for level in self._down[1:]:
            h = _descend(level, h, temb, inner)
        h = self._first(h, temb)
        h = h if self._attention is None else self._attention(h)
        h = self._last(h, temb)
        for level in self._up[:-1]:
            h = _ascend(level, h, temb, inner)
        outputs = []
        for piece, (_, skips) in zip(pieces, tops, strict=True):
            part = h if len(pieces) == 1 else Image(h.settled()[piece])
            kept = skips if len(self._down) == 1 else skips[:-1]
            part = _ascend(self._up[-1], part, temb[piece], kept)
            outputs.append(self._output(self._conv_out(self._norm_out(part))))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _descend(level: FusedLevel, h: Image, temb: Tensor, skips: list[Image]) -> Image:
    for block, attend in level.blocks:
        h = block(h, temb)
        h = h if attend is None else attend(h)
        skips.append(h)
    if level.resample is not None:
        h = level.resample(h, temb)
        skips.append(h)
    return h


def _ascend(level: FusedLevel, h: Image, temb: Tensor, skips: list[Image]) -> Image:
    for block, attend in level.blocks:
        h = block(h, temb, skips.pop())
        h = h if attend is None else attend(h)
    return h if level.resample is None else level.resample(h, temb)


class _Time:
    """Projects the time embedding for all residual blocks side by side: (N, columns).

    With `engine.time_table` these are rows of a table over all timesteps. With labels the table holds the embedding
    before the activation, because the label's embedding is added there, and one matrix product does the rest. The bias
    of conv1 is part of a row, unless the row scales and shifts: the norm after conv1 adds both at once.
    """

    def __init__(self, unet: UNet, timesteps: int, engine: EngineConfig) -> None:
        self._unet = unet
        blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
        self._columns: dict[ResBlock, tuple[int, int]] = {}
        end = 0
        for block in blocks:
            self._columns[block] = (end, end + block.temb_proj.out_features)
            end += block.temb_proj.out_features
        biases = [total(block.temb_proj.bias, None if block.scale_shift else block.conv1.bias) for block in blocks]
        weight = torch.cat([block.temb_proj.weight for block in blocks])
        self._bias = torch.cat([bias for bias in biases if bias is not None])
        self._weight = weight.detach()
        self._table: Tensor | None = None
        if engine.time_table and timesteps:
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
