"""The sampler with networks that are no UNet: the chain in float64, and what is refused before it begins."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.own_networks import MLP, ByClass
from torch import Tensor, nn

from fastddpm.config import DiffusionConfig, EngineConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.kernels.philox import STREAM_EXAMPLE, STREAM_FORWARD
from fastddpm.ops.noise import NoiseKey
from fastddpm.sampling.sampler import Sampler

SHAPE = (1, 2, 2)
SEEDS = [3, 2**32 - 1, 8]


def exactly(network: nn.Module, *label: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """The network in float64, as NumPy calls it."""
    double = type(network)().double()
    double.load_state_dict(network.state_dict())

    def predict(x: np.ndarray, t: int) -> np.ndarray:
        labels = [torch.full((len(x),), each) for each in label]
        with torch.no_grad():
            return double(torch.from_numpy(x), torch.full((len(x),), t), *labels).numpy()

    return predict


@pytest.mark.parametrize("eta", [None, 0.0, 0.7], ids=["ancestral", "ddim", "ddim with noise"])
def test_the_chain_is_algorithm_2(eta: float | None) -> None:
    torch.manual_seed(0)
    network = MLP()
    method: dict[str, Any] = {} if eta is None else {"method": "ddim", "eta": eta}
    sampler = Sampler(network, Diffusion(), 25, seed=-7, shape=SHAPE, **method)
    expected = oracle.reverse_chain(exactly(network), sampler.timesteps, np.array(SEEDS), -7, eta=eta)
    images = sampler.sample(SEEDS)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(images.numpy(), expected, atol=2e-5)
    assert torch.equal(sampler.guided(1.0).sample(SEEDS), images)  # the copy knows the shape, too


def test_guidance_extrapolates_from_the_null_label() -> None:
    torch.manual_seed(1)
    network = ByClass()
    network.null_label = 3
    sampler = Sampler(network, Diffusion(), 20, guidance=2.5, shape=SHAPE, num_classes=3)
    given, none = exactly(network, 1), exactly(network, 3)
    expected = oracle.reverse_chain(
        lambda x, t: none(x, t) + 2.5 * (given(x, t) - none(x, t)), sampler.timesteps, np.array(SEEDS), 0
    )
    np.testing.assert_allclose(sampler.sample(SEEDS, [1, 1, 1]).numpy(), expected, atol=5e-5)
    assert sampler.labels_for([4, 5, 6]) == [1, 2, 0]


def test_weights_of_another_dtype_are_evaluated_in_it() -> None:
    torch.manual_seed(0)
    network = MLP()
    expected = Sampler(network, Diffusion(), 10, shape=SHAPE).sample(SEEDS)
    double = Sampler(network.double(), Diffusion(), 10, shape=SHAPE)
    torch.testing.assert_close(double.sample(SEEDS), expected, atol=1e-5, rtol=0)
    assert double.settings()["precision"] == "float64"
    half = Sampler(network.bfloat16(), Diffusion(), 10, shape=SHAPE).sample(SEEDS)
    assert half.dtype == torch.float32 and 0 < (half - expected).abs().max() < 0.2


def test_changes_of_weights_and_buffers_are_seen() -> None:
    torch.manual_seed(0)
    network = MLP()
    sampler = Sampler(network, Diffusion(), 5, shape=SHAPE)
    before, settings = sampler.sample(SEEDS), sampler.settings()
    network.scale.mul_(300)
    assert sampler.settings()["network"] != settings["network"]
    assert not torch.equal(sampler.sample(SEEDS), before)
    kept = list(sampler._chains.values())
    network.last.bias = nn.Parameter(torch.ones(4))  # elsewhere in memory, which a captured step would not notice
    sampler.sample(SEEDS)
    assert not any(chain in kept for chain in sampler._chains.values())


def test_every_layer_is_in_evaluation_mode_and_afterwards_as_it_was() -> None:
    network = MLP(awkward=True).train()
    network.first.eval()
    modes = {name: module.training for name, module in network.named_modules()}
    Sampler(network, Diffusion(), 3, shape=SHAPE).sample(SEEDS)
    assert network.calls == 0 and {name: module.training for name, module in network.named_modules()} == modes
    network.eval().dropout.train()
    sampler = Sampler(network, Diffusion(), 3, shape=SHAPE)
    assert torch.equal(sampler.sample(SEEDS), sampler.sample(SEEDS)) and network.dropout.training


def test_the_loss_is_equation_14() -> None:
    torch.manual_seed(0)
    network, images = MLP(), np.arange(40, 56)
    pixels = np.random.default_rng(0).integers(0, 256, (16, *SHAPE), dtype=np.uint8)
    t = np.floor(oracle.image_words(4, images, 5, 6, STREAM_EXAMPLE)[:, 0] / 2**32 * 1000).astype(int)
    eps = oracle.normals(SHAPE, images, 5, 6, STREAM_FORWARD)
    x_t = oracle.Process.respaced().forward(t, pixels / 127.5 - 1, eps)
    out = np.concatenate([exactly(network)(x_t[i : i + 1], int(t[i])) for i in range(16)])
    losses, _ = Diffusion().loss(network, torch.from_numpy(pixels), NoiseKey.of(5, 6, images.tolist()))
    np.testing.assert_allclose(losses.detach().numpy(), ((out - eps) ** 2).mean((1, 2, 3)), rtol=1e-4)


class Other(nn.Module):
    """A network that answers with what it is given."""

    def __init__(self, answer: Callable[[Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.answer = answer
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x_t: Tensor, t: Tensor) -> Any:
        return self.answer(x_t)


def same(x_t: Tensor) -> Tensor:
    return x_t


def test_a_network_without_parameters_will_do() -> None:
    sampler = Sampler(Other(same, image_shape=[3, 4, 6]), Diffusion(DiffusionConfig(prediction="x0")), 4)
    assert sampler.sample([1]).shape == (1, 3, 4, 6) and sampler.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (MLP(), {}, "the image shape of MLP is unknown: give shape=(C, H, W), or set its image_shape"),
        (same, {"shape": SHAPE}, "a network must be a torch.nn.Module; got function: wrap it in a module"),
        (Other(same, image_shape=(1, 4, 4)), {"shape": SHAPE}, "shape is (1, 2, 2), but Other is for images (1, 4, 4)"),
        (MLP(), {"shape": (2, 2)}, "three positive integers, (C, H, W); got (2, 2)"),
        (MLP(), {"shape": SHAPE, "num_classes": 3}, "MLP.forward(x_t: "),
        (MLP(), {"shape": SHAPE, "num_classes": 3}, "is called as forward(x_t, t, label), since it has 3 classes: too"),
        (ByClass(), {"shape": SHAPE}, "is called as forward(x_t, t): missing a required argument: 'label'"),
        (Other(same, image_shape=32), {}, "three positive integers, (C, H, W); got (32,)"),
        (Other(same, num_classes=2), {"shape": SHAPE, "num_classes": 3}, "num_classes is 3, but Other has 2"),
        (MLP(), {"shape": SHAPE, "num_classes": -1}, "num_classes must be an integer, 0 or more; got -1"),
        (Other(same, null_label=3), {"shape": SHAPE}, "null_label 3 needs num_classes; the network has none"),
        (MLP(), {"shape": SHAPE, "guidance": 2.0}, "guidance needs a network trained with label_dropout > 0, which"),
    ],
)
def test_what_cannot_be_called_is_refused_when_the_sampler_is_made(network: Any, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Sampler(network, Diffusion(), 3, **options)


@pytest.mark.parametrize("option", [{"fp8": True}, {"compile": True}, {"precision": "bf16"}])
def test_what_only_an_engine_can_do_is_refused(option: Any) -> None:
    with pytest.raises(UsageError, match=f"engine option {next(iter(option))} is for a UNet"):
        Sampler(MLP(), Diffusion(), 3, shape=SHAPE, engine=EngineConfig(**option)).sample([0])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: torch.cat([x, x], 1), r"\(1, 1, 2, 2\) for images \(1, 1, 2, 2\) and a fixed .*got .* \(1, 2, 2, 2"),
        (lambda x: x.long(), r"a network must return a floating \(1, 1, 2, 2\) .*; got torch.int64 \(1, 1, 2, 2\)"),
        (lambda x: {"sample": x}, r"a network must return a tensor \(1, 1, 2, 2\); got a dict"),
    ],
)
def test_another_output_is_refused(answer: Callable[[Tensor], Any], message: str) -> None:
    network = Other(answer, image_shape=SHAPE)
    with pytest.raises(UsageError, match=message):
        Sampler(network, Diffusion(), 3).sample([0])
    with pytest.raises(UsageError, match=message):
        Diffusion().loss(network, torch.zeros(1, *SHAPE), NoiseKey.of(0, 0, [0]))


class Sized(torch.nn.Module):
    """A convolution of three channels."""

    image_shape = (3, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x_t)
        return out


@pytest.mark.parametrize(
    ("network", "channels", "message"),
    [
        (Sized(), 1, r"Sized is for images \(3, 4, 4\), and got \(1, 4, 4\); its forward failed: Given groups=1"),
        (
            Sized().bfloat16(),
            3,
            r"Sized has weights of torch.bfloat16, and x_t is torch.float32; train float32 weights",
        ),
        (Sized().double(), 3, r"Sized has weights of torch.float64, and x_t is torch.float32; train float32 weights"),
    ],
)
def test_images_that_are_not_the_networks_own_are_refused(network: Sized, channels: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Diffusion().loss(network, torch.zeros(2, channels, 4, 4), NoiseKey.of(0, 0, [0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": 0}, "key must be a NoiseKey, such as NoiseKey.draw(len(images), device); got 0"),
        ({"key": NoiseKey.of(0, 0, [1])}, "key is of 1 images, and there are 2"),
        ({"label": torch.zeros(2)}, "label must be int64 (2,); got torch.float32 (2,)"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, "label must be int64 (2,); got torch.int64 (3,)"),
        ({"label_dropout": 1.5}, "label_dropout must be in [0, 1]; got 1.5"),
        (
            {"label": torch.zeros(2, dtype=torch.int64), "label_dropout": 0.5},
            "label_dropout needs null_label, the label that means none",
        ),
    ],
)
def test_arguments_of_the_loss_that_do_not_go_together_are_refused(options: Any, message: str) -> None:
    given = {"key": NoiseKey.of(0, 0, [0, 1])} | options
    with pytest.raises(UsageError, match=re.escape(message)):
        Diffusion().loss(Sized(), torch.zeros(2, 3, 4, 4), **given)


def test_a_failure_of_the_networks_own_stays_as_it_is() -> None:
    def fails(x_t: Tensor) -> Tensor:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        Diffusion().loss(Other(fails, image_shape=SHAPE), torch.zeros(1, *SHAPE), NoiseKey.of(0, 0, [0]))


class Writes(torch.nn.Module):
    """Doubles one of its arguments where it stands."""

    image_shape = (1, 4, 4)

    def __init__(self, argument: str) -> None:
        super().__init__()
        self.layer, self.argument = torch.nn.Conv2d(1, 1, 1), argument

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x_t) * (1 + t.view(-1, 1, 1, 1))
        {"x_t": x_t, "t": t}[self.argument].mul_(2)
        return out


@pytest.mark.parametrize("argument", ["x_t", "t"])
def test_a_network_that_writes_into_its_arguments_is_refused(argument: str) -> None:
    """The chain and the loss read them again."""
    diffusion, network = Diffusion(DiffusionConfig(prediction="v")), Writes(argument)
    with pytest.raises(UsageError, match="writes into x_t, t or label"):
        Sampler(network, diffusion, steps=3).sample([0])
    key = NoiseKey(torch.tensor(0), torch.tensor(0), torch.arange(2))
    with torch.no_grad(), pytest.raises(UsageError, match="writes into x_t, t or label"):
        diffusion.loss(network, torch.zeros(2, 1, 4, 4), key)
