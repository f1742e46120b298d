"""The variational bound's terms against float64, and the published constants."""

import numpy as np
import pytest
import torch
from helpers import oracle

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion, discretized_log_likelihood, gaussian_kl

GRID = np.arange(256) / 127.5 - 1  # the values of a pixel


def image_like(rng: np.random.Generator, n: int = 4) -> np.ndarray:
    """Pixels on the grid with CIFAR-10's mean square, some 0.25."""
    return GRID[np.clip(np.round(rng.normal(120, 72, (n, 3, 8, 8))), 0, 255).astype(int)]


def float32(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_gaussian_kl(rng: np.random.Generator) -> None:
    mean1, log_var1, mean2, log_var2 = rng.standard_normal((4, 1000)) * 2
    ours = gaussian_kl(*map(float32, (mean1, log_var1, mean2, log_var2)))
    np.testing.assert_allclose(ours.numpy(), oracle.gaussian_kl(mean1, log_var1, mean2, log_var2), rtol=1e-5, atol=1e-6)


def test_gaussian_kl_is_the_integral() -> None:
    """Of N(x; m1, v1) log(N(x; m1, v1) / N(x; m2, v2)), on a grid."""
    m1, v1, m2, v2 = 0.3, 0.25, -0.5, 1.7
    x = np.linspace(-12, 12, 200_001)
    p = np.exp(-((x - m1) ** 2) / (2 * v1)) / np.sqrt(2 * np.pi * v1)
    log_ratio = -((x - m1) ** 2) / (2 * v1) + (x - m2) ** 2 / (2 * v2) + 0.5 * np.log(v2 / v1)
    integral = np.trapezoid(p * log_ratio, x)
    ours = gaussian_kl(*(torch.tensor(value) for value in (m1, np.log(v1), m2, np.log(v2))))
    np.testing.assert_allclose(ours.item(), integral, rtol=1e-6)
    assert gaussian_kl(*map(torch.tensor, (1.5, -3.0, 1.5, -3.0))).item() == 0


@pytest.mark.parametrize("difference", [1e-2, 1e-4, 1e-6])
def test_gaussian_kl_of_nearly_equal_gaussians(difference: float) -> None:
    """Late in the chain the two variances agree to 1e-6; exp(d) - 1 - d in float32 would be off by 1e-7."""
    log_var1 = np.float32(-4.0)
    log_var2 = np.float32(-4.0 + difference)
    ours = gaussian_kl(torch.tensor(0.0), torch.tensor(log_var1), torch.tensor(0.0), torch.tensor(log_var2)).item()
    expected = oracle.gaussian_kl(0.0, float(log_var1), 0.0, float(log_var2))
    assert abs(ours - expected) < 1e-3 * expected + 1e-12


@pytest.mark.parametrize("deviation", [0.002, 1 / 127.5, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.0, -0.999, -0.5, 0.003, 0.9, 1.0, 1.2])
def test_decoder_masses(mean: float, deviation: float) -> None:
    """Each of the 256 bins against equation 13 in float64, both edges included, and their sum."""
    log_var = np.full(256, 2 * np.log(deviation))
    log_mass = discretized_log_likelihood(float32(GRID), torch.full((256,), mean), float32(log_var)).double().numpy()
    expected = oracle.bin_mass(GRID, float(np.float32(mean)), log_var)
    np.testing.assert_allclose(np.exp(log_mass), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_mass).sum(), 1, atol=2e-5)
    assert log_mass.min() >= np.log(1e-12) - 1e-5


def test_decoder_edges_reach_to_infinity() -> None:
    """A mean far outside leaves all the mass in the outer bin, and none, floored at 1e-12, in the others."""
    for mean, edge in ((-3.0, 0), (3.0, 255)):
        log_mass = discretized_log_likelihood(
            float32(GRID), torch.full((256,), mean), torch.full((256,), 2 * np.log(0.1))
        ).numpy()
        assert abs(log_mass[edge]) < 1e-6
        np.testing.assert_allclose(np.delete(log_mass, edge)[1:-1], np.log(1e-12), rtol=1e-6)


def test_decoder_uses_the_released_codes_cdf() -> None:
    """The tanh, which at z = 1 is 2e-4 off the exact normal CDF: the published bits/dim are of the tanh."""
    log_mass = discretized_log_likelihood(torch.tensor([-1.0]), torch.tensor([-1.0 + 1 / 255 - 1]), torch.tensor([0.0]))
    tanh_cdf = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * 1.044715))
    np.testing.assert_allclose(np.exp(log_mass.item()), tanh_cdf, rtol=1e-6)
    assert abs(tanh_cdf - 0.841344746) > 1e-4


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "xprev"])
def test_bound_term(prediction: str, variance: str, clip: bool, rng: np.random.Generator) -> None:
    """Both kinds of term in one batch: the decoder's at t = 0, KL divergences at t > 0."""
    learned = variance.startswith("learned")
    config = DiffusionConfig(prediction=prediction, variance=variance, loss="hybrid" if learned else "simple")  # type: ignore[arg-type]
    process = oracle.Process.respaced()
    t = np.array([0, 1, 400, 999])
    x0, eps = image_like(rng), rng.standard_normal((4, 3, 8, 8))
    x_t = process.forward(t, x0, eps)
    # An x_0 of t = 0 off by many of the decoder's deviations, 0.007, has masses that only float64 resolves.
    error = oracle.column(np.where((t == 0) & (prediction in ("x0", "xprev")), 0.005, 0.1))
    out = process.target(t, prediction, x0, x_t, eps) + error * rng.standard_normal(x0.shape)
    posterior = np.append(process.posterior_variance[1], process.posterior_variance[1:])
    large = process.beta if variance == "learned_range" else np.append(posterior[0], process.beta[1:])
    upper = posterior if variance == "fixedsmall" else large
    log_var = np.broadcast_to(oracle.column(np.log(upper[t])), x0.shape)
    if learned:
        raw = rng.uniform(-1, 1, x0.shape) + (np.log(0.01) if variance == "learned" else 0)
        out = np.concatenate([out, raw], axis=1)
        low = oracle.column(np.log(posterior[t]))
        log_var = raw if variance == "learned" else low + (log_var - low) * (raw + 1) / 2

    prediction_x0 = process.predict_x0(t, prediction, out[:, :3], x_t)
    prediction_x0 = np.clip(prediction_x0, -1, 1) if clip else prediction_x0
    mean = out[:, :3] if prediction == "xprev" else process.posterior_mean(t, prediction_x0, x_t)
    kl = oracle.gaussian_kl(process.posterior_mean(t, x0, x_t), oracle.column(np.log(posterior[t])), mean, log_var)
    decoder = -np.log(np.maximum(oracle.bin_mass(x0, mean, log_var), 1e-12))
    expected = np.where(oracle.column(t) == 0, decoder, kl).mean((1, 2, 3)) / np.log(2)

    ours = Diffusion(config).bound_term(float32(out), float32(x0), float32(x_t), torch.tensor(t), clip=clip)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=5e-4)


@pytest.mark.parametrize("t", [500, 700, 900, 998, 999])
def test_late_terms_are_exact_enough_to_add_up(t: int, rng: np.random.Generator) -> None:
    """Terms of 1e-5 to 1e-7 bits, of which the rate-distortion curve adds hundreds: 1% each, in float32."""
    process, at = oracle.Process.respaced(), np.full(4, t)
    x0, eps = image_like(rng), rng.standard_normal((4, 3, 8, 8))
    x_t = process.forward(at, x0, eps)
    out = float32(eps + 0.01 * rng.standard_normal(eps.shape))
    x_t32, x0_32 = float32(x_t), float32(x0)
    diffusion = Diffusion()
    ours = diffusion.bound_term(out, x0_32, x_t32, torch.tensor(at), clip=True).numpy()
    x_t, x0, eps = (x.double().numpy() for x in (x_t32, x0_32, out))
    mean = process.posterior_mean(at, np.clip(process.predict_x0(at, "eps", eps, x_t), -1, 1), x_t)
    variances = [np.log(table[t]) for table in (process.posterior_variance, process.beta)]
    kl = oracle.gaussian_kl(process.posterior_mean(at, x0, x_t), variances[0], mean, variances[1])
    np.testing.assert_allclose(ours, kl.mean((1, 2, 3)) / np.log(2), rtol=1e-2)


def test_perfect_network_with_the_posteriors_variance_costs_nothing(rng: np.random.Generator) -> None:
    process, t = oracle.Process.respaced(), np.array([1, 10, 500, 999])
    x0, eps = image_like(rng), rng.standard_normal((4, 3, 8, 8))
    x_t = float32(process.forward(t, x0, eps))
    diffusion = Diffusion(DiffusionConfig(prediction="x0", variance="fixedsmall"))
    assert diffusion.bound_term(float32(x0), float32(x0), x_t, torch.tensor(t)).abs().max() == 0


def test_prior_term(rng: np.random.Generator) -> None:
    """Section 4: L_T about 1e-5 bits per dimension; 0.7e-5 for a grey image, 2.9e-5 for black and white."""
    bar = np.cumprod(1 - oracle.betas("linear", 1000))[-1]
    diffusion = Diffusion()
    for x0, low, high in (
        (image_like(rng), 0.7e-5, 2.9e-5),
        (np.ones((2, 3, 4, 4)), 2.8e-5, 3.0e-5),
        (np.zeros((2, 3, 4, 4)), 0.0, 1e-8),
    ):
        ours = diffusion.prior_term(float32(x0)).numpy()
        expected = 0.5 * (bar * x0**2 + (1 - bar) - 1 - np.log(1 - bar)).mean((1, 2, 3)) / np.log(2)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-11)
        assert (ours >= low).all() and (ours <= high).all()


def test_decoders_variance_is_the_posteriors_first() -> None:
    """5.453e-5 at t = 0 for either fixed variance, not beta_0 = 1e-4."""
    for variance in ("fixedlarge", "fixedsmall"):
        diffusion = Diffusion(DiffusionConfig(variance=variance))  # type: ignore[arg-type]
        x = torch.zeros(1, 1, 1, 1)
        model, _ = diffusion.p(x, x, torch.tensor([0]))
        np.testing.assert_allclose(np.exp(model.log_variance.item()), 5.453e-5, rtol=1e-4)
