"""The networks of other implementations, written a second time in float64 from their own tensors.

Each reads its tensors by the names and in the layouts of that implementation; nothing here imports fastddpm. Sinusoids
are rounded to float32, as in all of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]


def angles(t: Tensor, half: int, divisor: float) -> Tensor:
    return t.double()[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / divisor)


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int = 1) -> Tensor:
    """Attention of (N, C, L), each head over neighbouring channels."""
    q, k, v = (part.unflatten(1, (heads, -1)) for part in (q, k, v))
    weights = torch.softmax(torch.einsum("nhcl,nhcm->nhlm", q, k) / math.sqrt(q.shape[2]), -1)
    return torch.einsum("nhlm,nhcm->nhcl", weights, v).flatten(1, 2)


class Paper:
    """A U-Net of pesser's: TensorFlow's names with dots. The others override names and what differs."""

    eps, groups = 1e-6, 8
    layers: ClassVar = dict(
        norm1="norm1", conv1="conv1", temb="temb_proj", norm2="norm2", conv2="conv2", shortcut="nin_shortcut",
        anorm="norm", q="q", k="k", v="v", out="proj_out",
    )  # fmt: skip
    ends: ClassVar = dict(
        time1="temb.dense.0", time2="temb.dense.1", conv_in="conv_in", norm="norm_out", conv_out="conv_out"
    )
    asymmetric = True

    def __init__(self, tensors: Tensors, levels: int, blocks: int, attends: tuple[bool, ...]) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.levels, self.blocks, self.attends = levels, blocks, attends

    def names(self) -> dict[str, str]:
        """The names of modules, by path, level from the full resolution, and what they are."""
        found = {"mid0": "mid.block_1", "mida": "mid.attn_1", "mid1": "mid.block_2"}
        for i in range(self.levels):
            for path, count in (("down", self.blocks), ("up", self.blocks + 1)):
                for b in range(count):
                    found[f"{path}{i}b{b}"] = f"{path}.{i}.block.{b}"
                    found[f"{path}{i}a{b}"] = f"{path}.{i}.attn.{b}"
                found[f"{path}{i}r"] = f"{path}.{i}.{path}sample.conv"
        return found

    def weight(self, layer: str) -> Tensor:
        return self.tensors[f"{layer}.weight"]

    def bias(self, layer: str) -> Tensor:
        return self.tensors[f"{layer}.bias"]

    def sinusoids(self, t: Tensor, width: int) -> Tensor:
        a = angles(t, width // 2, width // 2 - 1)
        return torch.cat([a.sin(), a.cos()], 1).float().double()

    def linear(self, x: Tensor, layer: str) -> Tensor:
        return x @ self.weight(layer).flatten(1).T + self.bias(layer)

    def conv(self, x: Tensor, layer: str, stride: int = 1) -> Tensor:
        weight = self.weight(layer)
        padding = weight.shape[-1] // 2
        if stride == 2 and self.asymmetric:
            x, padding = F.pad(x, (0, 1, 0, 1)), 0
        return F.conv2d(x, weight, self.bias(layer), stride, padding)

    def norm(self, x: Tensor, layer: str) -> Tensor:
        return F.group_norm(x, self.groups, self.weight(layer), self.bias(layer), self.eps)

    def block(self, x: Tensor, temb: Tensor, name: str, resample: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        own = {key: f"{name}.{layer}" for key, layer in self.layers.items()}
        h = self.conv(resample(F.silu(self.norm(x, own["norm1"]))), own["conv1"])
        projected = self.linear(F.silu(temb), own["temb"])[:, :, None, None]
        if projected.shape[1] == 2 * h.shape[1]:
            scale, shift = projected.chunk(2, 1)
            h = self.norm(h, own["norm2"]) * (1 + scale) + shift
        else:
            h = self.norm(h + projected, own["norm2"])
        h = self.conv(F.silu(h), own["conv2"])
        x = resample(x)
        return h + (self.conv(x, own["shortcut"]) if h.shape[1] != x.shape[1] else x)

    def qkv(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.pixels(x, f"{name}.{self.layers[part]}") for part in "qkv")  # type: ignore[return-value]

    def pixels(self, x: Tensor, layer: str) -> Tensor:
        """A one-pixel convolution of (N, C, L)."""
        return self.weight(layer).flatten(1) @ x + self.bias(layer)[:, None]

    def attention(self, x: Tensor, name: str) -> Tensor:
        h = self.norm(x, f"{name}.{self.layers['anorm']}").flatten(2)
        return x + self.pixels(self.attend(h, name), f"{name}.{self.layers['out']}").reshape(x.shape)

    def attend(self, h: Tensor, name: str) -> Tensor:
        return attended(*self.qkv(h, name))

    def embedding(self, t: Tensor, y: Tensor | None) -> Tensor:
        width = self.weight(self.ends["time1"]).shape[1]
        hidden = F.silu(self.linear(self.sinusoids(t, width), self.ends["time1"]))
        return self.linear(hidden, self.ends["time2"])

    def down(self, h: Tensor, temb: Tensor, name: str) -> Tensor:
        return self.conv(h, name, stride=2)

    def up(self, h: Tensor, temb: Tensor, name: str) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"), name)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        names, temb = self.names(), self.embedding(t, y)
        hs = [self.conv(x, self.ends["conv_in"])]
        for i in range(self.levels):
            for b in range(self.blocks):
                h = self.block(hs[-1], temb, names[f"down{i}b{b}"])
                hs.append(self.attention(h, names[f"down{i}a{b}"]) if self.attends[i] else h)
            if i < self.levels - 1:
                hs.append(self.down(hs[-1], temb, names[f"down{i}r"]))
        h = self.block(hs[-1], temb, names["mid0"])
        h = self.block(self.attention(h, names["mida"]), temb, names["mid1"])
        for i in reversed(range(self.levels)):
            for b in range(self.blocks + 1):
                h = self.block(torch.cat([h, hs.pop()], 1), temb, names[f"up{i}b{b}"])
                h = self.attention(h, names[f"up{i}a{b}"]) if self.attends[i] else h
            if i > 0:
                h = self.up(h, temb, names[f"up{i}r"])
        return self.conv(F.silu(self.norm(h, self.ends["norm"])), self.ends["conv_out"])


class TensorFlow(Paper):
    """hojonathanho's: convolutions (height, width, in, out), linear layers (in, out)."""

    def names(self) -> dict[str, str]:
        named = {}
        for key, name in super().names().items():
            for word in ("down", "up", "block", "attn"):
                name = name.replace(f"{word}.", f"{word}_")
            named[key] = name
        return named

    def weight(self, layer: str) -> Tensor:
        layer = layer.replace("temb.dense.", "temb/dense").replace(".", "/")
        if f"{layer}/gamma" in self.tensors:
            return self.tensors[f"{layer}/gamma"]
        weight = self.tensors[f"{layer}/W"]
        if weight.ndim == 4:
            return weight.permute(3, 2, 0, 1)
        return weight.T[:, :, None, None] if layer.endswith("nin_shortcut") else weight.T

    def bias(self, layer: str) -> Tensor:
        layer = layer.replace("temb.dense.", "temb/dense").replace(".", "/")
        return self.tensors[f"{layer}/b" if f"{layer}/b" in self.tensors else f"{layer}/beta"]


class Tqch(Paper):
    layers: ClassVar = Paper.layers | {"temb": "fc", "shortcut": "skip", "out": "project_out"}
    ends: ClassVar = dict(time1="embed.0", time2="embed.2", conv_in="in_conv", norm="out_conv.0", conv_out="out_conv.2")

    def names(self) -> dict[str, str]:
        found = {"mid0": "middle.0", "mida": "middle.1", "mid1": "middle.2"}
        for i, attends in enumerate(self.attends):
            for path, count in (("down", self.blocks), ("up", self.blocks + 1)):
                level = f"{path}samples.level_{i}"
                for b in range(count):
                    found[f"{path}{i}b{b}"] = f"{level}.{b}.0" if attends else f"{level}.{b}"
                    found[f"{path}{i}a{b}"] = f"{level}.{b}.1"
                found[f"{path}{i}r"] = f"{level}.{count}.1"
        return found

    def qkv(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.pixels(x, f"{name}.project_in").chunk(3, 1))  # type: ignore[return-value]


class W86763777(Paper):
    eps, asymmetric = 1e-5, False
    layers: ClassVar = dict(
        norm1="block1.0", conv1="block1.2", temb="temb_proj.1", norm2="block2.0", conv2="block2.3",
        shortcut="shortcut", anorm="group_norm", q="proj_q", k="proj_k", v="proj_v", out="proj",
    )  # fmt: skip
    ends: ClassVar = dict(
        time1="time_embedding.timembedding.1", time2="time_embedding.timembedding.3", conv_in="head", norm="tail.0",
        conv_out="tail.2",
    )  # fmt: skip

    def names(self) -> dict[str, str]:
        found = {"mid0": "middleblocks.0", "mida": "middleblocks.0.attn", "mid1": "middleblocks.1"}
        for path, count, order in (("down", self.blocks, 1), ("up", self.blocks + 1, -1)):
            k = 0
            for i in range(self.levels)[::order]:
                for b in range(count):
                    found[f"{path}{i}b{b}"] = f"{path}blocks.{k}"
                    found[f"{path}{i}a{b}"] = f"{path}blocks.{k}.attn"
                    k += 1
                found[f"{path}{i}r"] = f"{path}blocks.{k}.main"
                k += 1
        return found

    def sinusoids(self, t: Tensor, width: int) -> Tensor:
        a = angles(t, width // 2, width // 2)
        return torch.stack([a.sin(), a.cos()], 2).flatten(1).float().double()


class OpenAI(Paper):
    """improved- and guided-diffusion's. `by_head`: rows of qkv are (head, q|k|v, channel)."""

    eps, asymmetric = 1e-5, False
    layers: ClassVar = dict(
        norm1="in_layers.0", conv1="in_layers.2", temb="emb_layers.1", norm2="out_layers.0", conv2="out_layers.3",
        shortcut="skip_connection", anorm="norm", out="proj_out",
    )  # fmt: skip
    ends: ClassVar = dict(
        time1="time_embed.0", time2="time_embed.2", conv_in="input_blocks.0.0", norm="out.0", conv_out="out.2"
    )
    heads, by_head, scale, resblock = 1, True, 1.0, False

    def names(self) -> dict[str, str]:
        found = {"mid0": "middle_block.0", "mida": "middle_block.1", "mid1": "middle_block.2"}
        k = 1
        for i in range(self.levels):
            for b in range(self.blocks):
                found |= {f"down{i}b{b}": f"input_blocks.{k}.0", f"down{i}a{b}": f"input_blocks.{k}.1"}
                k += 1
            found[f"down{i}r"] = f"input_blocks.{k}.0" + ("" if self.resblock else ".op")
            k += 1
        k = 0
        for i in reversed(range(self.levels)):
            for b in range(self.blocks + 1):
                found |= {f"up{i}b{b}": f"output_blocks.{k}.0", f"up{i}a{b}": f"output_blocks.{k}.1"}
                k += 1
            last = f"output_blocks.{k - 1}.{2 if self.attends[i] else 1}"
            found[f"up{i}r"] = last + ("" if self.resblock else ".conv")
        return found

    def sinusoids(self, t: Tensor, width: int) -> Tensor:
        a = angles(t.double() * self.scale, width // 2, width // 2)
        return torch.cat([a.cos(), a.sin()], 1).float().double()

    def embedding(self, t: Tensor, y: Tensor | None) -> Tensor:
        temb = super().embedding(t, y)
        return temb if y is None else temb + self.weight("label_emb")[y]

    def attend(self, h: Tensor, name: str) -> Tensor:
        n, _, length = h.shape
        rows = self.pixels(h, f"{name}.qkv")
        if self.by_head:  # each head's q, k and v are neighbours
            parts = rows.reshape(n * self.heads, -1, length).chunk(3, 1)
            return attended(*parts).reshape(n, -1, length)
        return attended(*rows.chunk(3, 1), self.heads)

    def down(self, h: Tensor, temb: Tensor, name: str) -> Tensor:
        return self.block(h, temb, name, lambda x: F.avg_pool2d(x, 2)) if self.resblock else super().down(h, temb, name)

    def up(self, h: Tensor, temb: Tensor, name: str) -> Tensor:
        if not self.resblock:
            return super().up(h, temb, name)
        return self.block(h, temb, name, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
