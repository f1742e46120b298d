"""Networks with the options that other implementations have, alone and together, and their forward in float64.

The forward is written a second time, in PyTorch's float64 operators and from the papers and the published descriptions
of those networks: it reads parameters by name and the configuration's numbers, and runs no code of the package.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from helpers.networks import tiny
from torch import Tensor

from fastddpm.config import UNetConfig

OPTIONS: dict[str, UNetConfig] = {
    "norm_eps": tiny(norm_eps=0.3),
    "downsample_padding": tiny(downsample_padding=1),
    "freq_shift": tiny(freq_shift=0),
    "time_scale": tiny(time_scale=0.25),
    "heads": tiny(heads=2),
    "head_channels": tiny(width=16, head_channels=4),
    "channels": tiny(channels=(8, 20)),
    "channels narrower than the width": tiny(width=16, channels=(8, 12)),
    "no middle attention": tiny(middle_attention=False),
    "scale_shift": tiny(scale_shift=True),
    "resblock": tiny(resample="resblock"),
    "landscape": tiny(image_size=(12, 20)),
    "portrait": tiny(image_size=(20, 12), attention_resolutions=(20, 10)),
}
EVERYTHING = UNetConfig(
    image_size=(8, 12), image_channels=2, width=12, channels=(16, 24, 32), blocks=1, attention_resolutions=(4, 2),
    dropout=0.0, groups=8, num_classes=3, label_dropout=0.1, learned_variance=True, head_channels=8, scale_shift=True,
    resample="resblock", norm_eps=1e-5, freq_shift=0, time_scale=0.25,
)  # fmt: skip
TOGETHER: dict[str, UNetConfig] = {
    # What diffusers' training script makes, OpenAI's improved and guided networks, and all that go together.
    "diffusers": tiny(width=32, groups=8, channels=(32, 48), head_channels=8, norm_eps=1e-5, downsample_padding=1,
                      freq_shift=0),
    "improved": tiny(width=32, groups=8, heads=4, scale_shift=True, norm_eps=1e-5, downsample_padding=1, freq_shift=0,
                     learned_variance=True, time_scale=0.25),
    "guided": tiny(width=32, groups=8, head_channels=16, scale_shift=True, resample="resblock", norm_eps=1e-5,
                   freq_shift=0, learned_variance=True, num_classes=4, label_dropout=0.1),
    "everything": EVERYTHING,
    "padding of everything": dataclasses.replace(EVERYTHING, resample="conv", downsample_padding=1,
                                                 middle_attention=False),
}  # fmt: skip
ALL = OPTIONS | TOGETHER


def reference(config: UNetConfig, weights: dict[str, Tensor], x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Return the network's output, float64 (N, C or 2C, H, W), with `weights` of any floating dtype, by name.

    Gradients flow into `weights`, if they are float64.
    """
    return _Reference(config, {name: tensor.double() for name, tensor in weights.items()}).forward(
        x_t.double(), t, label
    )


class _Reference:
    def __init__(self, config: UNetConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        config = self.config
        half = config.width // 2
        frequency = [math.exp(-math.log(10_000) * i / (half - config.freq_shift)) for i in range(half)]
        angle = (t.double() * config.time_scale)[:, None] * torch.tensor(frequency, dtype=torch.float64)
        temb = torch.cat([angle.sin(), angle.cos()], dim=1).float().double()  # the network rounds its sinusoids once
        temb = self.linear("time2", F.silu(self.linear("time1", temb)))
        if label is not None:
            temb = temb + self.weights["label.weight"][label]
        temb = F.silu(temb)

        num_levels = len(config.channels or config.multipliers)
        h = self.conv("conv_in", x_t)
        skips = [h]
        for i in range(num_levels):
            for j in range(config.blocks):
                h = self.attend(f"down.{i}.attentions.{j}", self.block(f"down.{i}.blocks.{j}", h, temb))
                skips.append(h)
            if i < num_levels - 1:
                h = self.down(f"down.{i}.resample", h, temb)
                skips.append(h)
        h = self.attend("mid.attention", self.block("mid.block1", h, temb))
        h = self.block("mid.block2", h, temb)
        for i in range(num_levels):
            for j in range(config.blocks + 1):
                h = torch.cat([h, skips.pop()], dim=1)
                h = self.attend(f"up.{i}.attentions.{j}", self.block(f"up.{i}.blocks.{j}", h, temb))
            if i < num_levels - 1:
                h = self.up(f"up.{i}.resample", h, temb)
        return self.conv("conv_out", F.silu(self.norm("norm_out", h)))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride, padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        config = self.config
        return F.group_norm(
            x, config.groups, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], config.norm_eps
        )

    def block(self, name: str, x: Tensor, temb: Tensor, resample: str = "") -> Tensor:
        h = F.silu(self.norm(f"{name}.norm1", x))
        if resample == "down":
            h, x = (F.avg_pool2d(value, 2) for value in (h, x))
        elif resample == "up":
            h, x = (value.repeat_interleave(2, 2).repeat_interleave(2, 3) for value in (h, x))
        h = self.conv(f"{name}.conv1", h)
        projected = self.linear(f"{name}.temb_proj", temb)[:, :, None, None]
        if self.config.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm(f"{name}.norm2", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.norm2", h + projected)
        h = self.conv(f"{name}.conv2", F.silu(h))
        return h + (self.conv(f"{name}.shortcut", x, padding=0) if f"{name}.shortcut.weight" in self.weights else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        """Attend where the network has weights for it, each head by itself."""
        if f"{name}.q.weight" not in self.weights:
            return x
        n, c, height, width = x.shape
        tokens = self.norm(f"{name}.norm", x).flatten(2).transpose(1, 2)
        q, k, v = (self.linear(f"{name}.{part}", tokens) for part in "qkv")
        size = self.config.head_channels or c // self.config.heads
        outs = []
        for first in range(0, c, size):
            one = slice(first, first + size)
            scores = q[..., one] @ k[..., one].transpose(1, 2) / math.sqrt(size)
            outs.append(torch.softmax(scores, dim=-1) @ v[..., one])
        out = self.linear(f"{name}.proj", torch.cat(outs, dim=-1))
        return x + out.transpose(1, 2).reshape(n, c, height, width)

    def down(self, name: str, x: Tensor, temb: Tensor) -> Tensor:
        if self.config.resample == "resblock":
            return self.block(name, x, temb, "down")
        if self.config.downsample_padding:
            return self.conv(f"{name}.conv", x, stride=2)
        return self.conv(f"{name}.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)

    def up(self, name: str, x: Tensor, temb: Tensor) -> Tensor:
        if self.config.resample == "resblock":
            return self.block(name, x, temb, "up")
        return self.conv(f"{name}.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
