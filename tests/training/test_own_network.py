"""Training networks that are no UNet: to a known optimum, resumed to the bit, and what is refused."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import team
from helpers.own_networks import MLP, ByClass
from helpers.training import CPU, tiny_preset
from torch import Tensor, nn

import fastddpm
from fastddpm.config import DiffusionConfig, Preset, TrainConfig, UNetConfig
from fastddpm.data import Dataset
from fastddpm.errors import DataError, UsageError
from fastddpm.pretrained import load_weights
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import checkpoint
from fastddpm.training.samples import Previews
from fastddpm.training.trainer import Trainer
from fastddpm.unet import UNet

T = 20


def images_of(num: int = 64, labels: bool = False) -> Dataset:
    pixels = np.random.default_rng(0).integers(60, 120, (num, 1, 2, 2), dtype=np.uint8)
    return Dataset.of(pixels, np.arange(num) % 3 if labels else None, "noise")


def preset_of(**train: Any) -> Preset:
    options = {"steps": 8, "batch": 16, "lr": 1e-2, "warmup": 0, "ema": 0.9, "log_every": 4, "flip": False}
    return Preset("own", UNetConfig(), DiffusionConfig(timesteps=T, beta_end=0.3), TrainConfig(**(options | train)))


def trainer_of(network: nn.Module, dataset: Dataset | None = None, **train: Any) -> Trainer:
    return Trainer(preset_of(**train), dataset or images_of(), CPU, network=network)


class Lines(nn.Module):
    """out = a_t x_t + b_t: the best of these is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(T)), nn.Parameter(torch.zeros(T))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a, b = (table[t].reshape(-1, 1, 1, 1) for table in (self.a, self.b))
        return a * x_t + b


def test_it_learns_the_posterior_mean_of_the_noise() -> None:
    """Of pixels with mean m and variance v, eps is best predicted by a (x_t - sqrt(ᾱ) m), with
    a = sqrt(1 - ᾱ) / (ᾱ v + 1 - ᾱ), and the loss that is left is 1 - a sqrt(1 - ᾱ)."""
    data = images_of()
    pixels = data.images / 127.5 - 1
    mean, variance = pixels.mean(), pixels.var()
    bar = np.cumprod(1 - np.linspace(1e-4, 0.3, T))
    a = np.sqrt(1 - bar) / (bar * variance + 1 - bar)
    trainer = trainer_of(Lines(), data, steps=300, lr=0.1, decay="cosine", batch=64)
    losses = [trainer.train_step()[0].item() for _ in range(300)]
    with trainer.averaged_weights() as network:
        assert isinstance(network, Lines) and network is not trainer.network and not network.training
        found_a, found_b = network.a.numpy(), network.b.numpy()
    late = slice(3, None)  # where noise is small, lines that differ in slope hardly differ in loss
    np.testing.assert_allclose(found_a[late], a[late], rtol=0.1)
    np.testing.assert_allclose(found_b[late], (-a * np.sqrt(bar) * mean)[late], rtol=0.15)
    assert losses[0] == pytest.approx(1, rel=0.2)
    assert np.mean(losses[-100:]) == pytest.approx(np.mean(1 - a * np.sqrt(1 - bar)), rel=0.05)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    average = {f"average.{name}": tensor for name, tensor in trainer.optimizer.averaged().items()}
    return {**trainer.network.state_dict(), **trainer.optimizer.state_dict(), **average}


@pytest.mark.parametrize("mode", [{}, {"mode": "paper"}, {"accumulate": 4}], ids=["standard", "paper", "accumulate"])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path: Path, mode: dict[str, Any]) -> None:
    """With dropout, a layer used twice, a frozen parameter and a buffer that changes."""

    def new(seed: int) -> Trainer:
        torch.manual_seed(seed)
        network = MLP(awkward=True)
        network.first.bias.data.fill_(0.1 * seed)  # frozen, so it comes from the checkpoint too
        return trainer_of(network, **mode)

    whole, first = new(0), new(0)
    for _ in range(8):
        whole.train_step()
    for _ in range(3):
        first.train_step()
    path = first.save(tmp_path, None)
    random_state = torch.get_rng_state()
    second = new(5)
    torch.set_rng_state(random_state)
    second.resume(checkpoint.load(path))
    for _ in range(5):
        second.train_step()
    assert torch.equal(torch.get_rng_state(), random_state)  # the user's own generator is left alone
    expected, found = state_of(whole), state_of(second)
    assert expected.keys() == found.keys() and len(expected) > 20
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert whole.network.calls == 8 * (8 if mode.get("mode") else mode.get("accumulate", 1))
    assert not torch.equal(whole.network.middle.weight, MLP().middle.weight)


def test_dropout_differs_from_step_to_step() -> None:
    torch.manual_seed(0)
    trainer = trainer_of(MLP(awkward=True), lr=1e-30)
    masks: list[Tensor] = []
    trainer.network.dropout.register_forward_hook(lambda module, inputs, out: masks.append(out == 0))
    for _ in range(3):
        trainer.train_step()
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_the_average_of_a_run_is_read_into_a_network_of_the_same_kind(tmp_path: Path) -> None:
    trainer = trainer_of(MLP(awkward=True))
    trainer.train_step()
    path = trainer.save(tmp_path, None)
    with trainer.averaged_weights() as expected:
        assert Sampler(expected, trainer.diffusion, 3).sample([1]).shape == (1, 1, 2, 2)  # it knows the shape now
    found = MLP(awkward=True)
    assert load_weights(found, tmp_path) == 1
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    with pytest.raises(UsageError, match=r"holds the weights of a network of your own \(helpers\.own_networks\.MLP\)"):
        fastddpm.load(path)
    with pytest.raises(DataError, match=r"the weights do not fit Lines: a is missing; b is missing; .* and \d more"):
        load_weights(Lines(), path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: MLP(width=8), r"this MLP: first\.weight is \(16, 5\), expected \(8, 5\)"),
        (lambda: Lines(), r"this Lines: a is missing"),
    ],
)
def test_another_network_is_not_resumed(tmp_path: Path, other: Callable[[], nn.Module], message: str) -> None:
    path = trainer_of(MLP()).save(tmp_path, None)
    with pytest.raises(DataError, match=message):
        trainer_of(other()).resume(checkpoint.load(path))


def test_classes_and_their_dropout() -> None:
    """Without label dropout each image keeps its class; with it, about as many as asked for get the null label."""
    network, seen = ByClass(), []
    network.num_classes, network.null_label = 3, 3
    network.rows.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    data = images_of(labels=True)
    trainer_of(network, data, batch=64).train_step()
    assert torch.equal(seen[0].bincount(minlength=4), torch.tensor([22, 21, 21, 0]))
    preset = preset_of(batch=64)
    preset = dataclasses.replace(preset, unet=UNetConfig(num_classes=10, label_dropout=0.5))
    Trainer(preset, data, CPU, network=network).train_step()
    assert 20 <= (seen[1] == 3).sum() <= 44
    network.null_label = None
    with pytest.raises(UsageError, match=r"label_dropout 0\.5 needs a null label, which ByClass does not have"):
        Trainer(preset, data, CPU, network=network)
    with pytest.raises(DataError, match="noise has no labels, which num_classes 3 needs"):
        trainer_of(network, images_of())
    network.num_classes = 2
    with pytest.raises(DataError, match="noise has label 2, but num_classes is 2"):
        trainer_of(network, data)


def test_a_unet_with_its_weights_is_trained_from_them() -> None:
    preset = tiny_preset(steps=1, lr=1e-30)
    unet = UNet(preset.unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    data = Dataset.of(np.zeros((16, 1, 8, 8), np.uint8), np.zeros(16, np.int64), "black")
    trainer = Trainer(preset, data, CPU, network=unet)
    trainer.train_step()
    assert trainer.network is unet
    for name, tensor in trainer.optimizer.averaged().items():
        torch.testing.assert_close(tensor, before[name])
    with pytest.raises(UsageError, match=r"the network is not the one of the preset: width: 8 -> 16"):
        Trainer(preset, data, CPU, network=UNet(dataclasses.replace(preset.unet, width=16)))


class Normed(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (lambda: Normed(), {}, r"Normed has batch normalization \(norm\), whose statistics are neither averaged"),
        (lambda: MLP().requires_grad_(False), {}, "MLP has no parameter to train"),
        (lambda: MLP().bfloat16(), {}, r"MLP has weights of torch.bfloat16 \(first.weight\), and float32 is trained"),
        (lambda: MLP(), {"checkpoint_blocks": True}, "checkpoint_blocks is for a UNet as it is configured, not for"),
        (lambda: ByClass(), {}, r"is called as forward\(x_t, t\): missing a required argument: 'label'"),
    ],
)
def test_what_cannot_be_trained_is_refused(network: Callable[[], nn.Module], options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer_of(network(), **options)


class Detached(MLP):
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return super().forward(x_t, t).detach()


class Unsized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyConv2d(1, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x_t)
        return out


@pytest.mark.parametrize("mode", ["standard", "paper"])
def test_an_output_without_a_gradient_is_refused(mode: str) -> None:
    with pytest.raises(UsageError, match="the output of Detached has no gradient: its forward detaches it"):
        trainer_of(Detached(), mode=mode).train_step()


def test_a_lazy_network_is_trained_once_it_has_its_shapes() -> None:
    lazy = Unsized()
    with pytest.raises(
        UsageError, match=r"parameters without a shape, layer\.weight for one; call it on a batch first"
    ):
        trainer_of(lazy)
    lazy(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))
    loss, _, applied = trainer_of(lazy).train_step()
    assert torch.isfinite(loss) and applied


def test_sharding_it_is_refused() -> None:
    with pytest.raises(UsageError, match="parallel fsdp is for a UNet as it is configured, not for this MLP"):
        Trainer(preset_of(parallel="fsdp"), images_of(), CPU, ProcessGroup(0, 2), network=MLP())


def four_steps(group: ProcessGroup) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses, and the weights after the last step."""
    torch.manual_seed(group.rank)  # DDP gives all the weights of rank 0
    trainer = Trainer(preset_of(lr=1e-3), images_of(), CPU, group, network=MLP())
    losses = [trainer.train_step()[0].item() for _ in range(4)]
    return np.array(losses), {name: tensor.numpy() for name, tensor in trainer.network.state_dict().items()}


@pytest.mark.slow
def test_two_processes_train_it_as_one() -> None:
    expected, weights = four_steps(SINGLE_PROCESS)
    found = team.values(2, team.grouped, four_steps)
    for losses, own in found:
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        for name, weight in weights.items():
            np.testing.assert_array_equal(own[name], found[0][1][name])
            np.testing.assert_allclose(own[name], weight, atol=1e-5)


def test_previews_are_drawn_of_it(tmp_path: Path) -> None:
    trainer = trainer_of(MLP())
    previews = Previews(tmp_path, fastddpm.preset("mnist"), every=1, count=4, report=pytest.fail)
    with trainer.averaged_weights() as network:
        assert previews.draw(1, network, trainer.diffusion) == tmp_path / "previews" / "step-00000001.png"


def test_the_example_runs(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "own_network.py"
    spec = importlib.util.spec_from_file_location("own_network", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images = module.main(2, tmp_path)
    assert images.shape == (16, 1, 16, 16) and bool(images.isfinite().all()) and (tmp_path / "samples.png").exists()
