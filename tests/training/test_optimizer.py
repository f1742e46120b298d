"""One optimizer step against Adam, clipping, warm-up and EMA written out in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from fastddpm.config import TrainConfig
from fastddpm.training.optimizer import Optimizer, learning_rate

STEPS = 7


class Linear(nn.Module):
    """y = w x: its gradient is chosen freely by the loss."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32))

    def backward_with(self, gradient: np.ndarray) -> None:
        (self.weight * torch.tensor(gradient, dtype=torch.float32)).sum().backward()


class NumpyRun:
    """The same in float64. eps_hat: TensorFlow's form, eps added before the bias correction."""

    def __init__(self, weight: np.ndarray, config: TrainConfig, *, eps_hat: bool) -> None:
        self.w, self.config, self.eps_hat = weight.astype(np.float64), config, eps_hat
        self.ema, self.m, self.v, self.t = self.w.copy(), np.zeros_like(self.w), np.zeros_like(self.w), 0

    def step(self, gradient: np.ndarray, lr: float) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        if self.eps_hat:
            rate = lr * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
            self.w = self.w - rate * self.m / (np.sqrt(self.v) + 1e-8)
        else:
            m_hat, v_hat = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
            self.w = self.w - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
        self.ema = self.config.ema * self.ema + (1 - self.config.ema) * self.w


def clipped(gradient: np.ndarray, limit: float) -> np.ndarray:
    # torch divides by norm + 1e-6
    return gradient * min(1.0, limit / (np.linalg.norm(gradient) + 1e-6))


@pytest.fixture
def start() -> np.ndarray:
    return np.random.default_rng(0).normal(size=13)


def test_standard_mode_equals_adam_with_global_clip_warmup_and_ema(start: np.ndarray) -> None:
    config = TrainConfig(lr=0.1, warmup=4, ema=0.9, clip_gradient=1.0)
    network = Linear(start)
    optimizer, expected = Optimizer(network, config), NumpyRun(start, config, eps_hat=False)
    for step in range(STEPS):
        gradient = np.random.default_rng(step).normal(size=13) * (3.0 if step % 2 else 0.01)
        network.backward_with(gradient)
        norm, applied = optimizer.step(step, torch.tensor(1.0))
        expected.step(clipped(gradient, 1.0), 0.1 * min(1.0, (step + 1) / 4))
        assert bool(applied)
        assert norm.item() == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
    np.testing.assert_allclose(network.weight.detach().numpy(), expected.w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(optimizer.averaged()["weight"].numpy(), expected.ema, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.2, 0.5, 0.99])
def test_the_ramp_of_the_averages(start: np.ndarray, decay: float) -> None:
    config = TrainConfig(lr=0.1, warmup=0, ema=(decay, 0.9), ema_ramp=True)
    network = Linear(start)
    optimizer, expected = Optimizer(network, config), {decay: start.copy(), 0.9: start.copy()}
    for step in range(30):
        network.backward_with(np.random.default_rng(step).normal(size=13))
        optimizer.step(step, torch.tensor(1.0))
        for each, average in expected.items():
            ramped = min(each, (1 + step) / (10 + step))
            average += (1 - ramped) * (network.weight.detach().numpy() - average)
    for each, average in expected.items():
        np.testing.assert_allclose(optimizer.averaged(each)["weight"].numpy(), average, rtol=1e-5, atol=1e-6)


def test_paper_mode_clips_each_shard_warms_up_from_zero_and_uses_eps_hat(start: np.ndarray) -> None:
    config = TrainConfig(mode="paper", batch=16, lr=0.1, warmup=4, ema=0.9)
    network = Linear(start)
    optimizer, expected = Optimizer(network, config), NumpyRun(start, config, eps_hat=True)
    for step in range(STEPS):
        generator = np.random.default_rng(step)
        # Gradients of about 1e-8 make the place of eps matter.
        shards = [generator.normal(size=13) * (2.0 if step % 2 else 1e-8) for _ in range(8)]
        for gradient in shards:
            network.backward_with(gradient)
            optimizer.end_shard()
        optimizer.step(step, torch.tensor(1.0))
        expected.step(np.mean([clipped(g, 1.0) for g in shards], axis=0), 0.1 * min(1.0, step / 4))
        if step == 0:
            np.testing.assert_array_equal(network.weight.detach().numpy(), start.astype(np.float32))
    np.testing.assert_allclose(network.weight.detach().numpy(), expected.w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(optimizer.averaged()["weight"].numpy(), expected.ema, rtol=1e-5, atol=1e-6)


def test_the_place_of_eps_is_visible_in_the_paper_test(start: np.ndarray) -> None:
    config = TrainConfig(lr=0.1, ema=0.9)
    hat, plain = NumpyRun(start, config, eps_hat=True), NumpyRun(start, config, eps_hat=False)
    for run in (hat, plain):
        run.step(np.full(13, 1e-8), 0.1)
    assert np.abs(hat.w - plain.w).max() > 1e-3


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(start: np.ndarray, bad: str) -> None:
    network = Linear(start)
    optimizer = Optimizer(network, TrainConfig(lr=0.1, warmup=0, ema=0.9))
    network.backward_with(np.ones(13))
    optimizer.step(0, torch.tensor(1.0))
    before = {name: tensor.clone() for name, tensor in (optimizer.state_dict() | {"ema": optimizer.average[0]}).items()}

    network.backward_with(np.full(13, np.nan if bad == "gradient" else 1.0))
    _, applied = optimizer.step(1, torch.tensor(float("inf") if bad == "loss" else 1.0))
    assert not bool(applied)
    after = optimizer.state_dict() | {"ema": optimizer.average[0]}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name

    network.backward_with(np.ones(13))
    _, applied = optimizer.step(2, torch.tensor(1.0))
    assert bool(applied) and not torch.equal(optimizer.state_dict()["weight.weight"], before["weight.weight"])


def test_learning_rate_curves() -> None:
    standard, paper = TrainConfig(lr=2.0, warmup=4), TrainConfig(lr=2.0, warmup=4, mode="paper", batch=8)
    assert [learning_rate(standard, s) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert [learning_rate(paper, s) for s in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    cosine = TrainConfig(lr=2.0, warmup=2, decay="cosine", steps=10)
    assert learning_rate(cosine, 2) == pytest.approx(2.0)
    assert learning_rate(cosine, 6) == pytest.approx(1.0)
    assert learning_rate(cosine, 9) == pytest.approx(1.0 * (1 + np.cos(np.pi * 7 / 8)))


@pytest.mark.parametrize("layout_of_gradient", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_in_any_layout_are_trained_as_by_adam(
    layout: torch.memory_format, layout_of_gradient: torch.memory_format
) -> None:
    """With a gradient in either layout, against torch's Adam in plain operators on contiguous weights."""
    config = TrainConfig(lr=0.01, warmup=0, ema=0.9, clip_gradient=1.0)
    network = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Conv2d(5, 2, 1)).to(memory_format=layout)
    weights = [nn.Parameter(p.detach().clone().contiguous()) for p in network.parameters()]
    adam = torch.optim.Adam(weights, lr=0.01, foreach=False, fused=False)
    optimizer, average = Optimizer(network, config), [w.detach().clone() for w in weights]
    for step in range(STEPS):
        torch.manual_seed(step)
        for p, w in zip(network.parameters(), weights, strict=True):
            w.grad = torch.randn_like(w) * (3.0 if step % 2 else 0.01)
            layout_of_this = layout_of_gradient if w.ndim == 4 else torch.contiguous_format
            p.grad = w.grad.clone(memory_format=layout_of_this)
        optimizer.step(step, torch.zeros(()))
        nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        torch._foreach_lerp_(average, [w.detach() for w in weights], 0.1)
    state, averaged = optimizer.state_dict(), optimizer.averaged()
    for (name, p), w, a in zip(network.named_parameters(), weights, average, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(averaged[name], a, rtol=1e-6, atol=1e-7)
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = state[f"{kind}.{name}"]
            assert moment.stride() == p.stride()
            torch.testing.assert_close(moment, adam.state[w][kind], rtol=1e-5, atol=1e-8)


def test_no_gradient_is_copied_for_adam() -> None:
    network = nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last)
    optimizer = Optimizer(network, TrainConfig(warmup=0))
    network(torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)).square().sum().backward()
    with torch.profiler.profile() as profile:
        optimizer.step(0, torch.zeros(()))
    copied = [event for event in profile.events() if event.name == "aten::clone"]
    assert copied == []
