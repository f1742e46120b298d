"""Tables of coefficients, and whole chains against float64 and against a Gaussian's exact answer."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.chains import coefficient_table
from helpers.marks import slow
from helpers.networks import Formula

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.spacing import spread_timesteps

ALL = np.arange(999, -1, -1)


# Timesteps and tables


def test_timesteps_are_spread_with_both_ends() -> None:
    np.testing.assert_array_equal(spread_timesteps(1000, 1000), ALL)
    np.testing.assert_array_equal(spread_timesteps(1000, 4), [999, 666, 333, 0])
    np.testing.assert_array_equal(spread_timesteps(1000, 2), [999, 0])
    np.testing.assert_array_equal(spread_timesteps(1000, 1), [999])
    for timesteps in (2, 7, 100, 1000):
        for steps in range(2, timesteps + 1):
            chosen = spread_timesteps(timesteps, steps)
            assert (chosen[0], chosen[-1], len(chosen)) == (timesteps - 1, 0, steps)
            assert (np.diff(chosen) < 0).all()
            assert np.ptp(np.diff(chosen)) <= 1  # no gap is more than one longer than another


@pytest.mark.parametrize("timesteps", [ALL, np.array([999, 500, 499, 3, 0]), np.array([700, 20])])
@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall", "learned_range"])
def test_ancestral_table(variance: str, timesteps: np.ndarray) -> None:
    """Equation 7 of the process that has these timesteps only; the last row has no noise."""
    loss = "vlb" if variance == "learned_range" else "simple"
    diffusion = Diffusion(DiffusionConfig(variance=variance, loss=loss))  # type: ignore[arg-type]
    table = coefficient_table(diffusion, timesteps, "ancestral", 0.0)
    process = oracle.Process.respaced(timesteps)
    bar, prev, beta, posterior = process.alpha_bar, process.alpha_bar_prev, process.beta, process.posterior_variance
    inner = np.arange(len(timesteps)) < len(timesteps) - 1
    expected = np.zeros((len(timesteps), 9))
    expected[:, 0], expected[:, 1] = 1 / np.sqrt(bar), -np.sqrt(1 / bar - 1)
    expected[:, 2] = np.sqrt(prev) * beta / (1 - bar)
    expected[:, 3] = np.sqrt(bar / prev) * (1 - prev) / (1 - bar)
    if variance == "learned_range":
        expected[:, 5], expected[:, 7] = inner, np.log(beta)
        expected[:, 6] = np.log(np.maximum(posterior, 1e-20))
    else:
        expected[:, 5] = inner * np.sqrt(posterior if variance == "fixedsmall" else beta)
    assert table.dtype == np.float64
    np.testing.assert_allclose(table, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_table(eta: float) -> None:
    """With eta = 1 DDIM is ancestral sampling with the small variance; without it the noise is gone."""
    timesteps = np.array([999, 640, 639, 10, 0])
    table = coefficient_table(Diffusion(), timesteps, "ddim", eta)
    small = coefficient_table(Diffusion(DiffusionConfig(variance="fixedsmall")), timesteps, "ancestral", 0.0)
    np.testing.assert_allclose(table[:, 5], eta * small[:, 5], rtol=1e-9)
    if eta == 1:
        np.testing.assert_allclose(table, small, rtol=1e-6, atol=1e-9)
    # Applied to a pair x_t = sqrt(bar) x_0 + sqrt(1 - bar) eps it lands on the same pair's x_{t'}.
    process = oracle.Process.respaced(timesteps)
    remaining = np.sqrt(1 - process.alpha_bar_prev - table[:, 5] ** 2 + 1e-18)
    np.testing.assert_allclose(table[:, 2] + table[:, 3] * np.sqrt(process.alpha_bar), np.sqrt(process.alpha_bar_prev))
    np.testing.assert_allclose(table[:, 3] * np.sqrt(1 - process.alpha_bar), remaining, atol=1e-8)


# Whole chains against float64

CHAINS: dict[str, dict[str, Any]] = {
    "ancestral, large variance": {"steps": 1000},
    "ancestral, small variance": {"steps": 1000, "variance": "fixedsmall"},
    "ancestral, 20 steps": {"steps": 20},
    "ddim": {"steps": 1000, "eta": 0.0},
    "ddim, 20 steps, some noise": {"steps": 20, "eta": 0.5},
}


@pytest.mark.parametrize("name", [name if "20 steps" in name else slow(name) for name in CHAINS])
def test_chain_equals_float64(name: str) -> None:
    """A network that sees x_t and t, noise from (seed, image, t): up to 1000 steps of float32 against float64."""
    options = dict(CHAINS[name])
    steps, variance, eta = options["steps"], options.get("variance", "fixedlarge"), options.get("eta")
    seeds, seed = np.array([0, 5, 2**32 - 1]), -(2**35)
    method = {} if eta is None else {"method": "ddim", "eta": eta}
    diffusion = Diffusion(DiffusionConfig(variance=variance))
    sampler = Sampler(
        Formula(lambda x, t, label: 0.9 * x + 0.1 * torch.cos(0.01 * t)), diffusion, steps, seed=seed, **method
    )
    ours = sampler.sample(seeds.tolist())
    expected = oracle.reverse_chain(
        lambda x, t: 0.9 * x + 0.1 * np.cos(0.01 * t), spread_timesteps(1000, steps), seeds, seed,
        variance=variance, eta=eta,
    )  # fmt: skip
    assert ours.dtype == torch.float32 and ours.shape == (3, 1, 2, 2) and sampler.steps == steps
    assert np.abs(expected).min() < 0.9  # not everything ends at the clip
    np.testing.assert_allclose(ours.double().numpy(), expected, rtol=0, atol=2e-5)


# A data set whose denoiser is known

MEAN, DEVIATION = 0.2, 0.1


def exact_eps(x: Any, bar: Any) -> Any:
    """E[eps | x_t] when x_0 is N(m, s^2): x_t is N(sqrt(bar) m, bar s^2 + 1 - bar)."""
    return (1 - bar) ** 0.5 * (x - bar**0.5 * MEAN) / (bar * DEVIATION**2 + 1 - bar)


def gaussian_sampler(diffusion: Diffusion, **options: Any) -> Sampler:
    bar = torch.tensor(diffusion.alpha_bar)
    network = Formula(lambda x, t, label: exact_eps(x.double(), bar[t]).float())
    return Sampler(network, diffusion, seed=3, **options)  # type: ignore[arg-type]


def chain_moments(variance: str) -> tuple[float, float]:
    """Mean and deviation of the chain's end: each step of the exact denoiser is linear in x_t, plus noise."""
    process = oracle.Process.respaced(ALL)
    mean, square = 0.0, 1.0
    for i in range(1000):
        bar, prev, beta = process.alpha_bar[i], process.alpha_bar_prev[i], process.beta[i]
        from_x0, from_x = np.sqrt(prev) * beta / (1 - bar), np.sqrt(1 - beta) * (1 - prev) / (1 - bar)
        # E[x_0 | x_t] = m + gain (x_t - sqrt(bar) m)
        gain = DEVIATION**2 * np.sqrt(bar) / (bar * DEVIATION**2 + 1 - bar)
        mean = from_x0 * (MEAN + gain * (mean - np.sqrt(bar) * MEAN)) + from_x * mean
        noise = process.posterior_variance[i] if variance == "fixedsmall" else beta
        square = (from_x0 * gain + from_x) ** 2 * square + noise * (i < 999)
    return mean, np.sqrt(square)


# p's variance is exact for deviations 1 (large) and 0 (small) of the data; between them T = 1000 steps leave this.
@pytest.mark.parametrize(("variance", "bias"), [("fixedlarge", 0.0077), slow("fixedsmall", -0.0369)])
def test_ancestral_sampling_recovers_a_gaussian(variance: str, bias: float) -> None:
    """4096 scalars through all 1000 steps: mean and deviation within four standard errors."""
    num = 4096
    mean, deviation = chain_moments(variance)
    assert abs(mean - MEAN) < 1e-5 and abs(deviation / DEVIATION - 1 - bias) < 1e-3
    images = gaussian_sampler(Diffusion(DiffusionConfig(variance=variance))).sample(range(num // 4))  # type: ignore[arg-type]
    values = images.double().numpy().ravel()
    assert abs(values.mean() - MEAN) < 4 * DEVIATION / np.sqrt(num)
    assert abs(values.std() / deviation - 1) < 4 / np.sqrt(2 * num)
    # The four pixels of an image are independent.
    correlation = np.corrcoef(images.reshape(-1, 4).numpy().T) - np.eye(4)
    assert abs(correlation).max() < 4 / np.sqrt(num / 4)


def test_deterministic_ddim_transports_the_prior_onto_the_gaussian() -> None:
    """Without noise each x_T has its own answer: the ordinary differential equation's is m + s x_T."""
    images = gaussian_sampler(Diffusion(), method="ddim").sample(range(256)).double().numpy()
    initial = oracle.normals((1, 2, 2), np.arange(256), 3, 0, 0)
    # 1000 steps of an Euler method, from a prior whose deviation is not quite that of x_T: 5% of s at the most.
    np.testing.assert_allclose(images, np.clip(MEAN + DEVIATION * initial, -1, 1), rtol=0, atol=0.1 * DEVIATION)
    assert abs(images.mean() - MEAN) < 4 * DEVIATION / np.sqrt(1024)
    assert abs(images.std() / DEVIATION - 1) < 4 / np.sqrt(2 * 1024)
