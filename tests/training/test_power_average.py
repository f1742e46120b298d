"""Power-function averages against closed forms, and any length from the stored ones."""

import numpy as np
import pytest

from fastddpm.training.power_average import combine, decay_of, exponent_of

STEPS = 1000
LENGTHS = (0.05, 0.1)
STORED = [(step, length) for step in range(50, STEPS + 1, 50) for length in LENGTHS]


def moments(gamma: float) -> tuple[float, float]:
    """Mean and variance of the density (gamma + 1) s^gamma on [0, 1], a beta distribution."""
    a = gamma + 1
    return a / (a + 1), a / ((a + 1) ** 2 * (a + 2))


def mean_of_power(gamma: float, t: int, power: int) -> float:
    """The average of exponent gamma after step t of weights s^power, that have the value of step s over (s - 1, s]."""
    s = np.arange(1, t + 1, dtype=np.longdouble)
    shares = (s ** (gamma + 1) - (s - 1) ** (gamma + 1)) / np.longdouble(t) ** (gamma + 1)
    return float((shares * (s / STEPS) ** power).sum())


def tracked(gamma: float, weights: np.ndarray) -> np.ndarray:
    """The average after each step, by the update."""
    average, found = 123.0, []  # the initial value must not matter
    for step, weight in enumerate(weights, 1):
        decay = decay_of(gamma, step)
        average = decay * average + (1 - decay) * weight
        found.append(average)
    return np.array(found)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, 0.05, 0.1, 0.25, 0.28])
def test_the_exponent_has_the_length(sigma_rel: float) -> None:
    assert moments(exponent_of(sigma_rel))[1] ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


def test_known_exponents() -> None:
    """Of the paper: 16.97 and 6.94; the plain mean has exponent 0 and length 1 / sqrt(12)."""
    assert [round(exponent_of(length), 2) for length in LENGTHS] == [16.97, 6.94]
    assert exponent_of(12**-0.5) == pytest.approx(0, abs=1e-7)
    assert [decay_of(0.0, step) for step in (1, 2, 4)] == [0, 0.5, 0.75]


@pytest.mark.parametrize("power", [0, 1, 3])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.28])
def test_the_update_is_the_closed_form(sigma_rel: float, power: int) -> None:
    gamma = exponent_of(sigma_rel)
    found = tracked(gamma, (np.arange(1, STEPS + 1) / STEPS) ** power)
    for t in (1, 2, 10, STEPS):
        assert found[t - 1] == pytest.approx(mean_of_power(gamma, t, power), rel=1e-12)
    # In the limit of small steps it is the moment of the beta distribution, (gamma + 1) / (gamma + 1 + power).
    assert found[-1] == pytest.approx((gamma + 1) / (gamma + 1 + power), rel=2 * power / STEPS)


@pytest.mark.parametrize(
    ("step", "sigma_rel", "most"),
    [(1000, 0.08, 2e-5), (1000, 0.15, 1e-4), (1000, 0.2, 1e-3), (500, 0.15, 1e-3), (730, 0.12, 1e-3), (730, 0.2, 4e-3)],
)
def test_any_length_at_any_step_of_a_polynomial(step: int, sigma_rel: float, most: float) -> None:
    used = [(at, length) for at, length in STORED if at < step + 50]
    combination = combine(used, step, sigma_rel)
    assert sum(combination.coefficients) == pytest.approx(1, abs=1e-12)
    for power in (0, 1, 3):
        parts = [mean_of_power(exponent_of(length), at, power) for at, length in used]
        expected = mean_of_power(exponent_of(sigma_rel), step, power)
        assert np.dot(combination.coefficients, parts) == pytest.approx(expected, abs=1e-12 if power == 0 else most)


@pytest.mark.parametrize(("step", "sigma_rel", "error"), [(1000, 0.15, 5.8e-3), (1000, 0.02, 0.087), (1000, 0.28, 0.3)])
def test_the_error_is_that_of_the_shares(step: int, sigma_rel: float, error: float) -> None:
    """Shares of each step, as vectors of 1,000 numbers; the closed form integrates within the steps as well."""
    combination = combine(STORED, step, sigma_rel)
    shares = profile(sigma_rel, step)
    difference = sum(
        (x * profile(length, at) for x, (at, length) in zip(combination.coefficients, STORED, strict=True)), -shares
    )
    found = np.linalg.norm(difference) / np.linalg.norm(shares)
    assert combination.error == pytest.approx(found, rel=0.02)
    assert found == pytest.approx(error, rel=0.5)


def profile(sigma_rel: float, t: int) -> np.ndarray:
    edges = np.minimum(np.arange(STEPS + 1) / t, 1) ** (exponent_of(sigma_rel) + 1)
    return np.diff(edges)


def test_no_other_coefficients_of_sum_1_are_nearer() -> None:
    profiles, target = np.array([profile(length, at) for at, length in STORED]), profile(0.2, STEPS)
    found = np.array(combine(STORED, STEPS, 0.2).coefficients)
    least = np.linalg.norm(found @ profiles - target)
    for seed in range(20):
        shift = np.random.default_rng(seed).normal(size=len(STORED)) * 1e-3
        assert np.linalg.norm((found + shift - shift.mean()) @ profiles - target) > least


def test_a_stored_average_is_itself() -> None:
    combination = combine(STORED, 700, 0.1)
    assert combination.error < 1e-6
    expected = np.zeros(len(STORED))
    expected[STORED.index((700, 0.1))] = 1
    np.testing.assert_allclose(combination.coefficients, expected, atol=1e-9)


def test_one_average_alone_is_taken_as_it_is() -> None:
    combination = combine([(100, 0.1)], 100, 0.2)
    assert combination.coefficients == pytest.approx((1.0,)) and combination.error > 0.1
