"""Tables, parameterizations and losses against float64 written from the papers."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from torch import Tensor

from fastddpm.config import DiffusionConfig, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.ops.noise import NoiseKey
from fastddpm.unet import UNet

PREDICTIONS = ["eps", "x0", "v", "xprev"]
STREAM_FORWARD, STREAM_EXAMPLE = 2, 3
BITS = 1 / np.log(2)


def float32(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def configuration(**options: Any) -> DiffusionConfig:
    return DiffusionConfig(**options)


def example(rng: np.random.Generator, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_0 on the grid of pixel values, eps, and x_t of the linear process."""
    x0 = rng.integers(0, 256, (len(t), 3, 6, 4)) / 127.5 - 1
    eps = rng.standard_normal(x0.shape)
    return x0, eps, oracle.Process.respaced().forward(t, x0, eps)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quad", "const"])
def test_tables(schedule: str) -> None:
    diffusion = Diffusion(configuration(schedule=schedule))
    process = oracle.Process.respaced(beta=oracle.betas(schedule, 1000))
    bar, prev, beta = process.alpha_bar, process.alpha_bar_prev, process.beta
    posterior = process.posterior_variance
    expected = {
        "betas": beta,
        "alpha_bar": bar,
        "alpha_bar_prev": prev,
        "posterior_variance": posterior,
        "posterior_log_variance": np.log(np.append(posterior[1], posterior[1:])),
        "posterior_x0": np.sqrt(prev) * beta / (1 - bar),
        "posterior_xt": np.sqrt(1 - beta) * (1 - prev) / (1 - bar),
        "model_log_variance": np.log(np.append(posterior[1], beta[1:])),
        "snr": bar / (1 - bar),
        "sqrt_alpha_bar": np.sqrt(bar),
        "sqrt_one_minus_alpha_bar": np.sqrt(1 - bar),
    }
    t = torch.tensor([0, 1, 500, 999])
    for name, table in expected.items():
        ours = getattr(diffusion, name)
        assert ours.dtype == np.float64, name
        # 1 - alpha_bar of a cosine's first steps keeps 12 digits.
        np.testing.assert_allclose(ours, table, rtol=1e-9, atol=1e-15, err_msg=name)
        on_device = diffusion.at(name, t)
        assert on_device.shape == (4, 1, 1, 1) and on_device.dtype == torch.float32
        np.testing.assert_array_equal(on_device.flatten().numpy(), ours[t.numpy()].astype(np.float32))


def test_learned_range_ends_at_beta() -> None:
    """Equation 15 of Nichol and Dhariwal 2021 at t = 0, too: there from 5.453e-5, the posterior's first, to 1e-4."""
    diffusion = Diffusion(configuration(variance="learned_range", loss="vlb"))
    np.testing.assert_allclose(np.exp(diffusion.model_log_variance), oracle.betas("linear", 1000), rtol=1e-12)
    x = torch.zeros(1, 1, 1, 1)
    for raw, expected in ((-1.0, 5.453e-5), (1.0, 1e-4), (0.0, np.sqrt(5.453e-5 * 1e-4))):
        model, _ = diffusion.p(torch.cat([x, x + raw], 1), x, torch.tensor([0]))
        np.testing.assert_allclose(np.exp(model.log_variance.item()), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"schedule": "jsd", "timesteps": 20}, "jsd with 20 timesteps leaves no signal in x_t at t = 19"),
        ({"schedule": "jsd", "loss": "min_snr"}, "jsd with 1000 timesteps leaves no signal in x_t at t = 999"),
        # alpha_bar is 2^-(t+1), and 1 / sqrt(2^-256) = 2^128 is no float32.
        ({"schedule": "const", "beta_end": 0.5}, "const with 1000 timesteps leaves no signal in x_t at t = 255"),
        ({"timesteps": 20_000}, "linear with 20000 timesteps leaves no signal in x_t"),
        ({"timesteps": 20_000, "prediction": "xprev"}, "prediction xprev cannot give x_0; predict v or x0"),
    ],
)
def test_a_process_that_forgets_everything_is_refused(options: dict[str, Any], first: str) -> None:
    """x_0 = x_t / sqrt(alpha_bar) - .. would be infinite in float32, and a chain NaN."""
    with pytest.raises(UsageError, match=first):
        Diffusion(configuration(**options))


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_predictions_that_need_no_signal(prediction: str) -> None:
    """The released code's jsd ends with alpha_bar = 0."""
    diffusion = Diffusion(configuration(schedule="jsd", timesteps=20, prediction=prediction))
    out = torch.full((1, 1, 2, 2), 0.25)
    for t in (0, 10, 19):
        model, x0 = diffusion.p(out, torch.full_like(out, 0.5), torch.tensor([t]))
        assert torch.isfinite(model.mean).all() and torch.isfinite(x0).all()
    assert torch.equal(x0, out if prediction == "x0" else -out)  # v = -x_0 where sigma is 1
    for schedule in ("linear", "quad", "cosine", "const"):
        Diffusion(configuration(schedule=schedule, timesteps=2000))


def test_papers_constants() -> None:
    diffusion = Diffusion()
    np.testing.assert_allclose(diffusion.alpha_bar[-1], 4.0358e-5, rtol=1e-4)
    # At t = 0 the posterior is x_0 itself.
    np.testing.assert_allclose([diffusion.posterior_x0[0], diffusion.posterior_xt[0]], [1, 0], atol=1e-12)
    np.testing.assert_allclose(diffusion.posterior_variance[1], 5.453e-5, rtol=1e-4)
    assert diffusion.posterior_variance[0] == 0


def test_q_posterior_is_bayes_rule(rng: np.random.Generator) -> None:
    """q(x_{t-1}|x_t, x_0) from the product of q(x_t|x_{t-1}) and q(x_{t-1}|x_0), both Gaussian in x_{t-1}."""
    t = np.array([1, 2, 500, 999])
    x0, _, x_t = example(rng, t)
    beta = oracle.betas("linear", 1000)
    prev = oracle.column(np.cumprod(1 - beta)[t - 1])
    beta = oracle.column(beta[t])
    precision = (1 - beta) / beta + 1 / (1 - prev)
    mean = (np.sqrt(1 - beta) * x_t / beta + np.sqrt(prev) * x0 / (1 - prev)) / precision
    posterior = Diffusion().q_posterior(float32(x0), float32(x_t), torch.tensor(t))
    np.testing.assert_allclose(posterior.mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(posterior.log_variance.numpy(), np.log(1 / precision), rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_target_gives_x0_back(prediction: str, rng: np.random.Generator) -> None:
    """x_0 is a difference of terms up to 1/coefficient large: so many roundings of float32 remain."""
    t = np.array([0, 1, 100, 500, 900, 999])
    x0, eps, x_t = example(rng, t)
    process = oracle.Process.respaced()
    out = process.target(t, prediction, x0, x_t, eps)
    ours = Diffusion(configuration(prediction=prediction)).predict_x0(float32(out), float32(x_t), torch.tensor(t))
    terms = np.abs(process.predict_x0(t, prediction, out, 0 * x_t)).max((1, 2, 3)) + 1
    error = np.abs(ours.double().numpy() - x0).max((1, 2, 3))
    assert (error < 2.0**-21 * terms).all(), error / terms


@pytest.mark.parametrize("clip", [None, True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_p_mean(prediction: str, clip: bool | None, rng: np.random.Generator) -> None:
    """The mean is that of the clipped x_0 (equation 7); a network that predicts the mean is not clipped."""
    t = np.array([0, 1, 400, 800])
    x0, eps, x_t = example(rng, t)
    process = oracle.Process.respaced()
    out = process.target(t, prediction, x0, x_t, eps) + 0.3 * rng.standard_normal(x0.shape)
    expected_x0 = process.predict_x0(t, prediction, out, x_t)
    if clip is not False:
        expected_x0 = np.clip(expected_x0, -1, 1)
    expected = out if prediction == "xprev" else process.posterior_mean(t, expected_x0, x_t)
    diffusion = Diffusion(configuration(prediction=prediction))
    model, ours_x0 = diffusion.p(float32(out), float32(x_t), torch.tensor(t), clip=clip)
    np.testing.assert_allclose(model.mean.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(ours_x0.numpy(), expected_x0, atol=1e-6 * np.abs(expected_x0).max() + 1e-4)
    unclipped = Diffusion(configuration(prediction=prediction, clip_x0=False))
    free = unclipped.p(float32(out), float32(x_t), torch.tensor(t))[1]
    assert torch.equal(free, diffusion.p(float32(out), float32(x_t), torch.tensor(t), clip=False)[1])


LOSSES = [
    *[("simple", prediction, "fixedlarge") for prediction in PREDICTIONS],
    *[("vlb", prediction, variance) for prediction in PREDICTIONS
      for variance in ("fixedlarge", "fixedsmall", "learned", "learned_range")],
    *[("hybrid", prediction, variance) for prediction in PREDICTIONS for variance in ("learned", "learned_range")],
    *[("min_snr", prediction, "fixedlarge") for prediction in ("eps", "x0", "v")],
]  # fmt: skip


@pytest.mark.parametrize(("loss", "prediction", "variance"), LOSSES)
def test_loss_values(loss: str, prediction: str, variance: str, rng: np.random.Generator) -> None:
    """For t = 0, where the bound's term is the decoder's, and three more; also a hybrid weight and a gamma."""
    t = np.array([0, 3, 400, 999])
    x0, eps, x_t = example(rng, t)
    process = oracle.Process.respaced()
    target = process.target(t, prediction, x0, x_t, eps)
    # An x_0 of t = 0 off by many of the decoder's deviations, 0.007, has masses that only float64 resolves.
    error = oracle.column(np.where((t == 0) & (prediction in ("x0", "xprev")), 0.005, 0.2))
    out = target + error * rng.standard_normal(x0.shape)
    if variance.startswith("learned"):
        out = np.concatenate([out, rng.uniform(-1, 1, x0.shape) - (5 if variance == "learned" else 0)], axis=1)
    simple = ((out[:, :3] - target) ** 2).mean((1, 2, 3))
    bound = expected_bound(process, t, prediction, variance, out, x0, x_t)
    ratio = process.alpha_bar[t] / (1 - process.alpha_bar[t])
    # Hang et al. 2023, sections 3.3 and 3.4: x_0 errors weighted by min(SNR, gamma).
    in_terms_of_x0 = {"eps": 1 / ratio, "x0": np.ones(4), "v": 1 / (ratio + 1), "xprev": np.nan}[prediction]
    expected = {
        "simple": simple,
        "vlb": bound,
        "hybrid": simple + 0.002 * 1000 * bound,
        "min_snr": simple * np.minimum(ratio, 3.0) * in_terms_of_x0,
    }[loss]
    config = configuration(loss=loss, prediction=prediction, variance=variance, hybrid_weight=0.002, min_snr_gamma=3.0)
    ours = Diffusion(config).loss_terms(float32(out), float32(x_t), torch.tensor(t), float32(eps), float32(x0))
    assert ours.shape == (4,) and ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=5e-4)


def expected_bound(
    process: oracle.Process, t: np.ndarray, prediction: str, variance: str, out: np.ndarray, x0: np.ndarray,
    x_t: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Equation 5's term at t, with x_0 predictions not clipped, in bits per dimension."""
    posterior = np.append(process.posterior_variance[1], process.posterior_variance[1:])
    large = np.append(posterior[0], process.beta[1:])
    low, high = (oracle.column(np.log(table[t])) for table in (posterior, large))
    log_var = {"fixedlarge": high, "fixedsmall": low}.get(variance)
    if log_var is None:
        fraction, log_beta = (out[:, 3:] + 1) / 2, oracle.column(np.log(process.beta[t]))
        # Nichol and Dhariwal 2021, equation 15
        log_var = out[:, 3:] if variance == "learned" else fraction * log_beta + (1 - fraction) * low
    mean = out[:, :3]
    if prediction != "xprev":
        mean = process.posterior_mean(t, process.predict_x0(t, prediction, mean, x_t), x_t)
    kl = oracle.gaussian_kl(process.posterior_mean(t, x0, x_t), low, mean, log_var)
    decoder = -np.log(np.maximum(oracle.bin_mass(x0, mean, log_var), 1e-12))
    return np.where(oracle.column(t) == 0, decoder, kl).mean((1, 2, 3)) * BITS


def test_hybrid_weighs_the_bound_by_the_chains_own_steps(rng: np.random.Generator) -> None:
    """The bound is a sum over T = 40 terms here, of which each example gives one."""
    t = np.array([0, 7, 39])
    process = oracle.Process.respaced(beta=oracle.betas("linear", 40))
    x0, eps = rng.integers(0, 256, (3, 3, 4, 4)) / 127.5 - 1, rng.standard_normal((3, 3, 4, 4))
    x_t = process.forward(t, x0, eps)
    out = np.concatenate([eps + 0.2 * rng.standard_normal(eps.shape), rng.uniform(-1, 1, eps.shape)], axis=1)
    bound = expected_bound(process, t, "eps", "learned_range", out, x0, x_t)
    config = configuration(timesteps=40, loss="hybrid", variance="learned_range", hybrid_weight=0.01)
    ours = Diffusion(config).loss_terms(float32(out), float32(x_t), torch.tensor(t), float32(eps), float32(x0))
    expected = ((out[:, :3] - eps) ** 2).mean((1, 2, 3)) + 0.01 * 40 * bound
    np.testing.assert_allclose(ours.numpy(), expected, rtol=5e-4)


class Recorder:
    """A network that keeps what it is called with and answers `scale` times x_t."""

    def __init__(self, scale: float = 0.5, dtype: torch.dtype = torch.float32, channels: int = 1) -> None:
        self.scale, self.dtype, self.channels = scale, dtype, channels
        self.x_t = self.t = self.label = self.key = None

    takes_noise_key = True

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, *, noise_key: NoiseKey) -> Tensor:
        self.x_t, self.t, self.label, self.key = x_t, t, label, noise_key
        return (self.scale * x_t).repeat(1, self.channels, 1, 1).to(self.dtype)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("loss", "prediction"), [("simple", "eps"), ("simple", "v"), ("vlb", "eps"), ("min_snr", "x0")]
)
def test_everything_is_drawn_from_the_key(loss: str, prediction: str, flip: bool, rng: np.random.Generator) -> None:
    """t, flips, eps and dropped labels, from Philox in NumPy to the loss of each image."""
    n, seed, step, images = 16, -5, 123, np.arange(40, 56)
    pixels = rng.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)
    labels = rng.integers(0, 10, n)
    words = oracle.image_words(4, images, seed, step, STREAM_EXAMPLE).astype(np.float64) / 2**32
    t = np.floor(words[:, 0] * 1000).astype(int)
    x0 = pixels / 127.5 - 1
    if flip:
        x0 = np.where(oracle.column(words[:, 1] < 0.5), x0[..., ::-1], x0)
    eps = oracle.normals((3, 4, 4), images, seed, step, STREAM_FORWARD)
    process = oracle.Process.respaced()
    x_t = process.forward(t, x0, eps)

    network, diffusion = Recorder(), Diffusion(configuration(loss=loss, prediction=prediction))
    losses, ours_t = diffusion.loss(
        network, torch.tensor(pixels), NoiseKey.of(seed, step, images.tolist()), label=torch.tensor(labels), flip=flip,
        null_label=10, label_dropout=0.4,
    )  # fmt: skip
    np.testing.assert_array_equal(ours_t.numpy(), t)
    np.testing.assert_array_equal(network.t.numpy(), t)
    np.testing.assert_array_equal(network.label.numpy(), np.where(words[:, 2] < 0.4, 10, labels))
    np.testing.assert_allclose(network.x_t.numpy(), x_t, atol=2e-6)
    if loss == "vlb":
        expected = expected_bound(process, t, prediction, "fixedlarge", 0.5 * x_t, x0, x_t)
    else:
        expected = ((0.5 * x_t - process.target(t, prediction, x0, x_t, eps)) ** 2).mean((1, 2, 3))
        if loss == "min_snr":
            expected *= np.minimum(process.alpha_bar[t] / (1 - process.alpha_bar[t]), 5)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-4)


def test_floats_and_bytes_give_the_same_loss(rng: np.random.Generator) -> None:
    pixels = torch.tensor(rng.integers(0, 256, (4, 3, 4, 4), dtype=np.uint8))
    key, diffusion = NoiseKey.of(1, 2, range(4)), Diffusion()
    from_bytes, _ = diffusion.loss(Recorder(), pixels, key, flip=True)
    from_floats, _ = diffusion.loss(Recorder(), pixels / 127.5 - 1, key, flip=True)
    assert torch.equal(from_bytes, from_floats)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_hybrids_bound_gives_the_mean_no_gradient(variance: str, rng: np.random.Generator) -> None:
    """The mean half's gradient is that of the simple loss, 2 (out - eps) / D; the variance half's is the bound's."""
    t = np.array([0, 200, 999])
    x0, eps, x_t = (float32(x) for x in example(rng, t))
    raw = torch.randn_like(x0) - (5 if variance == "learned" else 0)
    out = torch.cat([eps + 0.1 * torch.randn_like(eps), raw], dim=1)

    def gradient(loss: str) -> Tensor:
        leaf = out.clone().requires_grad_()
        diffusion = Diffusion(configuration(loss=loss, variance=variance))
        return torch.autograd.grad(diffusion.loss_terms(leaf, x_t, torch.tensor(t), eps, x0).sum(), leaf)[0]

    hybrid, bound = gradient("hybrid"), gradient("vlb")
    torch.testing.assert_close(hybrid[:, :3], 2 * (out[:, :3] - eps) / x0[0].numel(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(hybrid[:, 3:], bound[:, 3:], rtol=1e-5, atol=1e-8)  # weight 1e-3 times T = 1000
    assert bound[:, :3].abs().max() > 0 and hybrid[:, 3:].abs().max() > 0


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid"])
def test_bfloat16_output_is_reduced_in_float32(loss: str, rng: np.random.Generator) -> None:
    variance = "fixedlarge" if loss == "simple" else "learned_range"
    pixels = torch.tensor(rng.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8))
    diffusion, key = Diffusion(configuration(loss=loss, variance=variance)), NoiseKey.of(1, 2, range(6))
    network = Recorder(0.3, torch.bfloat16, channels=1 if loss == "simple" else 2)
    losses, t = diffusion.loss(network, pixels, key)
    assert losses.dtype == torch.float32 and network.x_t.dtype == torch.float32
    rounded = (0.3 * network.x_t).to(torch.bfloat16).float().repeat(1, network.channels, 1, 1)
    x0 = pixels / 127.5 - 1
    eps = float32(oracle.normals((3, 4, 4), np.arange(6), 1, 2, STREAM_FORWARD))
    torch.testing.assert_close(losses, diffusion.loss_terms(rounded, network.x_t, t, eps, x0), rtol=1e-4, atol=1e-5)


def test_a_bfloat16_network_still_gets_noise_at_small_t() -> None:
    """alpha_bar rounds to 1 in bfloat16 for t = 0..9, which would add no noise there at all."""
    process = oracle.Process.respaced()
    assert (torch.tensor(process.alpha_bar[:10]).bfloat16() == 1).all()
    n = 4000
    network = Recorder(dtype=torch.bfloat16)
    images = torch.full((n, 1, 4, 4), 200, dtype=torch.uint8)
    _, t = Diffusion().loss(network, images, NoiseKey.of(3, 4, torch.arange(n)))
    t = t.numpy()
    assert set(t[t < 10]) == set(range(10))
    noise = network.x_t.double().numpy() - oracle.column(np.sqrt(process.alpha_bar[t])) * (200 / 127.5 - 1)
    for step in range(10):
        expected = np.sqrt(1 - process.alpha_bar[step])
        deviation = noise[t == step].std()
        assert abs(deviation / expected - 1) < 5 / np.sqrt(2 * noise[t == step].size), step


def tiny_unet(dropout: float) -> UNet:
    config = UNetConfig(
        image_size=4, image_channels=1, width=8, multipliers=(1,), blocks=1, attention_resolutions=(), dropout=dropout,
        groups=4, num_classes=3, label_dropout=0.5,
    )  # fmt: skip
    unet = UNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def test_a_split_batch_has_the_losses_of_the_whole(rng: np.random.Generator) -> None:
    """Micro-batches of one key: the same t, flip, eps, dropped labels and dropout masks for every image."""
    unet, diffusion = tiny_unet(dropout=0.3).train(), Diffusion()
    pixels = torch.tensor(rng.integers(0, 256, (8, 1, 4, 4), dtype=np.uint8))
    label, key = torch.arange(8) % 3, NoiseKey.of(7, 8, range(100, 108))

    def losses(start: int, end: int) -> Tensor:
        return diffusion.loss(
            unet, pixels[start:end], key.part(start, end), label=label[start:end], flip=True,
            null_label=unet.null_label, label_dropout=0.5,
        )[0]  # fmt: skip

    whole = losses(0, 8)
    for sizes in ([4, 4], [1, 2, 5], [1] * 8):
        ends = np.cumsum(sizes)
        parts = torch.cat([losses(end - size, end) for size, end in zip(sizes, ends, strict=True)])
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    without_dropout = diffusion.loss(unet.eval(), pixels, key, label=label, flip=True)[0]
    assert (without_dropout - whole).abs().max() > 1e-4


def test_q_sample_without_a_key_follows_torchs_generator() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Diffusion().q_sample(torch.zeros(2, 1, 4, 4), torch.tensor([5, 6]))[1]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
