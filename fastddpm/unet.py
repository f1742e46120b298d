"""The paper's U-Net: residual blocks with time embedding, attention at chosen resolutions.

All constants are those of the released code: GroupNorm eps 1e-6; convolutions padded as TensorFlow's SAME
(downsampling pads right and bottom only); sinusoids with sin before cos and divisor half - 1; one attention
head of the full width; skips concatenated after the features; biases zero; weights Xavier-uniform, with gain
1e-5 in the last layer of a residual branch and of the network.
"""

import math
from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.config import MAX_TIMESTEPS, UNetConfig
from fastddpm.ops import attention, conv3x3, group_norm_silu
from fastddpm.ops.noise import NoiseKey

GROUP_NORM_EPS = 1e-6
NEAR_ZERO_GAIN = 1e-5  # the released code replaces a scale of 0 by a variance scale of 1e-10


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Return [sin(t f_i), cos(t f_i)], float32 (N, width), with f_i = 10000^(-i / (half - 1)), i = 0..half - 1."""
    half = width // 2
    # Computed in float64 and rounded once: at t = 999 a float32 frequency would change the phase by 1e-4.
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) * (-math.log(10000.0) / (half - 1))
    angle = t.to(torch.float64).unsqueeze(1) * torch.exp(exponent)
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1).to(torch.float32)


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

    def forward(self, input: Tensor) -> Tensor:
        # On a GPU PyTorch's own convolution is the fastest, and torch.compile can choose layouts around it.
        if input.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return conv3x3(input, self.weight, self.bias, doubled=self.doubled)
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest") if self.doubled else input)


def _conv(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride)
    _initialise(layer)
    return layer


def _linear(in_features: int, out_features: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    _initialise(layer, gain)
    return layer


class GroupNormSiLU(nn.Module):
    """Compute dropout(silu(group_norm(concat(x, skip) + temb))); all but the norm is optional."""

    def __init__(self, channels: int, groups: int, *, silu: bool = True, dropout: float = 0.0, layer: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups, self.silu, self.dropout, self.layer = groups, silu, dropout, layer

    def forward(
        self, x: Tensor, *, skip: Tensor | None = None, temb: Tensor | None = None, key: NoiseKey | None = None
    ) -> Tensor:
        if not (self.training and self.dropout > 0):
            return group_norm_silu(
                x, self.weight, self.bias, self.groups, GROUP_NORM_EPS, skip=skip, temb=temb, silu=self.silu
            )
        if key is None:
            key = NoiseKey.draw(len(x), x.device)
        return group_norm_silu(
            x, self.weight, self.bias, self.groups, GROUP_NORM_EPS, skip=skip, temb=temb, silu=self.silu,
            dropout=self.dropout, images=key.images, seed=key.seed, step=key.step, layer=self.layer,
        )  # fmt: skip


class ResBlock(nn.Module):
    """Compute conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + temb)))) + shortcut(x) with x = concat(h, skip).

    x is never formed: the norm reads both inputs, and the 1x1 shortcut is split in two.
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, config: UNetConfig, layer: int, skip: int = 0
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(in_channels + skip, config.groups)
        self.conv1 = Conv3x3(in_channels + skip, out_channels)
        self.temb_proj = _linear(time_channels, out_channels)
        self.norm2 = GroupNormSiLU(out_channels, config.groups, dropout=config.dropout, layer=layer)
        self.conv2 = Conv3x3(out_channels, out_channels, NEAR_ZERO_GAIN)
        self.shortcut = _conv(in_channels + skip, out_channels, 1) if in_channels + skip != out_channels else None

    def forward(self, h: Tensor, activated_temb: Tensor, skip: Tensor | None, key: NoiseKey | None) -> Tensor:
        """Return (N, C, H, W). `h`: (N, C1, H, W). `activated_temb`: silu(temb) (N, 4 width). `skip`: (N, C2, H, W)."""
        residual = self.conv1(self.norm1(h, skip=skip))
        residual = self.conv2(self.norm2(residual, temb=self.temb_proj(activated_temb), key=key))
        if skip is None:
            return residual + (h if self.shortcut is None else self.shortcut(h))
        assert self.shortcut is not None  # x has more channels than the output whenever there is a skip
        weight_h, weight_skip = self.shortcut.weight.split([h.shape[1], skip.shape[1]], dim=1)
        return residual + F.conv2d(h, weight_h, self.shortcut.bias) + F.conv2d(skip, weight_skip)


class AttnBlock(nn.Module):
    """Compute x + proj(attention(q, k, v)), with q, k, v linear in group_norm(x); one head over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(channels, groups, silu=False)
        self.q, self.k, self.v = (_linear(channels, channels) for _ in range(3))
        self.proj = _linear(channels, channels, NEAR_ZERO_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        out = self.proj(attention(self.q(tokens), self.k(tokens), self.v(tokens)))
        return x + out.reshape(n, height, width, c).permute(0, 3, 1, 2)


class Down(nn.Module):
    """3x3 convolution with stride 2, padded by one at the right and bottom, as TensorFlow's SAME for even sizes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, doubled=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """One resolution of the down or up path: residual blocks, each followed by attention if configured."""

    def __init__(self, blocks: list[ResBlock], attentions: list[AttnBlock], resample: Down | Up | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def attend(self, index: int, h: Tensor) -> Tensor:
        """Apply the attention that follows residual block `index`; return `h` itself if the level has none."""
        return self.attentions[index](h) if len(self.attentions) else h


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, time_channels: int, config: UNetConfig, layer: int) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, time_channels, config, layer)
        self.attention = AttnBlock(channels, config.groups)
        self.block2 = ResBlock(channels, channels, time_channels, config, layer + 1)

    def forward(self, h: Tensor, activated_temb: Tensor, key: NoiseKey | None) -> Tensor:
        return self.block2(self.attention(self.block1(h, activated_temb, None, key)), activated_temb, None, key)


class UNet(nn.Module):
    """The network eps_theta(x_t, t); depending on the diffusion it predicts eps, x_0, x_{t-1} or v.

    `unet(x_t, t)` or `unet(x_t, t, label)`: x_t floating (N, C, H, W) of the configured size; t int64 (N,) in 0..T-1,
    or one number for all; label int64 (N,) in 0..num_classes-1, or num_classes for "no label" if the network is
    configured with label_dropout. In training mode dropout masks are a function of `noise_key`. Default: a key drawn
    from torch's default generator. Returns (N, C, H, W), or (N, 2C, H, W) with a learned variance.
    Raises ValueError for other shapes and types, a missing label, a label for a network without labels, and on
    a CPU for values out of range.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, time_channels = config.width, 4 * config.width
        self.time1 = _linear(width, time_channels)
        self.time2 = _linear(time_channels, time_channels)
        self.label: nn.Embedding | None = None
        if config.num_classes:
            rows = torch.empty(config.num_classes + (config.label_dropout > 0), time_channels)
            # On the meta device a draw from the normal distribution would import torch's compiler: 2 seconds.
            self.label = nn.Embedding.from_pretrained(rows if rows.is_meta else nn.init.normal_(rows), freeze=False)
        self.conv_in = Conv3x3(config.image_channels, width)

        channels, size, layer = width, config.image_size, 0
        skips = [channels]
        down = []
        for i, multiplier in enumerate(config.multipliers):
            last = i == len(config.multipliers) - 1
            blocks, attentions = [], []
            for _ in range(config.blocks):
                blocks.append(ResBlock(channels, width * multiplier, time_channels, config, layer))
                channels, layer = width * multiplier, layer + 1
                if size in config.attention_resolutions:
                    attentions.append(AttnBlock(channels, config.groups))
                skips.append(channels)
            down.append(Level(blocks, attentions, None if last else Down(channels)))
            if not last:
                skips.append(channels)
                size //= 2
        self.down = nn.ModuleList(down)

        self.mid = Middle(channels, time_channels, config, layer)
        layer += 2

        up = []
        for i, multiplier in reversed(list(enumerate(config.multipliers))):
            blocks, attentions = [], []
            for _ in range(config.blocks + 1):
                blocks.append(ResBlock(channels, width * multiplier, time_channels, config, layer, skips.pop()))
                channels, layer = width * multiplier, layer + 1
                if size in config.attention_resolutions:
                    attentions.append(AttnBlock(channels, config.groups))
            up.append(Level(blocks, attentions, None if i == 0 else Up(channels)))
            size *= 2
        self.up = nn.ModuleList(up)

        self.norm_out = GroupNormSiLU(channels, config.groups)
        self.conv_out = Conv3x3(channels, config.image_channels * (1 + config.learned_variance), NEAR_ZERO_GAIN)

    takes_noise_key = True  # of the protocol of networks, as the next three properties are (runtime/network.py)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.config.image_channels, self.config.image_size, self.config.image_size

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels."""
        return self.config.num_classes

    @property
    def null_label(self) -> int | None:
        """The label that means "no label", or None if the network has none."""
        return self.config.num_classes if self.config.label_dropout > 0 else None

    def channels_last(self) -> "UNet":
        """Convert the weights to torch.channels_last, in which convolutions are fastest, and return the network."""
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, x_t: Tensor, t: Tensor | int, label: Tensor | None = None, noise_key: NoiseKey | None = None
    ) -> Tensor:
        if isinstance(t, int):
            t = torch.full(x_t.shape[:1], t, dtype=torch.int64, device=x_t.device)
        self.check(x_t, t, label)
        if self.training and self.config.dropout > 0 and noise_key is None:
            noise_key = NoiseKey.draw(len(x_t), x_t.device)
        temb = self.embed(t, label)

        h = self.conv_in(x_t)
        skips = [h]
        for level in cast(Iterable[Level], self.down):
            for i, block in enumerate(level.blocks):
                h = level.attend(i, block(h, temb, None, noise_key))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        h = self.mid(h, temb, noise_key)
        for level in cast(Iterable[Level], self.up):
            for i, block in enumerate(level.blocks):
                h = level.attend(i, block(h, temb, skips.pop(), noise_key))
            if level.resample is not None:
                h = level.resample(h)
        return self.conv_out(self.norm_out(h))

    def embed(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Return the activated embedding of timestep and label, the input of every residual block, (N, 4 width)."""
        temb = self.embed_time(t)
        if self.label is not None:
            temb = temb + self.label(label)
        return F.silu(temb)

    def embed_time(self, t: Tensor) -> Tensor:
        """Return the embedding of the timestep, before the label's is added and before the activation, (N, 4 width)."""
        return self.time2(F.silu(self.time1(timestep_embedding(t, self.config.width).to(self.time1.weight.dtype))))

    def check(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> None:
        """Raise ValueError, with the expected shape, for arguments that `forward` does not accept.

        The ranges of `t` and `label` are checked on a CPU only; a GPU would have to wait for their values.
        """
        config = self.config
        expected = (config.image_channels, config.image_size, config.image_size)
        if x_t.ndim != 4 or x_t.shape[1:] != expected:
            raise ValueError(f"UNet: x_t must be (N, {', '.join(map(str, expected))}); got {tuple(x_t.shape)}")
        if not x_t.is_floating_point():
            raise ValueError(f"UNet: x_t must be floating; got {x_t.dtype}")
        if t.shape != x_t.shape[:1] or t.dtype.is_floating_point:
            raise ValueError(f"UNet: t must be integer ({x_t.shape[0]},); got {t.dtype} {tuple(t.shape)}")
        if (label is None) != (config.num_classes == 0):
            raise ValueError(
                "UNet: this network takes no label" if label is not None else "UNet: this network needs a label"
            )
        if label is not None and (label.shape != t.shape or label.dtype.is_floating_point):
            raise ValueError(f"UNet: label must be integer ({x_t.shape[0]},); got {label.dtype} {tuple(label.shape)}")
        _check_range("t", t, MAX_TIMESTEPS)
        if label is not None and self.label is not None:
            _check_range("label", label, self.label.num_embeddings)


# Networks without weights of their own


def _check_range(name: str, values: Tensor, limit: int) -> None:
    """Raise ValueError for a value outside 0..limit-1, where values can be read: on a CPU, outside of tracing."""
    if values.device.type != "cpu" or not values.numel() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    try:
        low, high = (int(value) for value in torch.aminmax(values))
    except RuntimeError:  # inside vmap or a fake tensor mode there are no values
        return
    if low < 0 or high >= limit:
        raise ValueError(f"UNet: {name} must be in 0..{limit - 1}; got {low if low < 0 else high}")


def network_with(config: UNetConfig, weights: Mapping[str, Tensor]) -> UNet:
    """Return a network in evaluation mode whose parameters are the tensors `weights`, by name, without copying.

    It changes whenever they do.
    """
    unet = meta_network(config)
    unet.load_state_dict(dict(weights), assign=True)
    return unet.requires_grad_(False).eval()


def meta_network(config: UNetConfig) -> UNet:
    """Return a network on the meta device: names, shapes and types, without memory."""
    with torch.device("meta"):
        return UNet(config)


# The forward of each kind of module of a UNet, to tell whether one was replaced.
FORWARDS: dict[type[nn.Module], object] = {
    kind: kind.forward
    for kind in (
        UNet, Middle, Level, ResBlock, AttnBlock, Down, Up, GroupNormSiLU, Conv3x3,
        nn.Conv2d, nn.Linear, nn.Embedding, nn.ModuleList,
    )
}  # fmt: skip
