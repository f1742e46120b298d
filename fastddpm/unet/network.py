"""The paper's U-Net: residual blocks with time embedding, attention at chosen resolutions.

With the defaults of the configuration all constants are those of the released code (see also blocks.py): sinusoids
with sin before cos and divisor half - 1; skips concatenated after the features; weights of the last layer with gain
1e-5.
"""

import math
from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.config import MAX_TIMESTEPS, UNetConfig
from fastddpm.ops.noise import NoiseKey

from .blocks import (
    NEAR_ZERO_GAIN,
    AttnBlock,
    Conv3x3,
    Down,
    GroupNormSiLU,
    Level,
    Middle,
    ResBlock,
    Up,
    attention_block,
    linear,
)
from .on_cpu import float32_if, float32_products


def timestep_embedding(t: Tensor, width: int, *, freq_shift: int = 1, scale: float = 1.0) -> Tensor:
    """Return [sin(scale t f_i), cos(scale t f_i)], float32 (N, width).

    The frequencies are f_i = 10000^(-i / (half - freq_shift)), i = 0..half - 1, half = width // 2.
    """
    half = width // 2
    # Computed in float64 and rounded once: at t = 999 a float32 frequency would change the phase by 1e-4.
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) * (-math.log(10000.0) / (half - freq_shift))
    angle = (t.to(torch.float64) * scale).unsqueeze(1) * torch.exp(exponent)
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1).to(torch.float32)


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
        self.time1 = linear(width, time_channels)
        self.time2 = linear(time_channels, time_channels)
        self.label: nn.Embedding | None = None
        if config.num_classes:
            rows = torch.empty(config.num_classes + (config.label_dropout > 0), time_channels)
            # On the meta device a draw from the normal distribution would import torch's compiler: 2 seconds.
            self.label = nn.Embedding.from_pretrained(rows if rows.is_meta else nn.init.normal_(rows), freeze=False)
        self.conv_in = Conv3x3(config.image_channels, config.first_channels)

        channels, layer = config.first_channels, 0
        skips = [channels]
        levels = list(zip(config.level_channels, config.attends, strict=True))
        down = []
        for i, (wanted, attends) in enumerate(levels):
            blocks, attentions = [], []
            for _ in range(config.blocks):
                blocks.append(ResBlock(channels, wanted, time_channels, config, layer))
                channels, layer = wanted, layer + 1
                if attends:
                    attentions.append(attention_block(channels, config))
                skips.append(channels)
            resample: Down | Up | ResBlock | None = None
            if i < len(levels) - 1:
                if config.resample == "resblock":
                    resample = ResBlock(channels, channels, time_channels, config, layer, resample="down")
                    layer += 1
                else:
                    resample = Down(channels, config.downsample_padding)
                skips.append(channels)
            down.append(Level(blocks, attentions, resample))
        self.down = nn.ModuleList(down)

        self.mid = Middle(channels, time_channels, config, layer)
        layer += 2

        up = []
        for i, (wanted, attends) in reversed(list(enumerate(levels))):
            blocks, attentions = [], []
            for _ in range(config.blocks + 1):
                blocks.append(ResBlock(channels, wanted, time_channels, config, layer, skips.pop()))
                channels, layer = wanted, layer + 1
                if attends:
                    attentions.append(attention_block(channels, config))
            resample = None
            if i > 0:
                if config.resample == "resblock":
                    resample = ResBlock(channels, channels, time_channels, config, layer, resample="up")
                    layer += 1
                else:
                    resample = Up(channels)
            up.append(Level(blocks, attentions, resample))
        self.up = nn.ModuleList(up)

        self.norm_out = GroupNormSiLU(channels, config.groups, config.norm_eps)
        self.conv_out = Conv3x3(channels, config.image_channels * (1 + config.learned_variance), NEAR_ZERO_GAIN)

    takes_noise_key = True  # of the protocol of networks, as the next three properties are (runtime/network.py)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.config.image_shape

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
        h, skips = self.descend(x_t, temb, noise_key)
        for level in cast(Iterable[Level], self.up):
            for i, block in enumerate(level.blocks):
                h = level.attend(i, block(h, temb, skips.pop(), noise_key))
            if level.resample is not None:
                h = level.resampled(h, temb, noise_key)
        return self.conv_out(self.norm_out(h))

    def descend(self, x_t: Tensor, temb: Tensor, noise_key: NoiseKey | None) -> tuple[Tensor, list[Tensor]]:
        """Return the features after the middle, (N, C, h, w), and the skips on the way down. `temb`: of `embed`."""
        h = self.conv_in(x_t)
        skips = [h]
        for level in cast(Iterable[Level], self.down):
            for i, block in enumerate(level.blocks):
                h = level.attend(i, block(h, temb, None, noise_key))
                skips.append(h)
            if level.resample is not None:
                h = level.resampled(h, temb, noise_key)
                skips.append(h)
        return self.mid(h, temb, noise_key), skips

    def embed(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Return the activated embedding of timestep and label, the input of every residual block, (N, 4 width)."""
        temb = self.embed_time(t)
        if self.label is not None:
            temb = temb + self.label(label)
        return F.silu(temb)

    def embed_time(self, t: Tensor) -> Tensor:
        """Return the embedding of the timestep, before the label's is added and before the activation, (N, 4 width)."""
        config = self.config
        sinusoids = timestep_embedding(t, config.width, freq_shift=config.freq_shift, scale=config.time_scale)
        with float32_if(float32_products(sinusoids, self.time1, self.time2)):
            return self.time2(F.silu(self.time1(sinusoids.to(next(self.time1.parameters()).dtype))))

    def check(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> None:
        """Raise ValueError, with the expected shape, for arguments that `forward` does not accept.

        The ranges of `t` and `label` are checked on a CPU only; a GPU would have to wait for their values.
        """
        config = self.config
        expected = config.image_shape
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
