"""reverse_step: every parameterization, variance and DDIM as rows of a table, against the textbook formulas."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import contract, oracle
from helpers.chains import coefficient_table
from helpers.marks import with_large
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.ops import reverse_step

STREAM_REVERSE = 1
SHAPE = (2, 3, 4, 4)
ALL_TIMESTEPS = np.arange(999, -1, -1)
# The timesteps of a chain, and the rows that are tested.
CHAINS = {
    # The first step, one in the middle, one where alpha_bar is near 1, the last two.
    "all": (ALL_TIMESTEPS, [0, 400, 990, 998, 999]),
    # Between two of these beta is not that of one step.
    "few": (np.array([999, 300, 0]), [0, 1, 2]),
}
VARIANCES = ["fixedlarge", "fixedsmall", "learned", "learned_range"]
PREDICTIONS = ["eps", "x0", "v", "xprev"]


def diffusion(prediction: str, variance: str) -> Diffusion:
    loss = "hybrid" if variance.startswith("learned") else "simple"
    return Diffusion(DiffusionConfig(prediction=prediction, variance=variance, loss=loss))  # type: ignore[arg-type]


def arguments(
    rng: np.random.Generator,
    timesteps: np.ndarray,
    table: np.ndarray,
    step: int,
    device: torch.device,
    channels: int = 3,
) -> dict[str, Tensor]:
    """x, out and the rest; x and out as large as they are in a chain, 1 and 0.7."""
    n, _, h, w = SHAPE
    key = contract.key_tensors([5, 2**32 - 1], -9, 0, device)
    return {
        "x": torch.tensor(rng.standard_normal(SHAPE), dtype=torch.float32, device=device),
        "out": torch.tensor(0.7 * rng.standard_normal((n, channels, h, w)), dtype=torch.float32, device=device),
        "table": torch.tensor(table, dtype=torch.float32, device=device),
        "timesteps": torch.tensor(timesteps, device=device),
        "index": torch.tensor(step, device=device),
        "images": key["images"],
        "seed": key["seed"],
    }


def noise_at(timestep: int) -> np.ndarray:
    return oracle.normals(SHAPE[1:], np.array([5, 2**32 - 1]), -9, timestep, STREAM_REVERSE)


@pytest.mark.parametrize("chain", with_large(CHAINS, "all"))
@pytest.mark.parametrize("clip", with_large([0.0, 1.0], 0.0))
@pytest.mark.parametrize("variance", with_large(VARIANCES, "fixedsmall", "learned"))
@pytest.mark.parametrize("prediction", with_large(PREDICTIONS, *PREDICTIONS[1:]))  # rows of the table, no more
def test_ancestral(
    prediction: str, variance: str, clip: float, chain: str, rng: np.random.Generator, device: torch.device
) -> None:
    """Algorithm 2: x_0 prediction, clipped; the mean of equation 7; plus the deviation times z, but for t = 0."""
    timesteps, rows = CHAINS[chain]
    process, trained = oracle.Process.respaced(timesteps), oracle.Process.respaced()
    learned = variance.startswith("learned")
    table = coefficient_table(diffusion(prediction, variance), timesteps, "ancestral", 0.0)
    for i in rows:
        a = arguments(rng, timesteps, table, i, device, channels=6 if learned else 3)
        x, out, raw = contract.float64(a["x"]), contract.float64(a["out"])[:, :3], contract.float64(a["out"])[:, 3:]
        # The network was trained for neighbouring timesteps, whatever the sampler skips.
        at, trained_at = np.full(2, i), np.full(2, timesteps[i])
        x0 = trained.predict_x0(trained_at, prediction, out, x)
        if clip:
            x0 = np.clip(x0, -clip, clip)
        is_mean = prediction == "xprev" and (chain == "all" or timesteps[i] == 0)
        mean = out if is_mean else process.posterior_mean(at, x0, x)
        if variance == "learned":
            log_variance = raw
        elif variance == "learned_range":
            low, high = np.log(np.maximum(process.posterior_variance[i], 1e-20)), np.log(process.beta[i])
            log_variance = low + (high - low) * (raw + 1) / 2
        else:
            log_variance = np.log(
                (process.posterior_variance if variance == "fixedsmall" else process.beta)[i] + 1e-300
            )
        expected = mean
        if i < len(timesteps) - 1:
            expected = mean + np.exp(0.5 * log_variance) * noise_at(timesteps[i])

        x0_buffer = torch.full_like(a["x"], torch.nan)
        reverse_step(**a, clip=clip, variance=variance if learned else "fixed", x0=x0_buffer)
        # x_0 is a difference of two terms that grow as 1/sqrt(alpha_bar), or as 1/coefficient for xprev.
        size = np.abs(x0).max() + np.abs(trained.predict_x0(trained_at, prediction, out, 0 * x)).max()
        x0_error = 2.0**-22 * size
        np.testing.assert_allclose(contract.float64(x0_buffer), x0, rtol=0, atol=x0_error)
        from_x0 = process.posterior_mean(at, np.ones(SHAPE), np.zeros(SHAPE)).max()
        np.testing.assert_allclose(contract.float64(a["x"]), expected, rtol=0, atol=5e-6 + from_x0 * x0_error)


@pytest.mark.parametrize("chain", with_large(CHAINS, "all"))
@pytest.mark.parametrize("eta", with_large([0.0, 0.4, 1.0], 0.4))
@pytest.mark.parametrize("clip", with_large([0.0, 1.0], 0.0))
@pytest.mark.parametrize("prediction", with_large(PREDICTIONS, *PREDICTIONS[1:]))  # rows of the table, no more
def test_ddim(
    prediction: str, clip: float, eta: float, chain: str, rng: np.random.Generator, device: torch.device
) -> None:
    """Song et al. 2021, equations 12 and 16, with eps taken from the clipped x_0."""
    timesteps, rows = CHAINS[chain]
    process, trained = oracle.Process.respaced(timesteps), oracle.Process.respaced()
    table = coefficient_table(diffusion(prediction, "fixedlarge"), timesteps, "ddim", eta)
    for i in rows:
        a = arguments(rng, timesteps, table, i, device)
        x, out = contract.float64(a["x"]), contract.float64(a["out"])
        trained_at = np.full(2, timesteps[i])
        x0 = trained.predict_x0(trained_at, prediction, out, x)
        if clip:
            x0 = np.clip(x0, -clip, clip)
        bar, prev = process.alpha_bar[i], process.alpha_bar_prev[i]
        eps = (x - np.sqrt(bar) * x0) / np.sqrt(1 - bar)
        sigma = eta * np.sqrt((1 - prev) / (1 - bar)) * np.sqrt(1 - bar / prev)
        direction = np.sqrt(max(1 - prev - sigma**2, 0))
        expected = np.sqrt(prev) * x0 + direction * eps + sigma * noise_at(timesteps[i])

        reverse_step(**a, clip=clip)
        size = np.abs(x0).max() + np.abs(trained.predict_x0(trained_at, prediction, out, 0 * x)).max()
        from_x0 = abs(np.sqrt(prev) - direction * np.sqrt(bar / (1 - bar)))
        np.testing.assert_allclose(contract.float64(a["x"]), expected, rtol=0, atol=5e-6 + from_x0 * 2.0**-22 * size)


@pytest.mark.parametrize("chain", with_large(CHAINS, "all"))
@pytest.mark.parametrize("method", ["dpm2m", "dpm2m-sde"])
@pytest.mark.parametrize("clip", with_large([0.0, 1.0], 0.0))
@pytest.mark.parametrize("prediction", with_large(PREDICTIONS, *PREDICTIONS[1:]))  # rows of the table, no more
def test_dpm_solver(
    prediction: str, clip: float, method: str, chain: str, rng: np.random.Generator, device: torch.device
) -> None:
    """Lu et al. 2022b, with the x_0 prediction of the step before in `x0`, which this step's replaces."""
    timesteps, rows = CHAINS[chain]
    process, trained = oracle.Process.respaced(timesteps), oracle.Process.respaced()
    table = coefficient_table(diffusion(prediction, "fixedlarge"), timesteps, method, 0.0)
    for i in rows:
        a = arguments(rng, timesteps, table, i, device)
        ends = i in (0, len(timesteps) - 1)  # where no earlier prediction is read
        earlier = np.full(SHAPE, np.nan) if ends else rng.uniform(-1, 1, SHAPE)
        x, out = contract.float64(a["x"]), contract.float64(a["out"])
        trained_at = np.full(2, timesteps[i])
        x0 = trained.predict_x0(trained_at, prediction, out, x)
        if clip:
            x0 = np.clip(x0, -clip, clip)
        mean, sigma = process.dpm_solver(i, x, x0, None if ends else earlier, method == "dpm2m-sde")
        expected = mean + sigma * noise_at(timesteps[i])

        buffer = torch.tensor(earlier, dtype=torch.float32, device=device)
        reverse_step(**a, clip=clip, x0=buffer)
        size = np.abs(x0).max() + np.abs(trained.predict_x0(trained_at, prediction, out, 0 * x)).max()
        x0_error = 2.0**-22 * size
        np.testing.assert_allclose(contract.float64(buffer), x0, rtol=0, atol=x0_error)
        error = 5e-6 + abs(table[i, 2]) * x0_error
        np.testing.assert_allclose(contract.float64(a["x"]), expected, rtol=0, atol=error)


def test_a_row_that_lacks_the_earlier_prediction_gives_nan(rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "dpm2m", 0.0)
    for step, lacks in ((0, False), (500, True), (999, False)):
        x = reverse_step(**arguments(rng, ALL_TIMESTEPS, table, step, device))
        assert x.isnan().all() if lacks else x.isfinite().all()


def test_works_in_place(rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 500, device)
    before, address = a["x"].clone(), a["x"].data_ptr()
    others = {name: tensor.clone() for name, tensor in a.items() if name != "x"}
    result = reverse_step(**a)
    assert result is a["x"] and result.data_ptr() == address and not torch.equal(result, before)
    assert all(torch.equal(a[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("noise", [torch.inf, torch.nan])
@pytest.mark.parametrize("variance", ["fixed", "learned", "learned_range"])
def test_last_step_is_the_mean_whatever_the_noise(
    variance: str, noise: float, rng: np.random.Generator, device: torch.device
) -> None:
    """At t = 0 the mean is the clipped x_0 prediction: its other coefficient is 0."""
    config_variance = "fixedlarge" if variance == "fixed" else variance
    table = coefficient_table(diffusion("x0", config_variance), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 999, device, channels=6)
    reverse_step(**a, variance=variance, noise=torch.full_like(a["x"], noise))
    expected = np.clip(contract.float64(a["out"])[:, :3], -1, 1)
    np.testing.assert_allclose(contract.float64(a["x"]), expected, rtol=0, atol=1e-6)


def test_given_noise(rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 300, device)
    still = reverse_step(**(a | {"x": a["x"].clone()}), noise=torch.zeros_like(a["x"]))
    noise = torch.tensor(rng.standard_normal(SHAPE), dtype=torch.float32, device=device)
    moved = reverse_step(**a, noise=noise)
    expected = np.sqrt(oracle.betas("linear", 1000)[699]) * contract.float64(noise)
    np.testing.assert_allclose(contract.float64(moved - still), expected, rtol=0, atol=1e-6)


def test_index_is_read_on_the_device(rng: np.random.Generator, device: torch.device) -> None:
    """One index tensor counted up in place walks the chain."""
    timesteps = np.array([999, 500, 20, 3])
    table = coefficient_table(diffusion("eps", "fixedlarge"), timesteps, "ancestral", 0.0)
    a = arguments(rng, timesteps, table, 0, device)
    one_by_one = a["x"].clone()
    for i in range(4):
        reverse_step(**(a | {"x": one_by_one, "index": torch.tensor(i, device=device)}))
        reverse_step(**a)
        a["index"] += 1
        assert torch.equal(a["x"], one_by_one)


@pytest.mark.parametrize("dtype", contract.LOW_PRECISION)
def test_half_precision_output_is_computed_in_float32(
    dtype: torch.dtype, rng: np.random.Generator, device: torch.device
) -> None:
    table = coefficient_table(diffusion("eps", "learned_range"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 700, device, channels=6)
    a["out"] = a["out"].to(dtype)
    expected = reverse_step(**(a | {"x": a["x"].clone(), "out": a["out"].float()}), variance="learned_range")
    assert torch.equal(reverse_step(**a, variance="learned_range"), expected)


def test_fixed_variance_ignores_the_second_half(rng: np.random.Generator, device: torch.device) -> None:
    """DDIM with a network that has learned a variance."""
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 700, device, channels=6)
    a["out"][:, 3:] = torch.nan
    expected = reverse_step(**(a | {"x": a["x"].clone(), "out": a["out"][:, :3].clone()}))
    assert torch.equal(reverse_step(**a), expected)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
def test_layouts(layout: str, rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "learned"), ALL_TIMESTEPS, "ancestral", 0.0)
    table[:, 8] = 0.3
    a = arguments(rng, ALL_TIMESTEPS, table, 200, device, channels=6)
    earlier = a["out"][:, :3].clone()
    expected_x0, x0 = earlier.clone(), contract.LAYOUTS[layout](earlier)
    expected = reverse_step(**(a | {"x": a["x"].clone()}), variance="learned", x0=expected_x0)
    strides = x0.stride()
    for name in ("x", "out"):
        laid_out = a | {"x": a["x"].clone()}
        laid_out[name] = contract.LAYOUTS[layout](laid_out[name])
        reverse_step(**laid_out, variance="learned", x0=x0.copy_(earlier))
        assert torch.equal(laid_out["x"], expected) and torch.equal(x0, expected_x0)
        assert x0.stride() == strides


def test_an_image_does_not_depend_on_its_batch(rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 500, device)
    alone = [
        reverse_step(**(a | {name: a[name][n : n + 1].clone() for name in ("x", "out", "images")})) for n in range(2)
    ]
    assert torch.equal(reverse_step(**a), torch.cat(alone))


def test_nan_is_not_hidden_by_the_clip(rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 500, device)
    a["out"][1, 2, 3, 3] = torch.nan
    spoilt = torch.isnan(reverse_step(**a))
    assert spoilt.sum() == 1 and spoilt[1, 2, 3, 3]


def test_empty_batch(rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 500, device)
    a |= {name: a[name][:0] for name in ("x", "out", "images")}
    assert reverse_step(**a).shape == (0, 3, 4, 4)


def test_is_never_differentiable(rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 500, device)
    a["out"].requires_grad_()
    assert not reverse_step(**a).requires_grad


@pytest.mark.large
@pytest.mark.parametrize("variance", [0, 1, 2])
@pytest.mark.parametrize("given", [False, True])
def test_opcheck(variance: int, given: bool, rng: np.random.Generator, device: torch.device) -> None:
    table = coefficient_table(diffusion("eps", "learned_range"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 500, device, channels=6)
    noise, x0 = (torch.randn_like(a["x"]), torch.empty_like(a["x"])) if given else (None, None)
    contract.opcheck(torch.ops.fastddpm.reverse_step, (*a.values(), 1.0, variance, noise, x0))


@pytest.mark.large
def test_compiles_with_a_dynamic_batch(device: torch.device) -> None:
    """A network and the step behind it, which writes into the state it was given."""
    coefficients = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)

    def inputs(n: int) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(n)
        key = contract.key_tensors(range(n), 5, 6, device)
        table = torch.tensor(coefficients, dtype=torch.float32, device=device)
        rest = [table, torch.tensor(ALL_TIMESTEPS, device=device), torch.tensor(3, device=device), key["seed"]]
        return [torch.randn(n, 3, 4, 4, device=device), key["images"]], rest

    def function(x: Tensor, images: Tensor, *rest: Tensor) -> Tensor:
        table, timesteps, index, seed = rest
        return reverse_step(x, torch.tanh(x), table, timesteps, index, images, seed)

    contract.assert_compiles_for_any_batch(function, inputs, [2, 3, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.float64)},
         r"x must be float32 \(N, C, H, W\); got torch.float64 \(2, 3, 4, 4\)"),
        ({"x": torch.zeros(3, 4, 4)}, r"x must be float32 \(N, C, H, W\); got torch.float32 \(3, 4, 4\)"),
        ({"variance": "fixedlarge"}, "variance must be one of fixed, learned, learned_range; got 'fixedlarge'"),
        ({"out": torch.zeros(2, 4, 4, 4)}, r"out must be \(2, 3 or 6, 4, 4\); got \(2, 4, 4, 4\)"),
        ({"out": torch.zeros(2, 3, 4, 5)}, r"out must be \(2, 3 or 6, 4, 4\); got \(2, 3, 4, 5\)"),
        ({"variance": "learned"}, r"out must be \(2, 6, 4, 4\); got \(2, 3, 4, 4\)"),
        ({"table": torch.zeros(1000, 8)}, r"table must be float32 \(S, 9\); got torch.float32 \(1000, 8\)"),
        ({"table": torch.zeros(1000, 9, dtype=torch.float64)}, r"table must be float32 \(S, 9\); got torch.float64"),
        ({"timesteps": torch.arange(999)}, r"timesteps must be int64 \(1000,\); got \(999,\)"),
        ({"noise": torch.zeros(2, 3, 4, 5)}, r"noise must be float32 \(2, 3, 4, 4\); got \(2, 3, 4, 5\)"),
        ({"x0": torch.zeros(2, 3, 4, 5)}, r"x0 must be float32 \(2, 3, 4, 4\); got \(2, 3, 4, 5\)"),
        ({"images": torch.zeros(3, dtype=torch.int64)}, r"images must be \(2,\); got \(3,\)"),
        ({"images": torch.zeros(2)}, r"images must be int64 \(N,\); got torch.float32 \(2,\)"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed must be a 0-d int64 tensor; got torch.int64 \(1,\)"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str, rng: np.random.Generator) -> None:
    table = coefficient_table(diffusion("eps", "fixedlarge"), ALL_TIMESTEPS, "ancestral", 0.0)
    a = arguments(rng, ALL_TIMESTEPS, table, 500, torch.device("cpu"))
    with pytest.raises(ValueError, match="reverse_step: .*" + message):
        reverse_step(**(a | change))
