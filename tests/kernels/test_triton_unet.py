"""The whole network on the Triton kernels: its numbers, and that no hot path goes around them."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.ops import use_backend
from fastddpm.ops.noise import NoiseKey
from fastddpm.presets import PRESETS
from fastddpm.unet import AttnBlock, GroupNormSiLU, UNet

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter, which a GPU replaces")

from helpers.triton_ladder import on_triton  # noqa: E402


class Calls(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names[f"{func.namespace}.{func.__name__.partition('.')[0]}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def unet() -> UNet:
    """The mnist preset with dropout, and no weight near zero, so that every branch counts."""
    torch.manual_seed(0)
    config = PRESETS["mnist"].unet
    network = UNet(config.__class__(**(vars(config) | {"dropout": 0.1})))
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return network.channels_last()


NOISE = torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def step(unet: UNet) -> list[Tensor]:
    """Output and gradients of one training step; the same each time."""
    x = NOISE[0].to(memory_format=torch.channels_last)
    key = NoiseKey(seed=torch.tensor(5), images=torch.tensor([3, 4]), step=torch.tensor(6))
    unet.zero_grad()
    out = unet.train()(x, torch.tensor([10, 900]), torch.tensor([1, 10]), key)
    out.backward(NOISE[1])
    return [out.detach(), *(parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None)]


@dataclass(frozen=True)
class Step:
    """A training step: its output and gradients, what it asked torch for, and the Triton kernels that it launched."""

    values: list[Tensor]
    calls: Counter[str]
    launched: list[str]


@pytest.fixture(scope="module")
def reference(unet: UNet) -> Step:
    with use_backend("reference"), Calls() as calls:
        return Step(step(unet), calls.names, [])


@pytest.fixture(scope="module")
def ours(unet: UNet) -> Step:
    with pytest.MonkeyPatch.context() as patch, on_triton(patch) as launched, Calls() as calls:
        return Step(step(unet), calls.names, list(launched))


@pytest.mark.slow
def test_output_and_gradients_are_those_of_the_reference(unet: UNet, reference: Step, ours: Step) -> None:
    assert len(ours.values) == len(reference.values) == 1 + len(list(unet.parameters()))
    for a, b in zip(ours.values, reference.values, strict=True):
        # Both are float32, summed in different orders, which also differ between machines (1.6e-5 with AVX2 alone). The
        # exact gradient of the bias of k is zero, so that of the reference is rounding too.
        assert (a - b).norm() <= 2e-5 * max(b.norm(), 0.1)
    norms = sum(isinstance(module, GroupNormSiLU) for module in unet.modules())
    attentions = sum(isinstance(module, AttnBlock) for module in unet.modules())
    kinds = Counter(
        re.sub(r"^_(group_norm_silu|attention)_.*(forward|backward|kernel).*", r"\1", n) for n in ours.launched
    )
    assert kinds["group_norm_silu"] >= 3 * norms  # one kernel forward, two backward
    assert kinds["attention"] == 3 * attentions  # forward; gradients of q; gradients of k and v


@pytest.mark.slow
def test_no_hot_path_goes_around_the_kernels(unet: UNet, reference: Step, ours: Step) -> None:
    """A training step asks torch for nothing that a kernel is there for."""
    calls = ours.calls
    assert calls == reference.calls
    norms = sum(isinstance(module, GroupNormSiLU) for module in unet.modules())
    assert calls["fastddpm.group_norm_silu"] == calls["fastddpm.group_norm_silu_backward"] == norms
    attentions = sum(isinstance(module, AttnBlock) for module in unet.modules())
    assert calls["fastddpm.attention"] == calls["fastddpm.attention_backward"] == attentions
    # What is left: the SiLU of the time embedding, twice; its sine beside its cosine, and the gradients of the weights
    # of a shortcut, of which the part for the skip is used apart. No image is concatenated.
    shortcuts = sum(len(level.blocks) for level in unet.up)
    assert calls["aten.silu"] == 2 and calls["aten.cat"] == 1 + shortcuts
    own = ("group_norm", "layer_norm", "softmax", "dot_product", "bmm", "dropout", "bernoulli", "rand", "var")
    others = [name for name in calls if name.startswith("aten.")]
    assert [name for name in others if any(word in name.removeprefix("aten.") for word in own)] == []
