"""A training step of a preset by name of the side: ours, and the loops of plain PyTorch and diffusers.

In "bf16" ours trains with `TrainConfig.precision`, and the others run their network under torch.autocast.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import DEVICE
from peers import diffusers_unet, unet
from plain import PlainUNet
from torch import Tensor

import fastddpm
from fastddpm.data import Dataset
from fastddpm.training.trainer import Trainer

OURS = ("fastddpm", "fastddpm, compiled")
PEERS = (*OURS, "torch eager", "torch.compile", "diffusers", "diffusers, compiled")


def training_step(peer: str, preset: str, batch: int, precision: str) -> Callable[[], object]:
    """A call is one step of `peer`, one of `PEERS`, in `precision`, "fp32" or "bf16"."""
    if peer in OURS:
        return ours(preset, batch, precision, compiled="compiled" in peer)
    return theirs(peer, preset, batch, precision)


def images_of(preset: str) -> np.ndarray:
    config = fastddpm.preset(preset).unet
    shape = (512, config.image_channels, config.image_size, config.image_size)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def ours(preset: str, batch: int, precision: str, *, compiled: bool = False) -> Callable[[], object]:
    config, images = fastddpm.preset(preset), images_of(preset)
    labels = np.arange(len(images), dtype=np.int64) % max(1, config.unet.num_classes)
    config = replace(config, train=replace(config.train, batch=batch, precision=precision, compile=compiled))
    return Trainer(config, Dataset(images, labels, "noise", "0" * 64), DEVICE).train_step


def theirs(peer: str, preset: str, batch: int, precision: str) -> Callable[[], object]:
    """The loop of diffusers' unconditional example: randn noise, mean square, clipping, Adam, an average of weights."""
    network = unet(preset)
    model: Any = diffusers_unet(network, preset) if "diffusers" in peer else PlainUNet(network)
    model = model.to(memory_format=torch.channels_last).train()
    called = torch.compile(model, dynamic=False) if "compile" in peer else model
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9999)
    )
    alpha_bar = torch.tensor(fastddpm.Diffusion(fastddpm.preset(preset).diffusion).alpha_bar, device=DEVICE).float()
    images = torch.from_numpy(images_of(preset)).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        arguments = (x_t, t, torch.zeros_like(t)) if network.config.num_classes else (x_t, t)
        out = called(*arguments)
        return out.sample if "diffusers" in peer else out

    def step() -> None:
        chosen = torch.randint(len(images), (batch,), generator=generator, device=DEVICE)
        x0 = images[chosen].float() / 127.5 - 1
        eps = torch.randn(x0.shape, generator=generator, device=DEVICE)
        t = torch.randint(1000, (batch,), generator=generator, device=DEVICE)
        scale = alpha_bar[t][:, None, None, None]
        x_t = (scale.sqrt() * x0 + (1 - scale).sqrt() * eps).contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.mse_loss(predict(x_t, t).float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)

    return step
