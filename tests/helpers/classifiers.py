"""Small classifiers of noisy images, and what one computes a second time, in float64."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from helpers.networks import TINY, shaken
from torch import Tensor

from fastddpm.config import DiffusionConfig, UNetConfig
from fastddpm.data import Dataset
from fastddpm.sampling.classifier import Classifier
from fastddpm.sampling.classifier_config import ClassifierConfig, ClassifierTraining

CLASSES = 3
# 6x6 images of two levels, with attention in one of them.
EASY = dataclasses.replace(
    TINY, image_size=6, image_channels=1, width=8, attention_resolutions=(3,), groups=4, num_classes=CLASSES
)


def config(unet: UNetConfig = EASY, diffusion: DiffusionConfig | None = None, **train: Any) -> ClassifierConfig:
    options: dict[str, Any] = {
        "steps": 4, "batch": 16, "warmup": 0, "lr": 3e-3, "decay": "none", "flip": False, "save_every": 2,
        "log_every": 2, **train,
    }  # fmt: skip
    return ClassifierConfig(unet, diffusion or DiffusionConfig(), ClassifierTraining(**options))


def random_classifier(unet: UNetConfig | None = None, diffusion: DiffusionConfig | None = None) -> Classifier:
    """Every weight is random and of a size that matters, also those that begin at zero."""
    torch.manual_seed(0)
    classifier = Classifier(config(unet or dataclasses.replace(TINY, num_classes=CLASSES), diffusion))
    shaken(classifier, 0.2)
    return classifier.requires_grad_(False)


def shades(count: int = 96) -> Dataset:
    """Images of three classes: dark, grey and bright, with a little noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    levels = np.array([20, 128, 235])[labels].reshape(-1, 1, 1, 1) + rng.normal(0, 8, (count, 1, 6, 6))
    return Dataset.of(levels.clip(0, 255).astype(np.uint8), labels, "shades", ("dark", "grey", "bright"))


def logits64(classifier: Classifier, x: Tensor, t: Tensor) -> Tensor:
    """The network once more, in PyTorch's operators and in the precision of x, from the names of its weights."""
    weights = {name: tensor.to(x.dtype) for name, tensor in classifier.state_dict().items()}
    unet = classifier.config.unet

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def conv(name: str, values: Tensor, **options: Any) -> Tensor:
        return F.conv2d(values, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def norm(name: str, values: Tensor) -> Tensor:
        return F.group_norm(values, unet.groups, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def block(name: str, h: Tensor) -> Tensor:
        out = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)), padding=1)
        out = norm(f"{name}.norm2", out + linear(f"{name}.temb_proj", temb)[:, :, None, None])
        out = conv(f"{name}.conv2", F.silu(out), padding=1)
        return out + (conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in weights else h)

    def attention(name: str, h: Tensor) -> Tensor:
        tokens = norm(f"{name}.norm", h).flatten(2).mT
        q, k, v = (linear(f"{name}.{each}", tokens) for each in "qkv")
        mixed = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v
        return h + linear(f"{name}.proj", mixed).mT.reshape(h.shape)

    half = unet.width // 2
    frequencies = torch.tensor([10000 ** (-i / (half - 1)) for i in range(half)], dtype=x.dtype)
    angles = t.to(x.dtype)[:, None] * frequencies
    temb = F.silu(linear("trunk.time1", torch.cat([angles.sin(), angles.cos()], 1)))
    temb = F.silu(linear("trunk.time2", temb))
    h, size = conv("trunk.conv_in", x, padding=1), unet.image_size
    for level in range(len(unet.multipliers)):
        for i in range(unet.blocks):
            h = block(f"trunk.down.{level}.blocks.{i}", h)
            if size in unet.attention_resolutions:
                h = attention(f"trunk.down.{level}.attentions.{i}", h)
        if level < len(unet.multipliers) - 1:
            h, size = conv(f"trunk.down.{level}.resample.conv", F.pad(h, (0, 1, 0, 1)), stride=2), size // 2
    h = block("trunk.mid.block2", attention("trunk.mid.attention", block("trunk.mid.block1", h)))
    return linear("head", F.silu(norm("norm_out", h)).mean((2, 3)))
