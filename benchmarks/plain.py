"""The U-Net in PyTorch's own operators, as a user would write it, with the same weights."""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.unet import AttnBlock, GroupNormSiLU, Level, ResBlock, UNet


class PlainUNet(torch.nn.Module):
    """`PlainUNet(unet)(x_t, t, label)`: group_norm, silu, cat, interpolate, conv2d, scaled_dot_product_attention."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        unet = self.unet
        temb = unet.embed(t, label)
        h = _conv(unet.conv_in, x_t)
        skips = [h]
        for level in cast(Iterable[Level], unet.down):
            for i, block in enumerate(cast(Iterable[ResBlock], level.blocks)):
                h = _attend(level, i, _res_block(block, h, temb))
                skips.append(h)
            if level.resample is not None:
                h = F.conv2d(F.pad(h, (0, 1, 0, 1)), level.resample.conv.weight, level.resample.conv.bias, stride=2)
                skips.append(h)
        middle = unet.mid
        h = _res_block(middle.block2, _attention(middle.attention, _res_block(middle.block1, h, temb)), temb)
        for level in cast(Iterable[Level], unet.up):
            for i, block in enumerate(cast(Iterable[ResBlock], level.blocks)):
                h = _attend(level, i, _res_block(block, torch.cat([h, skips.pop()], dim=1), temb))
            if level.resample is not None:
                h = _conv(level.resample.conv, F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return _conv(unet.conv_out, F.silu(_norm(unet.norm_out, h)))


def _conv(layer: torch.nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def _norm(norm: GroupNormSiLU, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)


def _res_block(block: ResBlock, x: Tensor, temb: Tensor) -> Tensor:
    h = _conv(block.conv1, F.silu(_norm(block.norm1, x))) + block.temb_proj(temb)[:, :, None, None]
    h = _conv(block.conv2, F.dropout(F.silu(_norm(block.norm2, h)), block.norm2.dropout, block.training))
    return h + (x if block.shortcut is None else block.shortcut(x))


def _attend(level: Level, index: int, h: Tensor) -> Tensor:
    return _attention(cast(AttnBlock, level.attentions[index]), h) if len(level.attentions) else h


def _attention(block: AttnBlock, x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    tokens = _norm(block.norm, x).flatten(2).transpose(1, 2)
    q, k, v = (layer(tokens).unsqueeze(1) for layer in (block.q, block.k, block.v))
    out = block.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))
    return x + out.transpose(1, 2).reshape(n, c, height, width)
