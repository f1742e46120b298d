"""The blocks of the U-Net: convolutions, norms, residual and attention blocks, resampling.

With the defaults of the configuration all constants are those of the paper's released code: GroupNorm eps 1e-6;
convolutions padded as TensorFlow's SAME (downsampling pads right and bottom only); one attention head of the full
width; biases zero; weights Xavier-uniform, with gain 1e-5 in the last layer of a residual branch.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fastddpm.config import UNetConfig
from fastddpm.ops import add_bias, attention, conv3x3, group_norm_silu
from fastddpm.ops.attention import join_heads, split_heads
from fastddpm.ops.channel_sums import linear as linear_by_sums
from fastddpm.ops.channel_sums import linears
from fastddpm.ops.group_norm_silu import norm_and_inputs
from fastddpm.ops.noise import NoiseKey
from fastddpm.ops.registry import computed_dtype

from .on_cpu import convolved, convolves_faster, float32_if, float32_products, in_bf16, pointwise, rounded

_WIDE_OUTPUT = 8  # channels
NEAR_ZERO_GAIN = 1e-5  # the released code replaces a scale of 0 by a variance scale of 1e-10


def _initialise(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Conv3x3(nn.Conv2d):
    """3x3 convolution with stride 1 and zero padding; with `doubled`, of the image upsampled by 2 (nearest) first."""

    def __init__(self, in_channels: int, out_channels: int, gain: float = 1.0, *, doubled: bool = False) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.doubled = doubled
        _initialise(self, gain)

    def forward(self, input: Tensor, *, biased: bool = True) -> Tensor:
        """Return the convolution; without `biased`, which is for networks that run `by_kernels`, without its bias."""
        # On a GPU PyTorch's own convolution is the fastest, and torch.compile can choose layouts around it.
        if input.device.type == "cpu" and not by_kernels(input):
            if not torch.is_autocast_enabled("cpu"):
                return conv3x3(input, self.weight, self.bias, doubled=self.doubled)
            if self.weight.dtype == torch.float32 and in_bf16(input):
                with float32_if(True):
                    return conv3x3(input.float(), self.weight, self.bias, doubled=self.doubled, bf16=True)
        x = _doubled(input) if self.doubled else input
        if not by_kernels(input):
            return super().forward(x)
        missing = _WIDE_OUTPUT - self.out_channels
        if missing <= 0 or computed_dtype(input).itemsize != 2:
            out = F.conv2d(x, self.weight, None, padding=1)
            return add_bias(out, self.bias) if biased and self.bias is not None else out
        # The tensor cores' gradient of the input takes 8 channels at a time: fewer are many times slower.
        out = F.conv2d(x, F.pad(self.weight, (0, 0, 0, 0, 0, 0, 0, missing)), None, padding=1)
        if biased and self.bias is not None:
            out = add_bias(out, F.pad(self.bias, (0, missing)))
        return out[:, : self.out_channels]


def by_kernels(x: Tensor) -> bool:
    """Whether a network computes on `x` with its biases apart from its convolutions: in eager mode on a GPU.

    There a bias is a kernel of its own, and its gradient by PyTorch takes four times as long as reading the image.
    """
    return x.device.type != "cpu" and not torch.compiler.is_compiling()


_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def as_made(layers: dict[nn.Module | None, type[nn.Module]]) -> bool:
    """Whether each layer computes what its weight and bias say: of the type made here, unchanged, without hooks.

    LoRA or a parametrization replaces a layer; so may a user, by one without a bias or with another padding.
    """
    if any(getattr(torch_modules, f"_global_{kind}") for kind in _HOOKS):
        return False
    return all(
        type(layer) is kind
        and "forward" not in vars(layer)
        and layer.bias is not None
        and not any(getattr(layer, f"_{hooks}") for hooks in _HOOKS)
        and (type(layer) is not nn.Conv2d or _is_plain(layer))
        for layer, kind in layers.items()
        if layer is not None
    )


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether a convolution is 1x1, or downsamples as `Down` does."""
    shape = (conv.kernel_size, conv.stride, conv.padding)
    known = (((1, 1), (1, 1), (0, 0)), ((3, 3), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)))
    return shape in known and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"


def _doubled(x: Tensor) -> Tensor:
    if not by_kernels(x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    # Under autocast, interpolate would compute in float32.
    n, c, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, height, 2, width, 2, c)
    return pixels.reshape(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)


def _conv(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding)
    _initialise(layer)
    return layer


def linear(in_features: int, out_features: int, gain: float = 1.0) -> nn.Linear:
    """Return a linear layer, initialised as the released code's: Xavier-uniform with `gain`, the bias zero."""
    layer = nn.Linear(in_features, out_features)
    _initialise(layer, gain)
    return layer


class GroupNormSiLU(nn.Module):
    """Compute dropout(silu(scale_shift(group_norm(concat(x, skip) + temb)))); all but the norm is optional."""

    def __init__(
        self, channels: int, groups: int, eps: float, *, silu: bool = True, dropout: float = 0.0, layer: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups, self.eps, self.silu, self.dropout, self.layer = groups, eps, silu, dropout, layer

    def forward(
        self,
        x: Tensor,
        *,
        skip: Tensor | None = None,
        temb: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        key: NoiseKey | None = None,
        inputs: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        """Return the output; with `inputs`, for a norm of x and skip alone, also x and skip, to be used again."""
        if in_bf16(x):
            with float32_if(True):
                x, skip = x.float(), None if skip is None else skip.float()
                return self.forward(x, skip=skip, temb=temb, scale=scale, shift=shift, key=key, inputs=inputs)
        if inputs:
            return norm_and_inputs(x, self.weight, self.bias, self.groups, self.eps, skip=skip, silu=self.silu)
        if not (self.training and self.dropout > 0):
            return group_norm_silu(
                x, self.weight, self.bias, self.groups, self.eps,
                skip=skip, temb=temb, scale=scale, shift=shift, silu=self.silu,
            )  # fmt: skip
        if key is None:
            key = NoiseKey.draw(len(x), x.device)
        return group_norm_silu(
            x, self.weight, self.bias, self.groups, self.eps,
            skip=skip, temb=temb, scale=scale, shift=shift, silu=self.silu,
            dropout=self.dropout, images=key.images, seed=key.seed, step=key.step, layer=self.layer,
        )  # fmt: skip


class ResBlock(nn.Module):
    """Compute conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + temb)))) + shortcut(x) with x = concat(h, skip).

    x is never formed: the norm reads both inputs, and the 1x1 shortcut is split in two. With the configuration's
    `scale_shift` the embedding acts behind the second norm: silu((1 + scale) norm2(conv1(..)) + shift).

    `resample`, for blocks without a skip: average 2x2 pixels ("down") or double them ("up"), of x before the shortcut
    and of silu(norm1(x)) before conv1 (Dhariwal and Nichol 2021, after BigGAN).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        config: UNetConfig,
        layer: int,
        skip: int = 0,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.resample, self.scale_shift = resample, config.scale_shift
        self.norm1 = GroupNormSiLU(in_channels + skip, config.groups, config.norm_eps)
        self.conv1 = Conv3x3(in_channels + skip, out_channels, doubled=resample == "up")
        self.temb_proj = linear(time_channels, out_channels * (1 + config.scale_shift))
        self.norm2 = GroupNormSiLU(out_channels, config.groups, config.norm_eps, dropout=config.dropout, layer=layer)
        self.conv2 = Conv3x3(out_channels, out_channels, NEAR_ZERO_GAIN)
        self.shortcut = _conv(in_channels + skip, out_channels, 1) if in_channels + skip != out_channels else None

    def forward(self, h: Tensor, activated_temb: Tensor, skip: Tensor | None, key: NoiseKey | None) -> Tensor:
        """Return (N, C, H, W), of half or double the size if the block resamples.

        `h`: (N, C1, H, W). `activated_temb`: silu(temb) (N, 4 width). `skip`: (N, C2, H, W).
        """
        kernels = by_kernels(h) and as_made({
            self.norm1: GroupNormSiLU, self.conv1: Conv3x3, self.temb_proj: nn.Linear, self.conv2: Conv3x3,
            self.shortcut: nn.Conv2d,
        })  # fmt: skip
        if kernels:
            residual, h, skip = self.norm1(h, skip=skip, inputs=True)
        else:
            residual = self.norm1(h, skip=skip)
        x = h
        if self.resample == "down":
            residual, x = F.avg_pool2d(residual, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x = _doubled(h)
        if kernels:
            return self._sum(self.conv2(self._normed(residual, activated_temb, key), biased=False), x, skip)
        residual = self.conv1(residual)
        # Of few rows: its weights take longer to round than to multiply.
        with float32_if(activated_temb.dtype == torch.float32 and float32_products(h, self.temb_proj)):
            projected = self.temb_proj(activated_temb)
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            residual = self.norm2(residual, scale=scale, shift=shift, key=key)
        else:
            residual = self.norm2(residual, temb=projected, key=key)
        residual = self.conv2(residual)
        if self.shortcut is None:
            return residual + x
        if not as_made({self.shortcut: nn.Conv2d}):
            return residual + self.shortcut(x if skip is None else torch.cat([h, skip], 1))
        weight, bias = self.shortcut.weight, self.shortcut.bias
        if skip is None:
            return residual + pointwise(x, weight, bias)
        weight_h, weight_skip = weight.split([h.shape[1], skip.shape[1]], dim=1)
        return residual + pointwise(h, weight_h, bias) + pointwise(skip, weight_skip)

    def _normed(self, residual: Tensor, activated_temb: Tensor, key: NoiseKey | None) -> Tensor:
        """Return norm2(conv1(residual)) with the embedding, to which the bias of conv1 is added where both are sums."""
        projection, bias = self.temb_proj, self.conv1.bias
        assert bias is not None
        if self.scale_shift:
            scale, shift = linear_by_sums(activated_temb, projection.weight, projection.bias).chunk(2, dim=1)
            return self.norm2(self.conv1(residual), scale=scale, shift=shift, key=key)
        temb = linear_by_sums(activated_temb, projection.weight, projection.bias + bias)
        return self.norm2(self.conv1(residual, biased=False), temb=temb, key=key)

    def _sum(self, residual: Tensor, x: Tensor, skip: Tensor | None) -> Tensor:
        """Return the output in one pass, from conv2 without its bias and the input of the shortcut."""
        bias = self.conv2.bias
        assert bias is not None
        if self.shortcut is None:
            return add_bias(residual, bias, x)
        assert self.shortcut.bias is not None
        weight, bias = self.shortcut.weight, bias + self.shortcut.bias
        if skip is None:
            return add_bias(residual, bias, F.conv2d(x, weight))
        weight_x, weight_skip = weight.split([x.shape[1], skip.shape[1]], dim=1)
        return add_bias(residual, bias, F.conv2d(x, weight_x), F.conv2d(skip, weight_skip))


class AttnBlock(nn.Module):
    """Compute x + proj(attention(q, k, v)), with q, k, v linear in group_norm(x); over all pixels.

    With several heads each attends on its own, over C / heads adjacent channels of q, k and v.
    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-6, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNormSiLU(channels, groups, eps, silu=False)
        self.q, self.k, self.v = (linear(channels, channels) for _ in range(3))
        self.proj = linear(channels, channels, NEAR_ZERO_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        linear_layers: dict[nn.Module | None, type[nn.Module]] = dict.fromkeys(
            (self.q, self.k, self.v, self.proj), nn.Linear
        )
        kernels = by_kernels(x) and as_made({self.norm: GroupNormSiLU} | linear_layers)
        low = float32_products(x, self.q, self.k, self.v, self.proj) and as_made(linear_layers)
        product = nn.Linear.__call__
        if low:
            product = rounded
        elif convolves_faster(x) and as_made(linear_layers):
            product = convolved
        if kernels:
            normed, x, _ = self.norm(x, inputs=True)
        else:
            normed = self.norm(x)
        tokens = normed.permute(0, 2, 3, 1).reshape(n, height * width, c)
        layers = (self.q, self.k, self.v)
        if kernels:
            parts = linears(tokens, [layer.weight for layer in layers], [layer.bias for layer in layers])
        else:
            parts = [product(layer, tokens) for layer in layers]
        q, k, v = (split_heads(part, self.heads) for part in parts)
        with float32_if(low):
            out = join_heads(attention(q, k, v, bf16=low), self.heads)
        out = F.linear(out, self.proj.weight) if kernels else product(self.proj, out)
        image = out.reshape(n, height, width, c).permute(0, 3, 1, 2)
        return add_bias(image, self.proj.bias, x) if kernels else x + image


class Down(nn.Module):
    """3x3 convolution with stride 2 of an image of even sizes, padded by one at the right and bottom.

    That is TensorFlow's SAME. With `padding` 1 there is one at the left and top as well, as in most PyTorch code; the
    one at the right and bottom is then never read.
    """

    def __init__(self, channels: int, padding: int = 0) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, stride=2, padding=padding)
        self._pads = padding == 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a network that was pickled whole before `_pads` was."""
        super().__setstate__(state)
        if "_pads" not in self.__dict__:
            self._pads = not self.conv.padding[0]

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self._pads else x
        if not (by_kernels(x) and as_made({self.conv: nn.Conv2d})):
            out = self.conv(x)
            return out.float() if in_bf16(x) else out
        assert self.conv.bias is not None
        return add_bias(F.conv2d(x, self.conv.weight, None, self.conv.stride, self.conv.padding), self.conv.bias)


class Up(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, doubled=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """One resolution of the down or up path: residual blocks, each followed by attention if configured."""

    def __init__(
        self, blocks: list[ResBlock], attentions: list[AttnBlock], resample: Down | Up | ResBlock | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def attend(self, index: int, h: Tensor) -> Tensor:
        """Apply the attention that follows residual block `index`; return `h` itself if the level has none."""
        return self.attentions[index](h) if len(self.attentions) else h

    def resampled(self, h: Tensor, activated_temb: Tensor, key: NoiseKey | None) -> Tensor:
        """Return `h` down- or upsampled for the next level."""
        if isinstance(self.resample, ResBlock):
            return self.resample(h, activated_temb, None, key)
        assert self.resample is not None
        return self.resample(h)


class Middle(nn.Module):
    """Residual block, attention unless it is configured away, residual block at the lowest resolution."""

    def __init__(self, channels: int, time_channels: int, config: UNetConfig, layer: int) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, time_channels, config, layer)
        self.attention = attention_block(channels, config) if config.middle_attention else None
        self.block2 = ResBlock(channels, channels, time_channels, config, layer + 1)

    def forward(self, h: Tensor, activated_temb: Tensor, key: NoiseKey | None) -> Tensor:
        h = self.block1(h, activated_temb, None, key)
        return self.block2(h if self.attention is None else self.attention(h), activated_temb, None, key)


def attention_block(channels: int, config: UNetConfig) -> AttnBlock:
    """Return an attention block of `channels` as configured."""
    return AttnBlock(channels, config.groups, config.norm_eps, config.heads_of(channels))
