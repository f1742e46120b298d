"""Noise schedules against their formulas and published constants."""

import numpy as np
import pytest
from helpers import oracle

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import betas

SCHEDULES = ["linear", "cosine", "quad", "const", "jsd"]


@pytest.mark.parametrize("timesteps", [2, 10, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_formula(schedule: str, timesteps: int) -> None:
    config = DiffusionConfig(timesteps=timesteps, schedule=schedule, beta_start=3e-4, beta_end=0.03)  # type: ignore[arg-type]
    values = betas(config)
    assert values.dtype == np.float64 and values.shape == (timesteps,)
    np.testing.assert_allclose(values, oracle.betas(schedule, timesteps, 3e-4, 0.03), rtol=1e-10)
    assert values.min() > 0 and values.max() <= 1


def test_linear_is_the_papers() -> None:
    """beta from 1e-4 to 0.02 in T = 1000 leaves a signal of 6.353e-3 (section 4: L_T about 1e-5 bits)."""
    beta = betas(DiffusionConfig())
    assert (beta[0], beta[-1]) == (1e-4, 0.02)
    alpha_bar = np.cumprod(1 - beta)
    np.testing.assert_allclose(alpha_bar[-1], 4.0358e-5, rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(alpha_bar[-1]), 6.353e-3, rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(1 - alpha_bar[0]), 0.01, rtol=1e-12)


def test_quad_ends_where_linear_does() -> None:
    beta = betas(DiffusionConfig(schedule="quad"))
    np.testing.assert_allclose(beta[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    middle = (np.sqrt(beta[499]) + np.sqrt(beta[500])) / 2
    np.testing.assert_allclose(middle, (0.01 + np.sqrt(0.02)) / 2, rtol=1e-12)


def test_jsd_forgets_everything_in_its_last_step() -> None:
    """With beta = 1/(T - t) the signal falls linearly: alpha_bar_t = 1 - (t + 1)/T."""
    beta = betas(DiffusionConfig(schedule="jsd", timesteps=40))
    np.testing.assert_allclose(np.cumprod(1 - beta), 1 - np.arange(1, 41) / 40, rtol=1e-12, atol=1e-15)


def test_cosine_is_nichol_and_dhariwals() -> None:
    """alpha_bar is the squared cosine wherever beta is below its bound, and beta is bounded at the end only."""
    beta = betas(DiffusionConfig(schedule="cosine"))
    expected = oracle.cosine_alpha_bar(np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(np.cumprod(1 - beta)[:-1], expected[:-1], rtol=1e-9)
    np.testing.assert_allclose(np.cumprod(1 - beta)[499], 0.4938, atol=5e-5)
    assert beta[-1] == 0.999 and (beta[:-1] < 0.999).all()
    np.testing.assert_allclose(beta[0], 4.1284e-5, rtol=1e-4)
