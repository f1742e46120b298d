"""Weights that are cast to bfloat16 all at once: the bits of torch.autocast."""

from typing import Any

import pytest
import torch
from helpers.networks import shaken, tiny
from helpers.training import CPU, noise_images, tiny_preset, whole_state
from torch import Tensor, nn

from fastddpm.kernels import native
from fastddpm.training import trainer as trainer_module
from fastddpm.training.casts import with_cast_weights
from fastddpm.training.trainer import Trainer
from fastddpm.unet import UNet


@pytest.fixture(autouse=True)
def convolutions_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which this is for: without casts, a CPU's library would compute them in another way."""
    monkeypatch.setattr(native, "has_bf16", lambda: False)


def found(call: Any, unet: UNet, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, *unet.config.image_shape)
    unet.zero_grad()
    with torch.autocast("cpu", dtype):
        out = call(x, torch.tensor([1, 500, 999]))
    out.float().square().sum().backward()
    gradients = [p.grad for p in unet.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [out, *gradients]  # type: ignore[list-item]


def test_the_numbers_are_those_of_autocast() -> None:
    """A shortcut that is split, embeddings, attention; gradients in float32, laid out as their parameters."""
    torch.manual_seed(0)
    unet = shaken(UNet(tiny(dropout=0.0))).train().channels_last()  # type: ignore[operator]
    expected = [tensor.clone() for tensor in found(unet, unet)]
    ours = found(with_cast_weights(unet), unet)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    for p in unet.parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.stride() == p.stride()
        assert p.dtype == torch.float32


def test_the_layers_see_bfloat16_and_frozen_weights_are_left_alone() -> None:
    unet = UNet(tiny(dropout=0.0))
    unet.conv_in.weight.requires_grad_(False)
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        return lambda module, inputs: seen.__setitem__(name, module.weight.dtype)

    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note(name))
    with torch.autocast("cpu", torch.bfloat16):
        with_cast_weights(unet)(torch.randn(2, *unet.config.image_shape), torch.tensor([1, 2]))
    assert seen.pop("conv_in") == torch.float32
    assert set(seen.values()) == {torch.bfloat16}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_autocast(accumulate: int) -> None:
    states = []
    for cast in (False, True):
        owner = Trainer(tiny_preset(precision="bf16", accumulate=accumulate), noise_images(), CPU)
        if cast:
            owner._network = trainer_module._autocast(with_cast_weights(owner.network), CPU)
        results = [owner.train_step() for _ in range(2)]
        states.append(whole_state(owner) | {f"{i}{j}": t for i, r in enumerate(results) for j, t in enumerate(r)})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
