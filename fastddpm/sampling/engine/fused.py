"""The U-Net for inference in operations of torch: fewer kernels, the same numbers up to rounding.

Every time embedding and its projections are rows of a table, computed once; q, k and v are one projection; doubling and
the convolution behind it are a convolution of 2x2; shortcuts are added by the product that computes them; weights are
cast and laid out once. Nothing here is read by the host, so that a CUDA graph can hold it.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.config import EngineConfig
from fastddpm.ops import attention, conv3x3_fp8, group_norm_silu
from fastddpm.ops.conv3x3_fp8 import quantised, to_e4m3
from fastddpm.unet import GROUP_NORM_EPS, AttnBlock, Down, GroupNormSiLU, Level, ResBlock, UNet, Up, weight_versions

_Part = Callable[[Tensor], Tensor]


class FusedUNet:
    """`FusedUNet(unet, timesteps, engine, dtype)(x_t, t, label)`: `unet` in evaluation mode, computed in `dtype`.

    `x_t`: floating (N, C, H, W). `t`: int64 (N,) in 0..timesteps-1, of which the table has a row each; a `t` expanded
    from one value (stride 0) is looked up once. `label` as the network takes it. Returns (N, C or 2C, H, W) in `dtype`.
    `engine` switches what is done to the network, each part by itself. A timestep outside the table is an IndexError on
    a CPU, and stops a GPU. `stale` says whether the weights have changed since.
    """

    def __init__(self, unet: UNet, timesteps: int, engine: EngineConfig, dtype: torch.dtype) -> None:
        self.unet, self.engine, self.dtype = unet, engine, dtype
        self._versions = weight_versions(unet)
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
            self._attention = _Attention(unet.mid.attention, engine, cast_to)
            self._up = [_Level(level, self._time, engine, cast_to) for level in cast(Sequence[Level], unet.up)]
        # A program for each size of batches, of which torch keeps eight. Not fullgraph: that would make a ninth size an
        # error; so it is computed as it stands, and torch logs that.
        self._run = torch.compile(self._forward, dynamic=False) if engine.compile else self._forward

    def stale(self) -> bool:
        """Whether the network's weights have been changed or replaced since this was made."""
        return weight_versions(self.unet) != self._versions

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
                h = level.resample(h)
                skips.append(h)
        h = self._last(self._attention(self._first(h, temb)), temb)
        for level in self._up:
            for block, attend in level.blocks:
                h = attend(block(h, temb, skips.pop()))
            if level.resample is not None:
                h = level.resample(h)
        return self._conv_out(_norm(self.unet.norm_out, h))


class _Cast:
    """Weights in the precision and memory format that they are read in."""

    def __init__(self, dtype: torch.dtype, layout: torch.memory_format) -> None:
        self.dtype, self.layout = dtype, layout

    def __call__(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        weight = weight.detach().to(self.dtype)
        return weight.contiguous(memory_format=self.layout) if weight.ndim == 4 else weight.contiguous()


class _Time:
    """Projections of the time embedding for all residual blocks side by side: (N, columns).

    With `time_table`, rows of a table over all timesteps; a label's part is added before the activation, so that with
    labels the table ends there and one product does the rest. conv1's bias is part of the row: the norm behind it adds
    both at once.
    """

    def __init__(self, unet: UNet, timesteps: int, engine: EngineConfig, cast_to: _Cast) -> None:
        self._unet = unet
        blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
        self._columns: dict[ResBlock, tuple[int, int]] = {}
        end = 0
        for block in blocks:
            self._columns[block] = (end, end + block.temb_proj.out_features)
            end += block.temb_proj.out_features
        biases = [_sum(block.temb_proj.bias, block.conv1.bias) for block in blocks]
        weight, self._bias = torch.cat([block.temb_proj.weight for block in blocks]), torch.cat(biases)
        self._weight = weight.detach()
        self._table: Tensor | None = None
        if engine.time_table:
            every = torch.arange(timesteps, device=weight.device)
            self._table = unet.embed_time(every) if unet.label is not None else self._project(unet.embed(every, None))

    def columns(self, block: ResBlock) -> tuple[int, int]:
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


def _norm(norm: GroupNormSiLU, h: Tensor, skip: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    return group_norm_silu(h, norm.weight, norm.bias, norm.groups, GROUP_NORM_EPS, skip=skip, temb=temb, silu=norm.silu)


class _Conv3x3:
    """3x3 convolution with stride 1."""

    def __init__(self, layer: nn.Conv2d, bias: Tensor | None, cast_to: _Cast) -> None:
        self._weight, self._bias = cast_to(layer.weight), None if bias is None else cast_to(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._weight, self._bias, padding=1)


class _Conv8Bit:
    """The same of numbers rounded to e4m3. Its input is a norm's output: within e4m3's range as it is."""

    def __init__(self, layer: nn.Conv2d, bias: Tensor | None, cast_to: _Cast) -> None:
        self._weight, self._scale = quantised(layer.weight)
        self._bias = None if bias is None else cast_to(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return conv3x3_fp8(to_e4m3(x), self._weight, self._scale, self._bias, x.dtype)


class _ResBlock:
    """conv2(silu(norm2(conv1(silu(norm1(x))) + temb))) + shortcut(x), x = concat(h, skip) which is never made."""

    def __init__(self, block: ResBlock, time: _Time, engine: EngineConfig, cast_to: _Cast) -> None:
        self._norm1, self._norm2 = block.norm1, block.norm2
        convolution = _Conv8Bit if engine.fp8 else _Conv3x3
        self._conv1 = convolution(block.conv1, None, cast_to)  # its bias comes with the time embedding
        self._columns = time.columns(block)
        self._shortcut = None if block.shortcut is None else cast_to(block.shortcut.weight[:, :, 0, 0])
        bias = _sum(block.conv2.bias, None if block.shortcut is None else block.shortcut.bias)
        self._conv2 = convolution(block.conv2, bias, cast_to)
        self._accumulate = engine.accumulate

    def __call__(self, h: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        first, end = self._columns
        residual = self._conv1(_norm(self._norm1, h, skip))
        out = self._conv2(_norm(self._norm2, residual, temb=temb[:, first:end]))
        if self._shortcut is None:
            return out.add_(h)
        inputs = [h] if skip is None else [h, skip]
        for x, weight in zip(inputs, self._shortcut.split([x.shape[1] for x in inputs], dim=1), strict=True):
            _add_product(out, x, weight, self._accumulate)
        return out


def _add_product(out: Tensor, x: Tensor, weight: Tensor, accumulate: bool) -> None:
    """out += weight x at every pixel; in the product's own epilogue where both have their channels side by side."""
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
        self._proj, self._proj_bias = cast_to(block.proj.weight), cast_to(block.proj.bias)

    def __call__(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = _norm(self._norm, x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        parts = [F.linear(tokens, *layer) for layer in zip(self._weights, self._biases, strict=True)]
        q, k, v = parts if len(parts) == 3 else parts[0].split(c, dim=-1)
        out = F.linear(attention(q, k, v), self._proj, self._proj_bias)
        return out.reshape(n, height, width, c).permute(0, 3, 1, 2).add_(x)


class _Halving:
    """3x3 convolution with stride 2, padded by one at the right and bottom."""

    def __init__(self, layer: Down, cast_to: _Cast) -> None:
        self._weight, self._bias = cast_to(layer.conv.weight), cast_to(layer.conv.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self._weight, self._bias, stride=2)


class _Doubling:
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, layer: Up, cast_to: _Cast) -> None:
        self._conv = _Conv3x3(layer.conv, layer.conv.bias, cast_to)

    def __call__(self, x: Tensor) -> Tensor:
        return self._conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _PhaseDoubling:
    """The same without the doubled image: of the nine weights of an output pixel some fall on one input pixel.

    An output row 2i + a sees the input rows i - 1 + a and i + a: with the first row's weights on one and the sum of the
    others' on the other for a = 0, mirrored for a = 1; columns alike. So the four pixels 2x2 are four outputs of one
    2x2 convolution, whose weights are summed in float64: 16 products instead of 36.
    """

    def __init__(self, layer: Up, cast_to: _Cast) -> None:
        weight = layer.conv.weight.detach().double()
        # (a, which of the two input rows, which row of the weights)
        of = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        phases = torch.einsum("apy,bqx,ocyx->abocpq", of, of, weight)
        self._weight = cast_to(phases.flatten(0, 2))
        self._bias = cast_to(layer.conv.bias).repeat(4)
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
    """The blocks of one resolution, each with what follows it, and the change of resolution behind them."""

    def __init__(self, level: Level, time: _Time, engine: EngineConfig, cast_to: _Cast) -> None:
        blocks = [_ResBlock(block, time, engine, cast_to) for block in cast(Sequence[ResBlock], level.blocks)]
        follow: list[_Part] = [_identity] * len(blocks)
        if len(level.attentions):
            follow = [_Attention(block, engine, cast_to) for block in cast(Sequence[AttnBlock], level.attentions)]
        self.blocks = list(zip(blocks, follow, strict=True))
        self.resample: _Part | None = None
        if isinstance(level.resample, Down):
            self.resample = _Halving(level.resample, cast_to)
        elif level.resample is not None:
            doubling = _PhaseDoubling if engine.phase_convolutions else _Doubling
            self.resample = doubling(level.resample, cast_to)


def _identity(h: Tensor) -> Tensor:
    return h
