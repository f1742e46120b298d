"""Bits per dimension by the ODE: a source whose density is known, the solver's order, every prediction, the command."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import gaussian_source as source
from helpers import oracle
from helpers.networks import Formula, random_model, tiny
from torch import Tensor

from fastddpm import evaluate
from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.evaluation.ode_bits import OdeEvaluator, ode_bits_per_dim
from fastddpm.evaluation.options import OdeBitsOptions
from fastddpm.evaluation.probability_flow import ProbabilityFlow, most_steps, spread
from fastddpm.sampling.sampler import Sampler
from fastddpm.training.trainer import Trainer

SIZE = source.SIZE**2
LINEAR = {"timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def uniform_of(images: np.ndarray, index: int, seed: int) -> np.ndarray:
    """The first words of Philox of (value, image, draw 0, stream 9), as numbers in (0, 1)."""
    words = oracle.philox((np.arange(SIZE), index, 0, 9), seed)[..., 0]
    return (words / 2**32 + 2.0**-33).reshape(images.shape[1:])


def known_bits(images: np.ndarray, indices: np.ndarray, bar: np.ndarray, seed: int) -> np.ndarray:
    """Of each image: the flow is x -> alpha_T m + sqrt(v_T / v_0) (x - alpha_0 m), with v the variance of x_t."""
    found = []
    for index in indices:
        x0 = images[index] / 127.5 - 1 + 2 / 255 * (uniform_of(images, index, seed) - 0.5)
        variance = bar * source.DEVIATION**2 + 1 - bar
        stretch = math.sqrt(variance[-1] / variance[0])
        x_end = math.sqrt(bar[-1]) * source.MEAN + stretch * math.sqrt(bar[0]) * (x0 - source.MEAN)
        log_p = np.sum(-0.5 * x_end**2 - 0.5 * math.log(2 * math.pi) + math.log(stretch * math.sqrt(bar[0])))
        found.append(-log_p / SIZE / math.log(2) + math.log2(127.5))
    return np.array(found)


def bits(images: np.ndarray, process: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    ours = OdeEvaluator(source.sampler(source.diffusion(**process)), images, None, OdeBitsOptions(**options), batch=64)
    return ours.evaluate(np.arange(len(ours.indices)), ours.nodes)[:, 0], ours.indices


def test_a_gaussian_source_has_its_known_bits(rng: np.random.Generator) -> None:
    """To the error of 20 steps; the Jacobian is diagonal, so that a probe of signs gives its very trace."""
    images = source.images(3, rng)
    found, indices = bits(images, LINEAR, steps=20, seed=5)
    known = known_bits(images, indices, np.cumprod(1 - oracle.betas("linear", 1000)), 5)
    np.testing.assert_allclose(found, known, atol=8e-4)
    assert np.ptp(known) > 0.01
    exact, estimated = (bits(images, LINEAR, steps=1, seed=5, exact_trace=exact)[0] for exact in (True, False))
    np.testing.assert_allclose(exact, estimated, atol=1e-5)


@pytest.mark.slow
def test_the_mean_is_the_entropy_of_the_source(rng: np.random.Generator) -> None:
    """log2(s sqrt(2 pi e) 127.5) bits, 6.57, whose spread the standard error tells."""
    images = source.images(256, rng)
    sampler = source.sampler(source.diffusion(**LINEAR))
    ours = ode_bits_per_dim(sampler, images, None, OdeBitsOptions(images=256, steps=20), batch=256)
    entropy = math.log2(source.DEVIATION * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert abs(ours.total - entropy) < 4 * ours.standard_error < 0.05
    expected = 1 / math.sqrt(2 * SIZE * 256) / math.log(2)  # of z^2 / 2, in bits
    assert abs(ours.standard_error / expected - 1) < 0.2 and math.isnan(ours.draws_error)


@pytest.mark.slow
def test_halving_the_steps_leaves_an_eighth_of_the_error(rng: np.random.Generator) -> None:
    images = source.images(2, rng)
    bar = np.cumprod(1 - oracle.betas("linear", 1000))
    errors = []
    for steps in (10, 20, 40):
        found, indices = bits(images, LINEAR, steps=steps)
        errors.append(np.abs(found - known_bits(images, indices, bar, 0)).mean())
    ratios = np.array(errors[:-1]) / errors[1:]
    assert (ratios > 6).all() and (ratios < 16).all(), ratios
    ours = ode_bits_per_dim(
        source.sampler(source.diffusion(**LINEAR)), images, None, OdeBitsOptions(images=2, steps=20), batch=64
    )
    assert 0.6 < abs(ours.halved_difference) / 7 / errors[1] < 1.7


@pytest.mark.parametrize("schedule", ["cosine", "jsd"])
def test_schedules_that_end_without_signal(schedule: Any) -> None:
    """phi ends at or near pi / 2. With a known x_0, all that flows is its noise, which grows by sigma_T / sigma_0."""
    process = Diffusion(DiffusionConfig(timesteps=400, schedule=schedule, prediction="x0"))
    flow = ProbabilityFlow(Formula(lambda x, t, label: torch.full_like(x, 0.4)), process)
    nodes = spread(flow.angles, 100)
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    end = flow.solve(x, nodes.tolist(), None, torch.ones_like(x))
    stretch = flow.sigma[-1] / flow.sigma[0]
    expected = flow.alpha[-1] * 0.4 + stretch * (x - flow.alpha[0] * 0.4)
    torch.testing.assert_close(end.x, expected, rtol=2e-2, atol=0)
    np.testing.assert_allclose(end.log_density.numpy(), 4 * math.log(stretch), rtol=2e-2)
    assert np.isfinite(flow.angles).all() and flow.angles[-1] > 1.5


# Networks


def matrix_network(prediction: str, process: Diffusion, weight: Tensor) -> Formula:
    """x_0 = W x_t, as the prediction; no Jacobian is diagonal."""
    alpha, sigma = (torch.tensor(each) for each in (process.sqrt_alpha_bar, process.sqrt_one_minus_alpha_bar))
    if prediction == "xprev":
        from_x0, from_xt = torch.tensor(process.posterior_x0), torch.tensor(process.posterior_xt)

    def formula(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        x = x.double()
        x0 = (x.flatten(1) @ weight.T).reshape(x.shape)
        if prediction == "eps":
            return ((x - alpha[t] * x0) / sigma[t]).float()
        if prediction == "v":
            return ((alpha[t] * x - x0) / sigma[t]).float()
        return (from_x0[t] * x0 + from_xt[t] * x if prediction == "xprev" else x0).float()

    return Formula(formula)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "xprev"])
def test_every_prediction_has_the_same_flow(prediction: Any) -> None:
    """v = (alpha x - W x) / sigma, whatever the network is asked for; the mean over all probes is the trace."""
    process = Diffusion(DiffusionConfig(prediction=prediction, timesteps=100, beta_start=1e-3, beta_end=0.1))
    weight = 0.3 * torch.randn(4, 4, dtype=torch.float64)
    flow = ProbabilityFlow(matrix_network(prediction, process, weight), process)
    x, t = torch.randn(1, 1, 2, 2, dtype=torch.float64).expand(16, 1, 2, 2), 60
    signs = torch.tensor([[(n >> bit & 1) * 2.0 - 1 for bit in range(4)] for n in range(16)]).double()
    velocity, trace = flow.velocity(x, t, None, signs.reshape(x.shape))
    alpha, sigma = process.sqrt_alpha_bar[t], process.sqrt_one_minus_alpha_bar[t]
    expected = (alpha * x.flatten(1) - x.flatten(1) @ weight.T) / sigma
    torch.testing.assert_close(velocity.flatten(1), expected, rtol=1e-4, atol=1e-5)
    jacobian = (alpha * torch.eye(4, dtype=torch.float64) - weight) / sigma
    torch.testing.assert_close(trace, torch.einsum("ni,ij,nj->n", signs, jacobian, signs), rtol=1e-4, atol=1e-4)
    _, exact = flow.velocity(x[:1], t, None, None)
    assert abs(float(exact) - float(jacobian.trace())) < 1e-4 and abs(float(trace.mean() - exact)) < 1e-4


def test_a_u_net_flows_with_labels_in_any_batch() -> None:
    """Bits are a function of image and draw; the class of an image changes them; draws are told apart."""
    model = random_model(tiny(num_classes=3, label_dropout=0.1), DiffusionConfig(timesteps=12))
    sampler = Sampler(model.unet, model.diffusion)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 12, 12), dtype=np.uint8)
    options = OdeBitsOptions(images=3, draws=2, steps=1)

    def of(labels: list[int], batch: int) -> np.ndarray:
        ours = OdeEvaluator(sampler, images, np.array(labels), options, batch)
        return ours.evaluate(np.arange(3), ours.nodes)[np.argsort(ours.indices)]

    whole = of([0, 1, 2], 6)
    np.testing.assert_allclose(of([0, 1, 2], 4), whole, rtol=1e-6)
    other = of([0, 1, 0], 6)
    np.testing.assert_allclose(other[:2], whole[:2], rtol=1e-6)
    assert abs(other[2] - whole[2]).min() > 1e-4 and abs(whole[:, 0] - whole[:, 1]).min() > 1e-4
    ours = ode_bits_per_dim(sampler, images, np.array([0, 1, 2]), options, batch=6)
    spreads = whole.var(1, ddof=1)
    np.testing.assert_allclose(ours.draws_error, math.sqrt(spreads.sum() / 2) / 3, rtol=1e-5)
    np.testing.assert_allclose(ours.standard_error, whole.mean(1).std(ddof=1) / math.sqrt(3), rtol=1e-5)
    assert ours.conditioning == "given the class, without guidance"


@pytest.mark.slow
def test_the_decoder_end_of_a_gaussian_source(rng: np.random.Generator) -> None:
    """The bound's own decoder on the exact density: above the entropy by what the decoder loses, below the bound."""
    images = source.images(128, rng)
    process = source.diffusion(variance="learned", loss="vlb", **LINEAR)
    sampler = source.sampler(process)
    options = OdeBitsOptions(images=128, steps=20, end="decoder")
    ours = ode_bits_per_dim(sampler, images, None, options, batch=128)
    entropy = math.log2(source.DEVIATION * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert abs(ours.total - entropy) < 4 * ours.standard_error + 0.01


# Steps


def test_steps_are_spread_over_all_timesteps() -> None:
    angles = ProbabilityFlow(Formula(lambda x, t, label: x), Diffusion()).angles
    for steps in (1, 7, 100, 498, 499):
        nodes = spread(angles, steps)
        assert len(nodes) == steps + 1 and (nodes[0], nodes[-1]) == (0, 999)
        assert steps == 1 or np.diff(nodes).min() >= 2
    assert most_steps(1000) == 499 and (np.diff(spread(angles, 499)) == 2).sum() == 498
    with pytest.raises(
        UsageError, match=r"--ode-bits.steps must be in 1\.\.499, half of the 1000 timesteps .*; got 500"
    ):
        spread(angles, 500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0, "draws": -1, "steps": 0}, "3 options cannot be used"),
        ({"end": "clean"}, "end must be one of uniform, decoder; got 'clean'"),
        ({"seed": 2**63}, "seed must be in"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OdeBitsOptions(**options)


# The command


@pytest.mark.slow
def test_the_command_measures_resumes_and_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted evaluation goes on; more images are added; other options are refused."""
    from fastddpm.data import open_dataset
    from fastddpm.evaluation import ode_bits, ode_likelihood
    from fastddpm.presets import preset

    monkeypatch.setattr(ode_bits, "BLOCK", 2)
    monkeypatch.setattr(ode_likelihood, "BLOCK", 2)
    base = preset("mnist")
    unet = dataclasses.replace(base.unet, width=8, multipliers=(1,), groups=4, attention_resolutions=(8,))
    small = dataclasses.replace(base, unet=unet)
    Trainer(small, open_dataset(None, image_size=16, channels=1), torch.device("cpu")).save(tmp_path / "run", None)

    def measure(*more: str) -> dict[str, Any]:
        words = "--metrics ode-bpd --ode-bits.steps 1 --batch 4 --device cpu --ode-bits.images"
        evaluate.main([str(tmp_path / "run"), *words.split(), *more])
        record: dict[str, Any] = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["train"]["ode-bpd"]
        return record

    first = measure("3")
    said = capsys.readouterr()
    assert f"| ode-bpd, train | {first['bits_per_dim']:.4f} ± {first['standard_error']:.4f} bits/dim |" in said.out
    assert "ode-bpd: 15 evaluations with a derivative" in said.err
    folder = tmp_path / "run/evaluation/train"
    rows = np.loadtxt(folder / "ode-bits.csv", delimiter=",", skiprows=1)
    assert rows.shape == (3, 2) and abs(rows[:, 1].mean() - first["bits_per_dim"]) < 1e-6
    (folder / "ode-bits-parts/shard-00001.npz").unlink()
    kept = (folder / "ode-bits-parts/shard-00000.npz").stat().st_mtime_ns
    assert measure("3")["bits_per_dim"] == first["bits_per_dim"]
    assert (folder / "ode-bits-parts/shard-00000.npz").stat().st_mtime_ns == kept
    assert measure("4")["num_images"] == 4
    np.testing.assert_allclose(np.loadtxt(folder / "ode-bits.csv", delimiter=",", skiprows=1)[:3], rows, rtol=1e-6)
    with pytest.raises(UsageError, match="holds bits with seed 0, not 1; choose another --out, or remove it"):
        measure("4", "--ode-bits.seed", "1")
    with pytest.raises(UsageError, match=r"--ode-bits.steps must be in 1\.\.499"):
        measure("4", "--ode-bits.steps", "500")
