"""Images come from the weights and the module that the user holds, however they were changed between two calls."""

import copy
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.marks import slow
from helpers.networks import SMALL, random_model
from torch import Tensor, nn

from fastddpm.config import EngineConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.kernels import native
from fastddpm.sampling.engine import current
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet import UNet

SEEDS = [3, 7]
ENGINES = {"library": EngineConfig(), "torch": EngineConfig(native=False)}
BOTH = ["library", slow("torch")]


def network() -> UNet:
    return random_model(SMALL).unet


def sampler_of(unet: nn.Module, engine: str = "library") -> Sampler:
    return Sampler(unet, Diffusion(), steps=3, engine=ENGINES[engine])  # type: ignore[arg-type]


def other_weights() -> list[Tensor]:
    return [p.detach() + 0.05 * torch.randn_like(p) for p in network().parameters()]


def by_data(unet: UNet, weights: list[Tensor]) -> None:
    for p, w in zip(unet.parameters(), weights, strict=True):
        p.data.copy_(w)


def by_foreach(unet: UNet, weights: list[Tensor]) -> None:
    torch._foreach_copy_([p.data for p in unet.parameters()], weights)


def by_numpy(unet: UNet, weights: list[Tensor]) -> None:
    for p, w in zip(unet.parameters(), weights, strict=True):
        p.detach().numpy()[...] = w.numpy()


def by_state_dict(unet: UNet, weights: list[Tensor]) -> None:
    unet.load_state_dict(dict(zip((name for name, _ in unet.named_parameters()), weights, strict=True)))


def by_assignment(unet: UNet, weights: list[Tensor]) -> None:
    named = dict(zip((name for name, _ in unet.named_parameters()), weights, strict=True))
    unet.load_state_dict(named, assign=True)


def one_element(unet: UNet, weights: list[Tensor]) -> None:
    unet.conv_in.weight.data[0, 0, 0, 0] += 0.5


def permuted(unet: UNet, weights: list[Tensor]) -> None:
    """The same numbers elsewhere."""
    unet.conv_in.weight.data.copy_(unet.conv_in.weight.data.flip(2, 3))


def swapped(unet: UNet, weights: list[Tensor]) -> None:
    block = unet.mid
    first, second = block.block1.conv1.weight.data.clone(), block.block2.conv1.weight.data.clone()
    block.block1.conv1.weight.data.copy_(second)
    block.block2.conv1.weight.data.copy_(first)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize(
    "change",
    [by_data, by_foreach, by_numpy, by_state_dict, by_assignment, one_element, permuted, swapped],
    ids=lambda change: change.__name__,
)
def test_changed_weights_are_seen(change: Callable[[UNet, list[Tensor]], None], engine: str) -> None:
    unet = network()
    sampler = sampler_of(unet, engine)
    before, settings = sampler.sample(SEEDS), sampler.settings()
    change(unet, other_weights())
    after = sampler.sample(SEEDS)
    fresh = sampler_of(copy.deepcopy(unet), engine)
    assert torch.equal(after, fresh.sample(SEEDS)) and not torch.equal(after, before)
    assert sampler.settings() == fresh.settings() and sampler.settings()["network"] != settings["network"]
    x_t, t = torch.randn(2, *after.shape[1:]), torch.tensor([5, 5])
    one_element(unet, [])
    assert torch.equal(sampler.denoise(x_t, t), sampler_of(copy.deepcopy(unet), engine).denoise(x_t, t))


def test_weights_that_are_promised_not_to_change_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, x_t = sampler_of(network()), torch.randn(1, 3, 8, 8)
    expected = sampler.denoise(x_t, 5)
    compared: list[int] = []
    monkeypatch.setattr(current, "digest", lambda tensors: compared.append(len(tensors)) or 0)
    with sampler.unchanging():
        compared.clear()
        assert torch.equal(sampler.denoise(x_t, 5), expected) and torch.equal(sampler.denoise(x_t, 5), expected)
        assert compared == []
    sampler.denoise(x_t, 5)
    assert len(compared) == 1


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_the_digest_sees_every_byte_and_no_thread() -> None:
    generator = np.random.default_rng(0)
    memory = [torch.from_numpy(generator.integers(256, size=n, dtype=np.uint8)) for n in (1, 255, 65536, 300_001, 0)]
    expected = native.digest(memory)
    torch.set_num_threads(3)
    assert native.digest(memory) == expected
    torch.set_num_threads(1)
    for isa in native.ISAS:
        native.isa(isa)
        assert native.digest(memory) == expected
    native.isa(native.ISAS[-1])
    for part in memory[:4]:
        for place in {0, len(part) // 2, len(part) - 1}:
            part[place] ^= 1
            assert native.digest(memory) != expected
            part[place] ^= 1
    assert native.digest(memory[::-1]) != expected and native.digest(memory) == expected


class Doubled(UNet):
    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, noise_key: object = None) -> Tensor:
        return 2 * super().forward(x_t, t, label)


class LowRank(nn.Module):
    """A linear layer with an update of rank 1 (LoRA)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.a, self.b = nn.Parameter(torch.ones(1, layer.in_features)), nn.Parameter(torch.ones(layer.out_features, 1))
        self.weight, self.bias = layer.weight, layer.bias

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.1 * x @ self.a.t() @ self.b.t()


def a_subclass(unet: UNet) -> nn.Module:
    other = Doubled(unet.config)
    other.load_state_dict(unet.state_dict())
    return other.eval()


def a_hook(unet: UNet) -> nn.Module:
    unet.mid.block1.register_forward_hook(lambda module, inputs, out: 2 * out)
    return unet


def a_pre_hook(unet: UNet) -> nn.Module:
    unet.conv_out.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return unet


def a_replaced_layer(unet: UNet) -> nn.Module:
    unet.mid.attention.q = LowRank(unet.mid.attention.q)  # type: ignore[assignment]
    unet.mid.attention.v = LowRank(unet.mid.attention.v)  # type: ignore[assignment]
    return unet


def a_replaced_forward(unet: UNet) -> nn.Module:
    forward = unet.norm_out.forward
    unet.norm_out.forward = lambda x: 2 * forward(x)  # type: ignore[assignment,misc]
    return unet


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_subclass, "it is a Doubled, not a UNet"),
        (a_hook, "its mid.block1 has a forward hook"),
        (a_pre_hook, "its conv_out has a forward hook"),
        (a_replaced_layer, "its mid.attention.q is a LowRank, not a Linear"),
        (a_replaced_forward, "the forward of its norm_out was replaced"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_network_with_code_of_its_own_is_run_as_it_is(
    change: Callable[[UNet], nn.Module], reason: str, engine: str
) -> None:
    unet = network()
    sampler = sampler_of(unet, engine)
    before = sampler.sample(SEEDS)
    changed = change(unet)
    sampler = sampler_of(changed, engine) if changed is not unet else sampler
    with pytest.warns(UserWarning, match=f"run as it is, .* since {reason}"):
        after = sampler.sample(SEEDS)
    assert not torch.equal(after, before)
    x_t, t = torch.randn(2, *after.shape[1:]), torch.tensor([5, 9])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert torch.equal(sampler.denoise(x_t, t), changed(x_t, t))
        sampler.sample(SEEDS)


@pytest.mark.parametrize("option", [{"compile": True}, {"precision": "bf16"}])
def test_what_only_an_engine_can_do_is_refused_for_it(option: dict[str, object]) -> None:
    engine = EngineConfig(**option)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"engine option {next(iter(option))} is for a UNet as it is configured"):
        Sampler(a_subclass(network()), Diffusion(), steps=2, engine=engine).sample([1])  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_that_surrounds_the_call_changes_the_images(engine: str) -> None:
    unet = network()
    expected = sampler_of(unet, engine).sample(SEEDS)
    with torch.autocast("cpu", torch.bfloat16):
        sampler = sampler_of(unet, engine)
        assert torch.equal(sampler.sample(SEEDS), expected)
    assert torch.equal(sampler.sample(SEEDS), expected)
    with torch.inference_mode():
        sampler = sampler_of(unet, engine)
        assert torch.equal(sampler.sample(SEEDS), expected)
    assert torch.equal(sampler.sample(SEEDS), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_used_sampler_can_be_copied_and_pickled(duplicate: Callable[[Sampler], Sampler]) -> None:
    sampler = sampler_of(network())
    expected = sampler.sample(SEEDS)
    assert torch.equal(duplicate(sampler).sample(SEEDS), expected) and torch.equal(sampler.sample(SEEDS), expected)


def test_numbers_that_would_be_cut_are_refused() -> None:
    unet = network()
    with pytest.raises(UsageError, match="timesteps must be integers"):
        Sampler(unet, Diffusion(), timesteps=[5.7, 2.2])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"seeds must be a sequence, such as range\(4\)"):
        sampler_of(unet).sample(4)  # type: ignore[arg-type]
