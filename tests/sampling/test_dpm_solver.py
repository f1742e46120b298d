"""DPM-Solver++(2M): its coefficients, its order, its chains, and diffusers' scheduler. The kernels: tests/ops."""

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.chains import coefficient_table
from helpers.networks import Formula
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.sampling import chain as chains
from fastddpm.sampling.inpainting import inpaint
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.step_table import first_order
from fastddpm.sampling.trajectories import trajectories

METHODS = ["dpm2m", "dpm2m-sde"]
TIMESTEPS = np.array([999, 801, 800, 300, 20, 3])


def wave(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    return torch.sin(2 * x_t + 0.01 * t)


def numpy_wave(x: np.ndarray, t: int) -> np.ndarray:
    return np.sin(2 * x + 0.01 * t)


def sampler(method: str = "dpm2m", **options: Any) -> Sampler:
    return Sampler(Formula(options.pop("formula", wave)), Diffusion(), method=method, seed=3, **options)


# Coefficients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "xprev"])
def test_first_order_rows_are_those_of_ddim(prediction: str, method: str) -> None:
    """Without noise, or with as much as eta = 1. The first and the last row are first-order."""
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))  # type: ignore[arg-type]
    table = coefficient_table(diffusion, TIMESTEPS, method, 0.0)
    ddim = coefficient_table(diffusion, TIMESTEPS, "ddim", 1.0 if method == "dpm2m-sde" else 0.0)
    np.testing.assert_allclose(first_order(table), ddim, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(table[[0, -1]], ddim[[0, -1]])
    assert (table[1:-1, 8] < 0).all() and (np.delete(table, [2, 8], 1) == np.delete(ddim, [2, 8], 1)).all()


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_the_published_formulas(method: str) -> None:
    process = oracle.Process.respaced(TIMESTEPS)
    table = coefficient_table(Diffusion(), TIMESTEPS, method, 0.0)
    for i, row in enumerate(table):
        inner = 0 < i < len(TIMESTEPS) - 1

        def mean(x: float, x0: float, previous: float, i: int = i, inner: bool = inner) -> float:
            given = (np.array(value) for value in (x, x0, previous))
            x_, x0_, previous_ = given
            return float(process.dpm_solver(i, x_, x0_, previous_ if inner else None, method == "dpm2m-sde")[0])

        _, sigma = process.dpm_solver(i, np.zeros(()), np.zeros(()), None, method == "dpm2m-sde")
        expected = [mean(0, 1, 0), mean(1, 0, 0), 0.0, sigma, 0.0, 0.0, mean(0, 0, 1)]
        np.testing.assert_allclose(row[2:], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("timesteps", [[999], [999, 0], [5, 4, 3]])
def test_chains_of_few_steps(timesteps: list[int]) -> None:
    table = coefficient_table(Diffusion(), np.array(timesteps), "dpm2m", 0.0)
    assert np.count_nonzero(table[:, 8]) == max(0, len(timesteps) - 2)


def test_a_schedule_whose_end_has_no_signal_stays_finite() -> None:
    diffusion = Diffusion(DiffusionConfig(timesteps=50, schedule="jsd", prediction="v"))
    for method in METHODS:
        table = coefficient_table(diffusion, np.arange(49, -1, -1), method, 0.0)
        assert np.isfinite(table).all() and table[1, 8] == 0 and (table[2:-1, 8] != 0).all()


# A data set whose ordinary differential equation is solved in closed form

MEAN, DEVIATION = 0.2, 0.3


def error_at(end: int, steps: int, method: str) -> float:
    """Largest error at timestep `end` of `steps` even steps from T - 1, for data from N(MEAN, DEVIATION^2).

    Their probability flow keeps (x_t - E[x_t]) / deviation(x_t).
    """
    diffusion = Diffusion(DiffusionConfig(clip_x0=False))
    bar = np.cumprod(1 - oracle.betas("linear", 1000))
    deviation = np.sqrt(bar * DEVIATION**2 + 1 - bar)
    on_device = torch.tensor(bar)

    def exact_eps(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        bar_t = on_device[t]
        return ((1 - bar_t).sqrt() * (x.double() - bar_t.sqrt() * MEAN) / (bar_t * DEVIATION**2 + 1 - bar_t)).float()

    timesteps = np.linspace(999, end, steps + 1).round().astype(int).tolist()
    owner = Sampler(Formula(exact_eps), diffusion, method=method, seed=3, timesteps=timesteps)
    state = next(owner.trajectory(range(64), watch=[steps - 1]))
    initial = oracle.normals((1, 2, 2), np.arange(64), 3, 0, 0)
    expected = np.sqrt(bar[end]) * MEAN + deviation[end] * (initial - np.sqrt(bar[999]) * MEAN) / deviation[999]
    return float(np.abs(state.x.double().numpy() - expected).max())


def test_halving_the_steps_divides_the_error_by_four() -> None:
    """Order 2, and order 1 for DDIM, up to a timestep before the last step, which is first-order."""
    errors = [error_at(199, steps, "dpm2m") for steps in (30, 60, 120)]
    assert errors[0] < 0.002
    assert all(3.6 < before / after < 4.4 for before, after in itertools.pairwise(errors)), errors
    of_ddim = [error_at(199, steps, "ddim") for steps in (30, 60, 120)]
    assert all(1.8 < before / after < 2.2 for before, after in itertools.pairwise(of_ddim)), of_ddim
    assert errors[-1] < of_ddim[-1] / 10


# Whole chains


@pytest.mark.parametrize("method", METHODS)
def test_chain_equals_float64(method: str) -> None:
    seeds = np.array([0, 5, 2**32 - 1])
    ours = Sampler(Formula(lambda x, t, label: 0.9 * x + 0.1 * torch.cos(0.01 * t)), Diffusion(), 20, method, seed=3)
    expected = oracle.reverse_chain(
        lambda x, t: 0.9 * x + 0.1 * np.cos(0.01 * t), ours.timesteps, seeds, 3, method=method
    )
    assert np.abs(expected).min() < 0.9
    for _ in range(2):  # also in the chain that is kept from the first time
        np.testing.assert_allclose(ours.sample(seeds.tolist()).numpy(), expected, rtol=0, atol=2e-5)
    assert torch.equal(ours.sample([5]), ours.sample(seeds.tolist())[1:2])
    watched = ours.sample(seeds.tolist(), callback=lambda *state: None, watch=[3, 7])
    assert torch.equal(watched, ours.sample(seeds.tolist()))


def test_guidance() -> None:
    """The extrapolated prediction is clipped and carried to the next step."""
    network = Formula(lambda x, t, label: 0.9 * x + 0.1 * label.reshape(-1, 1, 1, 1), num_classes=3, label_dropout=0.1)
    ours = Sampler(network, Diffusion(), 10, "dpm2m", guidance=2.0).sample([5], labels=[1])
    expected = oracle.reverse_chain(
        lambda x, t: 0.9 * x + 0.1 * (3 + 2 * (1 - 3)), Sampler(network, Diffusion(), 10).timesteps, np.array([5]), 0,
        method="dpm2m",
    )  # fmt: skip
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("algorithm", "method"), [("dpmsolver++", "dpm2m"), ("sde-dpmsolver++", "dpm2m-sde")])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_each_step_equals_diffusers_in_float64(prediction: str, algorithm: str, method: str) -> None:
    """On the same noise; in all but its state, which diffusers rounds to float32, and sigma, replaced here."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, algorithm_type=algorithm, timestep_spacing="trailing",
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction],
    )  # fmt: skip
    theirs.set_timesteps(20)
    timesteps = theirs.timesteps.numpy()
    bar = np.cumprod(1 - oracle.betas("linear", 1000))[timesteps]
    theirs.sigmas = torch.tensor(np.append(np.sqrt((1 - bar) / bar), 0.0))
    diffusion = Diffusion(DiffusionConfig(prediction=prediction, clip_x0=False))  # type: ignore[arg-type]
    ours = Sampler(Formula(wave), diffusion, 20, method, spacing="trailing")
    assert ours.timesteps.tolist() == timesteps.tolist()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 1, 2, 2)).astype(np.float32).astype(np.float64)
    previous = np.zeros_like(x)
    for t, row in zip(timesteps.tolist(), ours.table, strict=True):
        out, z = numpy_wave(x, t), rng.standard_normal(x.shape).astype(np.float32).astype(np.float64)
        expected = theirs.step(torch.tensor(out), t, torch.tensor(x), variance_noise=torch.tensor(z)).prev_sample
        x0 = row[0] * x + row[1] * out
        x = row[2] * x0 + row[3] * x + row[4] * out + row[8] * previous + row[5] * z
        previous = x0
        np.testing.assert_allclose(x, expected.numpy(), rtol=1e-6, atol=1e-6)
        x = x.astype(np.float32).astype(np.float64)
    assert np.abs(x).max() > 0.1


# Other beginnings


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_continues_exactly_with_the_prediction_of_the_step_before(method: str) -> None:
    owner = sampler(method, steps=6)
    states = [(state.x.clone(), state.x0.clone()) for state in owner.trajectory([4, 9])]
    for step in (1, 3, 5):
        x, x0 = states[step - 1]
        again = owner.sample([4, 9], start=chains.StartState(x, step, x0))
        assert torch.equal(again, states[-1][0].clamp(-1, 1))
        parts = trajectories(owner, [4, 9], start=chains.StartState(x, step, x0), batch=1)
        assert torch.equal(torch.cat([state.x.clone() for _, state in parts]), states[-1][0])


@pytest.mark.parametrize("method", METHODS)
def test_without_it_the_first_step_is_first_order(method: str) -> None:
    """From a state that no step led to, such as a mixture; and the steps after it are of second order again."""
    owner, x = sampler(method, steps=6), torch.randn(2, 1, 2, 2)
    list(owner.trajectory([4, 9]))  # leaves another chain's prediction in the memory
    process, state = oracle.Process.respaced(owner.timesteps), x.double().numpy()
    previous: np.ndarray | None = None
    for i in (2, 3, 4, 5):
        t = int(owner.timesteps[i])
        bar = process.alpha_bar[i]
        x0 = np.clip((state - np.sqrt(1 - bar) * numpy_wave(state, t)) / np.sqrt(bar), -1, 1)
        state, sigma = process.dpm_solver(i, state, x0, previous, method == "dpm2m-sde")
        state, previous = state + sigma * oracle.normals((1, 2, 2), np.array([4, 9]), 3, t, 1), x0
    ours = owner.sample([4, 9], start=chains.StartState(x, 2))
    np.testing.assert_allclose(ours.double().numpy(), state.clip(-1, 1), rtol=0, atol=1e-5)


def test_a_step_that_is_taken_again_is_first_order() -> None:
    owner = sampler(steps=6)
    chain = chains.ReverseChain(
        lambda x, t, label: wave(x, t.reshape(-1, 1, 1, 1), label), owner.tables(torch.device("cpu")), 2
    )
    chain.begin(torch.tensor([4, 9]), None)
    for _ in range(5):
        chain.advance(keep_x0=False)
    x = torch.randn(2, 1, 2, 2)
    for step in (3, 1, 2):
        chain.rewind(step)
        chain.x.copy_(x)
        for _ in range(step, 6):
            chain.advance(keep_x0=False)
        expected = owner.sample([4, 9], start=chains.StartState(x, step))
        assert torch.equal(chain.x.clamp(-1, 1), expected), step


def test_one_captured_step_is_the_chain_and_capturing_leaves_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched or not: both keep the prediction, so one graph does."""
    captures = []

    def capture(step: chains.Replay, restore: chains.Replay, device: torch.device) -> chains.Replay:
        for _ in range(3):
            step()
            restore()
        captures.append(1)
        return step

    monkeypatch.setattr(chains, "capture", capture)
    owner = sampler(steps=6)
    chain = chains.ReverseChain(
        lambda x, t, label: wave(x, t.reshape(-1, 1, 1, 1), label), owner.tables(torch.device("cpu")), 2
    )
    chain.begin(torch.tensor([4, 9]), None)
    chain.advance(keep_x0=False)
    chain._graph = True
    chain._steps.clear()  # the second step, which reads what the first one left, is captured
    for i in range(1, 6):
        chain.advance(keep_x0=i == 3)
    assert torch.equal(chain.x.clamp(-1, 1), owner.sample([4, 9])) and len(captures) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_beginning_that_cannot_be_is_refused(method: str) -> None:
    with pytest.raises(UsageError, match=r"start.x0 must be float32 \(1, 1, 2, 2\); got torch.float32 \(2, 1, 2, 2\)"):
        sampler(method, steps=6).sample(
            [1], start=chains.StartState(torch.zeros(1, 1, 2, 2), 2, torch.zeros(2, 1, 2, 2))
        )
    with pytest.raises(UsageError, match=r"start.x0 is of a step before; step 0 has none"):
        sampler(method, steps=6).sample(
            [1], start=chains.StartState(torch.zeros(1, 1, 2, 2), 0, torch.zeros(1, 1, 2, 2))
        )


@pytest.mark.parametrize("method", METHODS)
def test_inpainting_refuses(method: str) -> None:
    with pytest.raises(UsageError, match=rf"which method {method} cannot follow; take method ancestral or ddim"):
        inpaint(sampler(method, steps=6), np.zeros((1, 1, 2, 2), np.uint8), np.array([[True, False]] * 2), [1])


def test_the_codec_and_the_bound_take_the_trained_process() -> None:
    unguided = sampler("dpm2m-sde", steps=6).unguided()
    np.testing.assert_array_equal(unguided.table, Sampler(Formula(wave), Diffusion()).table)


def test_settings() -> None:
    """Files of methods of one step were described before there was a ninth column, and can still be continued."""
    first = sampler("ddim", steps=6)
    assert first.settings()["coefficients"] == hashlib.sha256(first.table[:, :8].tobytes()).hexdigest()
    assert len({sampler(method, steps=6).settings()["coefficients"] for method in ("ddim", *METHODS)}) == 3
