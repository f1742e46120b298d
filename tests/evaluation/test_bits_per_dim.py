"""Bits per dimension against the released code's formulas in float64, a source that is known, and statistics."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gaussian_source as source
from helpers import oracle, team
from helpers.bits_reference import SHAPE, SHORT, levels, network, reference, sampler_of
from helpers.networks import SMALLEST, Formula, shaken
from helpers.own_networks import MLP
from torch import Tensor

from fastddpm.config import DiffusionConfig
from fastddpm.data import Dataset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.evaluation import likelihood
from fastddpm.evaluation.bits_per_dim import BitsPerDim, Plan, bits_per_dim
from fastddpm.evaluation.context import EvaluationContext
from fastddpm.evaluation.likelihood import bits_cost, measure_bits
from fastddpm.evaluation.options import BitsOptions
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet import UNet

# Against float64, and against a source that is known


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "xprev"])
def test_every_parameterization(prediction: str, variance: str, rng: np.random.Generator) -> None:
    images, sampler = levels(5, rng), sampler_of(prediction, variance)
    prior, terms, errors = reference(images, sampler, seed=3)
    ours = bits_per_dim(sampler, images, None, BitsOptions(seed=3), batch=7)
    np.testing.assert_allclose(ours.terms, terms.mean(0), rtol=2e-5)
    np.testing.assert_allclose(ours.mse, errors.mean(0), rtol=2e-5)
    np.testing.assert_allclose(ours.term_errors, terms.std(0, ddof=1) / np.sqrt(5), rtol=1e-4)
    np.testing.assert_allclose(ours.mse_errors, errors.std(0, ddof=1) / np.sqrt(5), rtol=1e-4)
    np.testing.assert_allclose(ours.prior, prior.mean(), rtol=1e-12)
    whole = prior + terms.sum(1)
    np.testing.assert_allclose(ours.per_image, whole, rtol=1e-5)
    np.testing.assert_allclose(
        (ours.total, ours.standard_error), (whole.mean(), whole.std(ddof=1) / np.sqrt(5)), rtol=1e-4
    )
    assert ours.decoder == ours.terms[0] and ours.evaluations == 5 * 13 and (ours.counts == 5).all()


def test_a_thousand_small_terms(rng: np.random.Generator) -> None:
    """The paper's process: late terms of 1e-7 bits, which float32 gives with 1%, to 1e-4; the network is float32."""
    sampler = sampler_of(timesteps=1000, beta_start=1e-4, beta_end=0.02)
    images = np.clip(rng.normal(128, 60, (2, *SHAPE)), 0, 255).astype(np.uint8)
    prior, terms, _ = reference(images, sampler, seed=0)
    ours = bits_per_dim(sampler, images, None, BitsOptions(), batch=64)
    np.testing.assert_allclose(ours.terms, terms.mean(0), rtol=1e-4)
    np.testing.assert_allclose(ours.prior, prior.mean(), rtol=1e-9)
    assert terms[:, -1].max() < 1e-5 and ours.counts.sum() == 2000


def test_terms_are_float64() -> None:
    """x_0 is known, so a term is what beta_t for the posterior's variance costs: 1e-13 bits at the end, to 1e-6."""
    config = DiffusionConfig(prediction="x0", variance="fixedlarge")
    network = Formula(lambda x, t, label: torch.full_like(x, -0.6))
    images = np.full((1, *SHAPE), 51, np.uint8)
    ours = bits_per_dim(Sampler(network, Diffusion(config)), images, None, BitsOptions(), batch=64)  # type: ignore[arg-type]
    process = oracle.Process.respaced()
    expected = oracle.gaussian_kl(0.0, np.log(process.posterior_variance[1:]), 0.0, np.log(process.beta[1:])) / np.log(
        2
    )
    np.testing.assert_allclose(ours.terms[1:], expected, rtol=1e-6)
    assert ours.terms[999] < 1e-12


def test_the_bound_of_an_exact_model_is_the_entropy(rng: np.random.Generator) -> None:
    """With the exact reverse process nothing is lost: log2(s sqrt(2 pi e) 127.5) bits for each pixel, 6.57."""
    process = source.diffusion(variance="learned", loss="vlb")
    images = source.images(2048, rng)
    ours = bits_per_dim(source.sampler(process), images, None, BitsOptions(), batch=512)
    entropy = math.log2(source.DEVIATION * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert ours.standard_error < 0.006
    assert abs(ours.total - entropy) < 3 * ours.standard_error
    # -log2 of the density of the very pixels drawn is a better part of the spread than the noise is.
    z = (images / 127.5 - 1 - source.MEAN) / source.DEVIATION
    difference = ours.per_image - entropy - ((z**2).mean((1, 2, 3)) - 1) / 2 / math.log(2)
    error = difference.std() / math.sqrt(2048)
    assert abs(difference.mean()) < 3 * error and error < 0.005


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_terms_of_a_known_source(variance: str, rng: np.random.Generator) -> None:
    """Each KL divergence has its expectation in closed form; the decoder's term is integrated over x_0 and eps."""
    process = source.diffusion(variance=variance)
    ours = bits_per_dim(source.sampler(process), source.images(256, rng), None, BitsOptions(), batch=256)
    beta = oracle.betas("linear", 60, 2e-4, 0.35)
    reverse = oracle.Process.respaced(beta=beta)
    error = source.least_error(reverse.alpha_bar)
    used = beta if variance == "fixedlarge" else reverse.posterior_variance
    ratio = reverse.posterior_variance[1:] / used[1:]
    weight = reverse.alpha_bar_prev[1:] * (beta[1:] / (1 - reverse.alpha_bar[1:])) ** 2
    expected = 0.5 * (ratio - 1 - np.log(ratio) + weight * error[1:] / used[1:]) / np.log(2)
    assert (np.abs(ours.terms[1:] - expected) < 5 * ours.term_errors[1:]).all()
    assert (ours.term_errors[1:] < 0.02 * expected).all()
    assert (np.abs(ours.mse - error) < 5 * ours.mse_errors + 6e-6).all()  # the grid's own variance is 5e-6
    expected_decoder = decoder_of_the_source(reverse.alpha_bar[0], error[0], reverse.posterior_variance[1])
    assert abs(ours.decoder - expected_decoder) < 5 * ours.term_errors[0] and ours.term_errors[0] < 0.02


def decoder_of_the_source(alpha_bar: float, error: float, variance: float) -> float:
    """E[-log2 of the mass on x_0's bin], over the 256 levels and eps on a grid."""
    x0 = np.arange(256) / 127.5 - 1
    density = np.exp(-((x0 - source.MEAN) ** 2) / 2 / source.DEVIATION**2)
    eps = np.linspace(-8, 8, 2001)
    weights = np.exp(-(eps**2) / 2)
    x_t = np.sqrt(alpha_bar) * x0[:, None] + np.sqrt(1 - alpha_bar) * eps
    mean = error * (source.MEAN / source.DEVIATION**2 + np.sqrt(alpha_bar) / (1 - alpha_bar) * x_t)
    bits_of_each = -np.log2(np.maximum(oracle.bin_mass(x0[:, None], mean, np.full_like(mean, np.log(variance))), 1e-12))
    return float(density @ bits_of_each @ weights / density.sum() / weights.sum())


# The estimate from every k-th timestep


def test_the_estimate_from_every_third_timestep(rng: np.random.Generator) -> None:
    """Equal to sums over exactly those terms that its plan names."""
    images, sampler = levels(8, rng), sampler_of()
    prior, terms, errors = reference(images, sampler, seed=1)
    ours = bits_per_dim(sampler, images, None, BitsOptions(seed=1, every=3), batch=5)
    offsets = Plan.of(8, 13, BitsOptions(seed=1, every=3)).offsets
    means, rest = [terms[:, 0].mean()], np.zeros(8)
    for t in range(1, 13):
        own = offsets == (t - 1) % 3
        means.append(terms[own, t].mean())
        rest[own] += terms[own, t]
        assert ours.counts[t] == own.sum()
        np.testing.assert_allclose(ours.mse[t], errors[own, t].mean(), rtol=2e-5)
    np.testing.assert_allclose(ours.terms, means, rtol=2e-5)
    np.testing.assert_allclose(ours.total, prior.mean() + np.sum(means), rtol=2e-5)
    np.testing.assert_allclose(ours.per_image, prior + terms[:, 0] + 3 * rest, rtol=2e-5)
    assert ours.evaluations == 8 + sum(ours.counts[1:]) and ours.counts[0] == 8


def test_every_timestep_is_as_likely_for_every_image() -> None:
    """A permutation in each group of 5; over 600 seeds each of the 5 offsets falls on each image 120 times, +- 5 sd."""
    drawn = np.stack([Plan.of(12, 20, BitsOptions(seed=seed, every=5)).offsets for seed in range(600)])
    assert (np.sort(drawn[:, :5]) == np.arange(5)).all() and (np.sort(drawn[:, 5:10]) == np.arange(5)).all()
    counts = np.stack([(drawn == offset).sum(0) for offset in range(5)])
    assert np.abs(counts - 120).max() < 5 * np.sqrt(600 * 0.2 * 0.8)
    assert (Plan.of(30, 20, BitsOptions(seed=7, every=5)).offsets[:12] == drawn[7]).all()


@pytest.mark.slow
def test_the_estimate_is_unbiased_and_knows_its_error() -> None:
    """400 estimates of fresh images: their mean is that of full evaluations, their spread what each of them says."""
    rng, sampler = np.random.default_rng(5), sampler_of()
    estimates, errors, full = [], [], []
    for seed in range(400):
        images = np.clip(rng.normal(128, 20 + 60 * rng.random((22, 1, 1, 1)), (22, *SHAPE)), 0, 255).astype(np.uint8)
        found = bits_per_dim(sampler, images, None, BitsOptions(seed=seed, every=4), batch=512)
        estimates.append(found.total)
        errors.append(found.standard_error)
        full.append(bits_per_dim(sampler, images, None, BitsOptions(seed=seed), batch=512).total)
    difference = np.subtract(estimates, full)
    assert abs(difference.mean()) < 4 * difference.std() / 20
    assert difference.std() > 0.2 * np.std(full)  # it is not the full evaluation in disguise
    assert np.std(estimates) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 9}, "--bits.images must be at most 8, the size of the data set; got 9"),
        (
            {"every": 5},
            "too few images for --bits.every 5: it needs 10, two for each timestep, and the data set has 8; "
            "use --bits.every 4 or less",
        ),
        (
            {"every": 3, "images": 4},
            "it needs 6, two for each timestep, and --bits.images is 4; use --bits.images 6 or more, or "
            "--bits.every 2 or less",
        ),
        ({"every": 2, "images": 3}, "use --bits.images 4 or more, or --bits.every 1$"),
        ({"every": 13, "images": 8}, "--bits.every must be below 13, the number of timesteps of the model; got 13"),
    ],
)
def test_plans_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan.of(8, 13, BitsOptions(**options))


@pytest.mark.parametrize("options", [{"images": 0}, {"every": 0}, {"seed": 2**63}])
def test_options_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        BitsOptions(**options)


def test_some_of_the_images_are_those_of_the_whole(rng: np.random.Generator) -> None:
    """Picked from everywhere (a data set may be sorted), each with the noise that it has in the whole."""
    images, sampler = levels(60, rng), sampler_of()
    whole = bits_per_dim(sampler, images, None, BitsOptions(seed=2), batch=64)
    some = bits_per_dim(sampler, images, None, BitsOptions(seed=2, images=20), batch=64)
    assert len(set(some.indices.tolist())) == 20 and 15 < np.mean(some.indices) < 45
    np.testing.assert_array_equal(some.per_image, whole.per_image[some.indices])
    more = bits_per_dim(sampler, images, None, BitsOptions(seed=2, images=30), batch=64)
    np.testing.assert_array_equal(more.indices[:20], some.indices)


# What the result does not depend on


def assert_same(one: BitsPerDim, other: BitsPerDim) -> None:
    assert one.to_dict() == other.to_dict()
    np.testing.assert_array_equal(one.per_image, other.per_image)
    np.testing.assert_array_equal(one.indices, other.indices)


@pytest.mark.parametrize("every", [1, 5])
def test_the_batch_changes_nothing(every: int, rng: np.random.Generator) -> None:
    images, sampler = levels(70, rng), sampler_of()
    options = BitsOptions(every=every)
    expected = bits_per_dim(sampler, images, None, options, batch=70)
    for batch in (1, 13, 4096):
        assert_same(bits_per_dim(sampler, images, None, options, batch=batch), expected)
    assert bits_per_dim(sampler, images, None, BitsOptions(every=every, seed=1), batch=70).total != expected.total


def of_a_unet(group: ProcessGroup) -> BitsPerDim:
    torch.manual_seed(0)
    sampler = Sampler(shaken(UNet(SMALLEST)), Diffusion(DiffusionConfig(**SHORT)))  # type: ignore[arg-type]
    images = levels(70, np.random.default_rng(0), (1, 4, 4))
    return bits_per_dim(sampler, images, None, BitsOptions(every=2), batch=16 + group.rank, group=group)


@pytest.mark.slow
def test_two_processes_find_what_one_finds() -> None:
    """As torchrun starts them, with a network and its compiled kernels; each returns the whole, with the same bits."""
    expected = of_a_unet(ProcessGroup()).to_dict()
    for found in team.values(2, team.grouped, of_a_unet):
        assert found.to_dict() == expected


def test_the_bound_is_of_the_whole_process_without_guidance(rng: np.random.Generator) -> None:
    seen: list[Tensor] = []

    def formula(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        seen.append(label)
        return 0.4 * x + 0.1 * label.reshape(-1, 1, 1, 1)

    net = Formula(formula, num_classes=3, label_dropout=0.1)
    images, labels = levels(4, rng), np.array([0, 2, 1, 2])
    diffusion = Diffusion(DiffusionConfig(**SHORT))  # type: ignore[arg-type]
    plain, guided = Sampler(net, diffusion), Sampler(net, diffusion, steps=4, guidance=3.0)  # type: ignore[arg-type]
    expected = bits_per_dim(plain, images, labels, BitsOptions(), batch=9)
    assert torch.cat(seen).bincount().tolist() == [13, 13, 26]
    assert expected.conditioning == "given the class, without guidance"
    assert_same(bits_per_dim(guided, images, labels, BitsOptions(), batch=9), expected)
    seen.clear()
    without = bits_per_dim(plain, images, None, BitsOptions(), batch=9)
    assert set(torch.cat(seen).tolist()) == {3} and without.conditioning == "not told the class"
    assert without.total != expected.total
    with pytest.raises(UsageError, match="needs the class of each image"):
        never_without = Sampler(Formula(formula, num_classes=3), diffusion)  # type: ignore[arg-type]
        bits_per_dim(never_without, images, None, BitsOptions(), batch=9)
    with pytest.raises(UsageError, match=r"labels must be 4 numbers in 0..2"):
        bits_per_dim(plain, images, labels + 1, BitsOptions(), batch=9)


# What the command asks for


def context_of(images: np.ndarray, out: Path) -> tuple[EvaluationContext, list[int]]:
    """With the numbers of images that its network was evaluated for."""
    evaluated: list[int] = []
    formula = network("eps", "fixedlarge", 13)

    def counted(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        evaluated.append(len(x))
        return formula(x, t, label)

    sampler = Sampler(Formula(counted), Diffusion(DiffusionConfig(**SHORT)))  # type: ignore[arg-type]
    dataset = Dataset.of(images, None, "levels")
    return EvaluationContext("mnist", sampler, dataset, 16, torch.device("cpu"), out, ProcessGroup()), evaluated


@pytest.mark.parametrize("every", [1, 3])
def test_what_is_measured_is_written_and_kept(every: int, tmp_path: Path, rng: np.random.Generator) -> None:
    context, evaluated = context_of(levels(9, rng), tmp_path)
    options = BitsOptions(every=every, images=7)
    found = measure_bits(context, options)
    assert sum(evaluated) == bits_cost(context, options) == found["evaluations"]
    assert found["bits_per_dim"] == pytest.approx(found["prior"] + found["terms_sum"] + found["decoder"], rel=1e-14)
    assert json.loads(json.dumps(found)) == found and found["settings"]["every"] == every
    expected = bits_per_dim(context.sampler, context.dataset.images, None, options, batch=3)
    rows = np.genfromtxt(tmp_path / found["per_timestep"], delimiter=",", names=True)
    np.testing.assert_allclose(rows["bits"], expected.terms, rtol=1e-8)
    np.testing.assert_allclose(rows["x0_mse"], expected.mse, rtol=1e-8)
    np.testing.assert_array_equal(rows["t"], np.arange(13))
    np.testing.assert_array_equal(rows["images"], expected.counts)

    evaluated.clear()
    assert measure_bits(context, options) == found and not evaluated
    assert_same(likelihood.bits_of(context, options), expected)
    with pytest.raises(UsageError, match=r"bits.npz holds a result with seed 0, not 1; choose another --out"):
        measure_bits(context, BitsOptions(every=every, images=7, seed=1))
    (tmp_path / "bits.npz").write_bytes((tmp_path / "bits.npz").read_bytes()[:100])
    assert measure_bits(context, options) == found and evaluated
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bits.csv", "bits.npz"]


def test_a_result_larger_than_it_can_be_is_not_read(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zeros pack to a thousandth: a forged file of a megabyte would take a gigabyte of memory."""
    context, evaluated = context_of(levels(3, rng), tmp_path)
    found = measure_bits(context, BitsOptions())
    with np.load(tmp_path / "bits.npz") as kept:
        forged = dict(kept)
    for name in ("terms", "term_errors", "mse", "mse_errors", "counts"):
        forged[name] = np.zeros(2**16, forged[name].dtype)
    np.savez_compressed(tmp_path / "bits.npz", **forged)
    evaluated.clear()
    assert measure_bits(context, BitsOptions()) == found and evaluated
    assert "bits.npz cannot be read (ValueError: its arrays take 2,6" in capsys.readouterr().err


def test_another_network_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    context, _ = context_of(levels(3, rng), tmp_path)
    measure_bits(context, BitsOptions())
    with torch.no_grad():
        next(context.sampler.network.parameters()).add_(1)
    with pytest.raises(UsageError, match=r"bits.npz holds a result with network .*, not .*; choose another --out"):
        measure_bits(context, BitsOptions())


def test_one_image_has_no_standard_error(tmp_path: Path, rng: np.random.Generator) -> None:
    context, _ = context_of(levels(1, rng), tmp_path)
    found = measure_bits(context, BitsOptions())
    assert found["standard_error"] is None and found["bits_per_dim"] > 0


def test_the_bound_of_a_network_of_ones_own(rng: np.random.Generator) -> None:
    """One that says nothing about itself has the terms of the same function in a network that does."""
    torch.manual_seed(0)
    network, diffusion = MLP(), Diffusion(DiffusionConfig(**SHORT))
    images = rng.integers(0, 256, (5, 1, 2, 2), dtype=np.uint8)
    told = Formula(lambda x, t, label: network(x, t.flatten()))
    ours, expected = (
        bits_per_dim(sampler, images, None, BitsOptions(), batch=64)
        for sampler in (Sampler(network, diffusion, shape=(1, 2, 2)), Sampler(told, diffusion))
    )
    np.testing.assert_array_equal(ours.terms, expected.terms)
    np.testing.assert_array_equal(ours.per_image, expected.per_image)
