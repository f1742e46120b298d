"""Images through the codec: exact round trips, and lengths against bounds that are known in closed form."""

import dataclasses
import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.marks import slow
from helpers.networks import SMALLEST, Formula, shaken
from helpers.own_networks import MLP
from torch import Tensor

from fastddpm.codec import Encoded, decode, encode
from fastddpm.codec.conditionals import ChainConditionals, pixel_cells
from fastddpm.codec.timesteps import divergences, shortest_path
from fastddpm.config import CodecOptions, DiffusionConfig, EngineConfig, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, UsageError
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet import UNet

MEAN, DEVIATION = 0.1, 0.2  # of the pixels of the Gaussian data set, in [-1, 1]
SIZE = 8


def gaussian_images(num: int, rng: np.random.Generator) -> np.ndarray:
    x0 = MEAN + DEVIATION * rng.normal(size=(num, 1, SIZE, SIZE))
    return np.clip(np.round((x0 + 1) * 127.5), 0, 255).astype(np.uint8)


def exact_denoiser(alpha_bar: np.ndarray) -> Formula:
    """E[x_0 | x_t] of that data set, as the eps it implies."""
    bars = torch.tensor(alpha_bar)

    def formula(x_t: Tensor, t: Tensor, _label: Tensor | None) -> Tensor:
        bar, x = bars[t], x_t.double()
        gain = bar.sqrt() * DEVIATION**2 / (bar * DEVIATION**2 + 1 - bar)
        x0 = MEAN + gain * (x - bar.sqrt() * MEAN)
        return ((x - bar.sqrt() * x0) / (1 - bar).sqrt()).float()

    return Formula(formula, image_size=SIZE)


def gaussian_sampler(variance: str, **options: float) -> Sampler:
    diffusion = Diffusion(DiffusionConfig(variance=variance, **options))  # type: ignore[arg-type]
    return Sampler(exact_denoiser(diffusion.alpha_bar), diffusion)  # type: ignore[arg-type]


def gaussian_bound(timesteps: tuple[int, ...], variance: str, betas: np.ndarray) -> float:
    """Bits per dimension of the exact denoiser over those timesteps, in closed form but for the decoder's term."""
    process = oracle.Process.respaced(np.array(timesteps), betas)
    bar, prev, beta = process.alpha_bar, process.alpha_bar_prev, process.beta
    posterior = DEVIATION**2 * (1 - bar) / (bar * DEVIATION**2 + 1 - bar)  # of x_0 given x_t
    coefficient = np.sqrt(prev) * beta / (1 - bar)
    own = process.posterior_variance if variance == "fixedsmall" else beta
    i = slice(0, -1)
    ratio = process.posterior_variance[i] / own[i]
    terms = 0.5 * (ratio - 1 - np.log(ratio) + coefficient[i] ** 2 * posterior[i] / own[i])
    prior = 0.5 * (bar[0] * (MEAN**2 + DEVIATION**2) - bar[0] - np.log(1 - bar[0]))
    decoder = oracle.Process.respaced(beta=betas).posterior_variance[1]
    return float(terms.sum() + prior) / math.log(2) + decoder_bits(bar[-1], decoder)


def decoder_bits(bar: float, variance: float) -> float:
    """Equation 13 with `variance` for the data set's pixels, by simulation."""
    rng = np.random.default_rng(1)
    x0 = np.round((MEAN + DEVIATION * rng.normal(size=200_000) + 1) * 127.5) / 127.5 - 1
    x_t = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * rng.normal(size=x0.shape)
    mean = MEAN + np.sqrt(bar) * DEVIATION**2 / (bar * DEVIATION**2 + 1 - bar) * (x_t - np.sqrt(bar) * MEAN)
    return float(-np.log2(oracle.bin_mass(x0, mean, np.full(x0.shape, np.log(variance)))).mean())


def coded(sampler: Sampler, images: np.ndarray, labels: np.ndarray | None = None, **options: object) -> Encoded:
    result = encode(sampler, images, labels, CodecOptions(**options))  # type: ignore[arg-type]
    found = decode(sampler, result.data)
    np.testing.assert_array_equal(found.images, result.images)
    if options.get("lossy") is None:
        np.testing.assert_array_equal(found.images, images)
    if labels is None:
        assert found.labels is None
    else:
        np.testing.assert_array_equal(found.labels, labels)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variance", "steps", "timesteps", "num"),
    [slow("fixedsmall", 30, 1000, 300), ("fixedlarge", 30, 1000, 300), slow("fixedsmall", None, 60, 200)],
)
def test_length_is_the_bound(
    variance: str, steps: int | None, timesteps: int, num: int, rng: np.random.Generator
) -> None:
    """`num` images of 64 pixels: chance moves the mean length by 1 bit / 113, 0.15%, at the least number."""
    scale = 1000 / timesteps
    sampler = gaussian_sampler(variance, timesteps=timesteps, beta_start=1e-4 * scale, beta_end=0.02 * scale)
    result = coded(sampler, gaussian_images(num, rng), steps=steps, batch=256)
    bound = gaussian_bound(
        result.header.timesteps, variance, oracle.betas("linear", timesteps, 1e-4 * scale, 0.02 * scale)
    )
    entropy = math.log2(DEVIATION * math.sqrt(2 * math.pi * math.e) * 127.5)  # that no code can beat
    assert len(result.header.timesteps) == steps or timesteps
    assert entropy - 0.01 < bound < 1.5 * entropy
    assert abs(result.bits_per_dim / bound - 1) < 0.01
    assert 8 * len(result.data) == pytest.approx(result.net + result.initial + result.overhead, abs=1e-6)
    assert result.initial / result.dimensions < 0.1 and result.overhead < 8 * 500


def small(**options: object) -> Sampler:
    """A network at random, and a process of 60 steps."""
    variance = options.pop("variance", "fixedlarge")
    prediction = options.pop("prediction", "eps")
    learned = str(variance).startswith("learned")
    loss = "hybrid" if learned else "simple"
    diffusion = DiffusionConfig(
        timesteps=60, beta_end=0.2, variance=variance, prediction=prediction, loss=loss  # type: ignore[arg-type]
    )  # fmt: skip
    config = dataclasses.replace(SMALLEST, learned_variance=learned, **options)
    unet = shaken(UNet(config), 0.05)
    return Sampler(unet, Diffusion(diffusion), engine=EngineConfig())  # type: ignore[arg-type]


def noise_images(sampler: Sampler, num: int, rng: np.random.Generator) -> np.ndarray:
    """The worst there is for any code, with black and white corners."""
    config: UNetConfig = sampler.network.config
    images = rng.integers(0, 256, (num, config.image_channels, config.image_size, config.image_size)).astype(np.uint8)
    images[0], images[-1, :, 0] = 0, 255
    return images


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "v", "xprev"])
def test_any_model_gives_back_any_image(prediction: str, variance: str, rng: np.random.Generator) -> None:
    sampler = small(prediction=prediction, variance=variance, image_channels=3)
    result = coded(sampler, noise_images(sampler, 7, rng), steps=8, batch=4)
    assert result.header.num_images == 7 and result.header.conditioning == "none"


def test_the_decoders_deviation_is_that_of_the_model() -> None:
    """For learned_range from that of the posterior at t = 1 to sqrt(beta_0), Nichol and Dhariwal's equation 15."""
    second = np.array([-1.0, 0.0, 0.5, 1.0])
    beta = np.linspace(1e-4, 0.2, 60)
    alpha_bar = np.cumprod(1 - beta)
    low = beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    share = (second + 1) / 2
    expected = {"learned_range": np.sqrt(beta[0] ** share * low ** (1 - share)), "learned": np.exp(second / 2)}
    for variance, deviations in expected.items():
        levels = ChainConditionals(small(variance=variance), pixel_cells(256))
        np.testing.assert_allclose(levels._decoder_deviation(second), deviations, rtol=1e-12)
    for variance in ("fixedsmall", "fixedlarge"):
        levels = ChainConditionals(small(variance=variance), pixel_cells(256))
        np.testing.assert_allclose(levels._decoder_deviation(None), np.sqrt(low), rtol=1e-12)


def test_one_image_and_two_steps(rng: np.random.Generator) -> None:
    sampler = small()
    coded(sampler, noise_images(sampler, 1, rng), steps=2, batch=1)


def test_without_the_compiled_library(rng: np.random.Generator) -> None:
    sampler = small()
    other = Sampler(sampler.network, sampler.diffusion, engine=EngineConfig(native=False))
    coded(other, noise_images(other, 9, rng), steps=6, batch=4)


def test_labels_are_coded_and_used(rng: np.random.Generator) -> None:
    sampler = small(num_classes=5, label_dropout=0.1)
    images, labels = noise_images(sampler, 12, rng), rng.integers(0, 5, 12)
    assert coded(sampler, images, labels, steps=6, batch=4).header.conditioning == "coded"
    assert coded(sampler, images, steps=6, batch=4).header.conditioning == "unknown"
    for wrong in (labels + 1, labels[:5], -labels - 1):
        with pytest.raises(UsageError, match=r"12 numbers in 0..4"):
            encode(sampler, images, wrong)
    always = small(num_classes=5)
    with pytest.raises(UsageError, match="give labels"):
        encode(always, images)
    with pytest.raises(UsageError, match="without classes"):
        encode(small(), images, labels)


def test_images_that_do_not_suit(rng: np.random.Generator) -> None:
    sampler = small()
    images = noise_images(sampler, 2, rng)
    for wrong in (images[:0], images.astype(np.float32), images[:, :, :2], images[0]):
        with pytest.raises(UsageError, match=r"images must be uint8 \(N, 1, 4, 4\)"):
            encode(sampler, wrong)
    for lossy in (59, 60, 1000):
        with pytest.raises(UsageError, match="lossy"):
            encode(sampler, images, None, CodecOptions(lossy=lossy))


def test_a_network_of_nan_is_refused(rng: np.random.Generator) -> None:
    sampler = small()
    images = noise_images(sampler, 2, rng)
    data = encode(sampler, images, None, CodecOptions(steps=4)).data
    with torch.no_grad():
        next(sampler.network.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="another model"):
        decode(sampler, data)
    with pytest.raises(DataError, match="not finite"):
        encode(sampler, images, None, CodecOptions(steps=None))


def test_another_models_file_is_refused(rng: np.random.Generator) -> None:
    sampler, other = small(), small()
    data = encode(sampler, noise_images(sampler, 2, rng), None, CodecOptions(steps=4)).data
    with pytest.raises(DataError, match="another model"):
        decode(other, data)
    process = Diffusion(DiffusionConfig(timesteps=60, beta_end=0.19))
    with pytest.raises(DataError, match="last bits"):
        decode(Sampler(sampler.network, process), data)


@pytest.mark.usefixtures("bf16_instructions")
def test_a_machine_with_other_last_bits_is_refused(rng: np.random.Generator) -> None:
    sampler = small()
    data = encode(sampler, noise_images(sampler, 2, rng), None, CodecOptions(steps=4)).data
    half = Sampler(sampler.network, sampler.diffusion, engine=EngineConfig(precision="bf16"))
    with pytest.raises(DataError, match=r"coded by float32 on .*last bits, by bfloat16 on"):
        decode(half, data)


# Lossy


@pytest.mark.slow
def test_lossy_is_shorter_and_as_exact_as_it_says(rng: np.random.Generator) -> None:
    """The error stays within a cell, and is at most what the middles of the cells would leave."""
    sampler, images = gaussian_sampler("fixedsmall"), gaussian_images(40, rng)
    lossless = coded(sampler, images, steps=30).bits_per_dim
    before = lossless
    for t in (10, 60):
        result = coded(sampler, images, steps=15, lossy=t)
        cell = 255 / (result.header.levels - 1)
        error = result.images.astype(float) - images
        assert result.header.levels < 256 and np.abs(error).max() <= cell + 1
        assert np.sqrt((error**2).mean()) < 1.02 * cell / math.sqrt(12) + 0.1
        assert result.bits_per_dim < before - 0.2
        # the entropy of a fine uniform quantiser, log2(deviation sqrt(2 pi e) / cell), is the best there is
        assert result.bits_per_dim < math.log2(DEVIATION * 127.5 * math.sqrt(2 * math.pi * math.e) / cell) + 0.5
        before = result.bits_per_dim


def test_a_network_that_knows_pays_nothing(rng: np.random.Generator) -> None:
    """Where the model is sure of a pixel, a lossy code spends far less than the quarter of a bit that dither costs."""
    diffusion = Diffusion(DiffusionConfig(variance="fixedsmall", prediction="x0"))
    sampler = Sampler(Formula(lambda x, t, label: torch.full_like(x, -1.0), image_size=8), diffusion)  # type: ignore[arg-type]
    result = coded(sampler, np.zeros((20, 1, 8, 8), np.uint8), steps=10, lossy=100)
    assert not result.images.any() and result.bits_per_dim < 0.1


def test_black_and_white_are_levels(rng: np.random.Generator) -> None:
    from fastddpm.codec.conditionals import pixel_cells
    from fastddpm.codec.lossy import reconstruct, to_cells

    values = np.arange(256, dtype=np.uint8)
    for levels in (2, 3, 7, 100, 255, 256):
        cells = pixel_cells(levels)
        chosen = to_cells(values, cells)
        assert chosen[0] == 0 and chosen[-1] == levels - 1 and (np.diff(chosen) >= 0).all()
        middles = cells.centres(chosen)
        assert np.abs(middles - (values / 127.5 - 1)).max() <= cells.width / 2 + 1e-12
        assert (reconstruct(chosen, values / 127.5 - 1, cells) == values).all()  # what lies in a cell stays


# Timesteps


def test_divergences_are_equation_5s() -> None:
    """Each entry against a Gaussian KL written out, for both fixed variances."""
    timesteps, errors = np.array([0, 3, 50, 999]), np.array([1e-4, 1e-3, 0.02, 0.3])
    for variance in ("fixedsmall", "fixedlarge"):
        found = divergences(Diffusion(DiffusionConfig(variance=variance)), timesteps, errors)  # type: ignore[arg-type]
        for i in range(4):
            for j in range(4):
                if j <= i:
                    assert found[i, j] == np.inf
                    continue
                process = oracle.Process.respaced(np.array([timesteps[j], timesteps[i]]))
                prev, beta = process.alpha_bar_prev[0], process.beta[0]
                shift = math.sqrt(prev) * beta / (1 - process.alpha_bar[0]) * math.sqrt(errors[j])
                own = beta if variance == "fixedlarge" else process.posterior_variance[0]
                expected = oracle.gaussian_kl(
                    np.array(0.0), np.log(process.posterior_variance[0]), np.array(shift), np.log(own)
                )
                np.testing.assert_allclose(found[i, j], expected, rtol=1e-6)


def test_the_shortest_path_is_the_shortest(rng: np.random.Generator) -> None:
    costs = np.where(np.triu(np.ones((9, 9)), 1) > 0, rng.uniform(size=(9, 9)), np.inf)
    for points in (2, 3, 5, 9):
        every = [(0, *middle, 8) for middle in combinations(range(1, 8), points - 2)]
        best = min(every, key=lambda path: sum(costs[a, b] for a, b in pairwise(path)))
        assert tuple(shortest_path(costs, points)) == best


def test_a_network_of_ones_own_codes_images(rng: np.random.Generator) -> None:
    """One that says nothing about itself: its shape is the sampler's."""
    torch.manual_seed(0)
    sampler = Sampler(MLP(), Diffusion(DiffusionConfig(timesteps=30, beta_end=0.3)), shape=(1, 2, 2))
    images = rng.integers(0, 256, (12, 1, 2, 2), dtype=np.uint8)
    coded = encode(sampler, images, options=CodecOptions(steps=10))
    np.testing.assert_array_equal(decode(sampler, coded.data).images, images)
