"""The blocks of FusedUNet. Each is prepared with the biases that its inputs lack, and tells which its output lacks."""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.config import EngineConfig
from fastddpm.ops import add_attention, add_product, attention, convert_image
from fastddpm.unet import AttnBlock, Down, Level, ResBlock, Up, join_heads, split_heads

from .fused_layers import (
    After,
    Cast,
    Conv3x3,
    Conv8Bit,
    Downsample,
    Image,
    Layer,
    Norm,
    PhaseUpsample,
    TransposedUpsample,
    average,
    double,
    identity,
    side_by_side,
    total,
)


class Columns(Protocol):
    """The projections of the time embedding, side by side for all blocks."""

    def columns(self, block: ResBlock) -> tuple[int, int]:
        """Return the first column of `block` and the one after its last."""
        ...


class FusedResBlock:
    """conv2(silu(norm2(conv1(silu(norm1(x))) + temb))) + shortcut(x), x = concat(h, skip), which is never stored.

    With scale and shift in place of temb, and with resampling before conv1 and the shortcut, where the block has them.
    `lacks`: the bias that h lacks, and afterwards that of the output. `skip`: the bias that the skip lacks, and its
    channels. `complete`: the output is read by a convolution, and lacks nothing.
    """

    def __init__(
        self,
        block: ResBlock,
        time: Columns,
        engine: EngineConfig,
        cast_to: Cast,
        lacks: Tensor | None = None,
        skip: tuple[Tensor | None, int] = (None, 0),
        *,
        complete: bool = False,
    ) -> None:
        self._engine, (of_skip, behind) = engine, skip
        lacking = side_by_side(lacks, of_skip, (len(block.norm1.weight) - behind, behind))
        self._norm1 = Norm(block.norm1, lacking, rounded=engine.fp8 and block.resample is None)
        convolution = Conv8Bit if engine.fp8 else Conv3x3
        # The bias of conv1 comes with the time embedding, if that is added right behind it.
        carried = engine.carried_biases
        bias1 = block.conv1.bias if block.scale_shift else None
        self._norm2 = Norm(block.norm2, bias1 if carried else None, rounded=engine.fp8)
        bias = None if carried else bias1
        self._conv1: Layer = convolution(block.conv1, bias, cast_to)
        self._resample: Layer = identity
        if block.resample == "down":
            self._conv1, self._resample = After(average, self._conv1), average
        elif block.resample == "up":
            phases = engine.phase_convolutions and not engine.fp8
            doubled = After(double, self._conv1)
            self._conv1, self._resample = PhaseUpsample(block.conv1, bias, cast_to) if phases else doubled, double
        self._columns, self._scale_shift = time.columns(block), block.scale_shift
        self._shortcut: Tensor | None = None
        if block.shortcut is None:
            bias = total(block.conv2.bias, lacking)
        else:
            weight = block.shortcut.weight[:, :, 0, 0]
            self._shortcut = cast_to(weight)
            bias = total(block.conv2.bias, block.shortcut.bias, None if lacking is None else weight @ lacking)
        one = self._shortcut is not None and engine.one_product and cast_to.layout == torch.channels_last
        self._one_product = one
        self.lacks = bias if carried and not complete else None
        # A convolution's bias is a kernel of its own: what adds the shortcut adds it as well.
        self._settled = complete and carried and engine.fused_residuals and self._shortcut is None
        later = one or self._settled
        self._added = cast_to.bias(bias) if later and self.lacks is None else None
        self._conv2 = convolution(block.conv2, bias if self.lacks is None and not later else None, cast_to)

    def __call__(self, h: Image, temb: Tensor, skip: Image | None = None) -> Image:
        first, end = self._columns
        inside = Image(self._conv1(self._norm1(h, skip)))
        if self._scale_shift:
            scale, shift = temb[:, first:end].chunk(2, dim=1)
            out = self._conv2(self._norm2(inside, scale_shift=(scale, shift)))
        else:
            out = self._conv2(self._norm2(inside, temb=temb[:, first:end]))
        if self._settled:
            last = self._engine.channels_last
            return Image(convert_image(out, residual=h.tensor, bias=self._added, channels_last=last))
        if self._shortcut is None:
            x = self._resample(h.tensor)
            return Image(out, x) if self._engine.fused_residuals else Image(out.add_(x))
        inputs = [h.tensor] if skip is None else [h.tensor, skip.tensor]
        if self._one_product:
            second = None if skip is None else skip.tensor
            return Image(add_product(out, inputs[0], self._shortcut, self._added, skip=second))
        for x, weight in zip(inputs, self._shortcut.split([x.shape[1] for x in inputs], dim=1), strict=True):
            _add_in_place(out, x, weight, self._engine.accumulate)
        return Image(out)


def _add_in_place(out: Tensor, x: Tensor, weight: Tensor, accumulate: bool) -> None:
    """Add weight @ x at every pixel to `out`.

    With `accumulate`, and channels last in both, the matrix product adds in its own epilogue.
    """
    flat, rows = out.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    if accumulate and flat.is_contiguous() and rows.is_contiguous():
        flat.view(-1, flat.shape[3]).addmm_(rows.reshape(-1, rows.shape[3]), weight.t())
    else:
        out.add_(F.conv2d(x, weight[:, :, None, None]))


class FusedAttention:
    """x + proj(attention(q, k, v)), q, k, v linear in group_norm(x) = n. `lacks`: the bias that x lacks.

    With one head, `folded` leaves out two of the four linear layers. Scores are q k^T = (n W_q^T + b_q) W_k n^T plus
    what belongs to the row alone, which softmax ignores: n takes the place of k, and the two weights are multiplied
    beforehand. Rows of weights sum to 1, so the projection, its bias, and the bias that x lacks are made part of v.
    """

    def __init__(self, block: AttnBlock, engine: EngineConfig, cast_to: Cast, lacks: Tensor | None) -> None:
        self._norm, self._heads = Norm(block.norm, lacks), block.heads
        self._fused_residuals = engine.fused_residuals
        self._folded = engine.folded_attention and block.heads == 1
        layers = [(layer.weight.detach(), layer.bias.detach()) for layer in (block.q, block.k, block.v)]
        proj, proj_bias = block.proj.weight.detach(), block.proj.bias.detach()
        end = proj_bias if lacks is None else proj_bias + lacks
        if self._folded:
            (q, q_bias), (k, _), (v, v_bias) = [(w.double(), b.double()) for w, b in layers]
            layers = [(k.t() @ q, k.t() @ q_bias), (proj.double() @ v, proj.double() @ v_bias + end)]
        self._weights, self._biases = ([cast_to(pair[i]) for pair in layers] for i in (0, 1))
        if engine.fused_qkv:
            self._weights, self._biases = [torch.cat(self._weights)], [torch.cat(self._biases)]
        self._proj, self._proj_bias = cast_to(proj), cast_to(end)

    def __call__(self, h: Image) -> Image:
        n, c, height, width = h.tensor.shape
        tokens = self._norm(h).permute(0, 2, 3, 1).reshape(n, height * width, c)
        parts = [F.linear(tokens, *layer) for layer in zip(self._weights, self._biases, strict=True)]
        parts = list(parts[0].split(c, dim=-1)) if len(parts) == 1 else parts
        if self._folded and self._fused_residuals:
            rows = h.tensor.permute(0, 2, 3, 1).reshape(n, height * width, c)
            out = add_attention(parts[0], tokens, parts[1], rows)
            return Image(out.reshape(n, height, width, c).permute(0, 3, 1, 2))
        if self._folded:
            out = attention(parts[0], tokens, parts[1])
        else:
            q, k, v = (split_heads(part, self._heads) for part in parts)
            out = F.linear(join_heads(attention(q, k, v), self._heads), self._proj, self._proj_bias)
        image = out.reshape(n, height, width, c).permute(0, 3, 1, 2)
        return Image(image, h.tensor) if self._fused_residuals else Image(image.add_(h.tensor))


class FusedLevel:
    """The residual blocks of one resolution, each with its attention or None, and the resampling after them.

    `lacks`: the bias that the input lacks, and afterwards that of the output. `skips`: going up, what the skips lack,
    and their channels; the last is the next. `outputs`: the same of every output that is a skip, going down.
    """

    def __init__(
        self, level: Level, time: Columns, engine: EngineConfig, cast_to: Cast, lacks: Tensor | None,
        skips: list[tuple[Tensor | None, int]] | None = None,
    ) -> None:  # fmt: skip
        self.blocks: list[tuple[FusedResBlock, FusedAttention | None]] = []
        self.outputs: list[tuple[Tensor | None, int]] = []
        attentions = cast(Sequence[AttnBlock], level.attentions)
        for i, block in enumerate(cast(Sequence[ResBlock], level.blocks)):
            # Zeros around an image are zeros: a convolution cannot be given the bias that its input lacks.
            complete = i == len(level.blocks) - 1 and isinstance(level.resample, Down | Up) and not len(attentions)
            of_skip = (None, 0) if skips is None else skips.pop()
            fused = FusedResBlock(block, time, engine, cast_to, lacks, of_skip, complete=complete)
            lacks, attend = fused.lacks, None
            if len(attentions):
                attend, lacks = FusedAttention(attentions[i], engine, cast_to, lacks), None
            self.blocks.append((fused, attend))
            channels = block.conv2.out_channels
            self.outputs.append((lacks, channels))
        self.resample: FusedResBlock | Resampling | None = None
        if isinstance(level.resample, ResBlock):
            self.resample = FusedResBlock(level.resample, time, engine, cast_to, lacks)
        elif isinstance(level.resample, Down | Up):
            self.resample = Resampling(level.resample, engine, cast_to)
        if self.resample is not None:
            lacks = self.resample.lacks
            self.outputs.append((lacks, channels))
        self.lacks = lacks


class Resampling:
    """A strided convolution, or doubling and a convolution; called as a residual block is."""

    def __init__(self, layer: Down | Up, engine: EngineConfig, cast_to: Cast) -> None:
        bias = layer.conv.bias
        self.lacks = bias.detach() if engine.carried_biases and bias is not None else None
        bias = None if engine.carried_biases else bias
        if isinstance(layer, Down):
            self._layer: Layer = Downsample(layer, bias, cast_to, unpadded=engine.unpadded)
        elif engine.phase_convolutions:
            kind = TransposedUpsample if engine.transposed_convolutions else PhaseUpsample
            self._layer = kind(layer.conv, bias, cast_to)
        else:
            self._layer = After(double, Conv3x3(layer.conv, bias, cast_to))

    def __call__(self, h: Image, temb: Tensor) -> Image:
        return Image(self._layer(h.settled()))
