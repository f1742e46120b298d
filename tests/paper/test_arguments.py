"""Arguments that cannot be meant: one message, which says what came and what is expected."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.networks import TINY, tiny

from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.ops.noise import NoiseKey
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet import UNet

LABELLED = tiny(num_classes=4, label_dropout=0.1)
UNLIKELY: dict[str, tuple[dict[str, Any], str]] = {
    "t below 0": ({"t": torch.tensor([-1, 3])}, r"t must be in 0\.\.99999; got -1"),
    "t beyond any process": ({"t": torch.tensor([3, 10**6])}, r"t must be in 0\.\.99999; got 1000000"),
    "one t below 0": ({"t": -1}, r"t must be in 0\.\.99999; got -1"),
    "float t": ({"t": torch.tensor([0.5, 3.0])}, r"t must be integer \(2,\); got torch.float32"),
    "label too large": ({"label": torch.tensor([0, 99])}, r"label must be in 0\.\.4; got 99"),
    "label below 0": ({"label": torch.tensor([-1, 0])}, r"label must be in 0\.\.4; got -1"),
    "float label": ({"label": torch.tensor([0.0, 1.0])}, r"label must be integer \(2,\); got torch.float32"),
    "integer x": ({"dtype": torch.int32}, "x_t must be floating; got torch.int32"),
    "complex x": ({"dtype": torch.complex64}, "x_t must be floating; got torch.complex64"),
}


@pytest.mark.parametrize("name", UNLIKELY)
def test_the_network_says_what_it_takes(name: str) -> None:
    change, message = UNLIKELY[name]
    config = LABELLED
    x = torch.zeros(2, config.image_channels, config.image_size, config.image_size, dtype=change.pop("dtype", None))
    given = {"t": torch.tensor([1, 2]), "label": torch.tensor([0, 4])} | change
    with pytest.raises(ValueError, match=f"UNet: {message}"):
        UNet(config)(x, **given)


def test_one_timestep_for_all_images() -> None:
    network = UNet(TINY).eval()
    x = torch.randn(3, TINY.image_channels, TINY.image_size, TINY.image_size)
    assert torch.equal(network(x, 7), network(x, torch.full((3,), 7)))


def test_ranges_are_not_looked_at_where_there_are_no_values() -> None:
    network = UNet(TINY).eval()
    x = torch.randn(2, 3, TINY.image_channels, TINY.image_size, TINY.image_size)
    t = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        mapped = torch.vmap(network)(x, t)
        torch.testing.assert_close(mapped, torch.stack([network(*both) for both in zip(x, t, strict=True)]))


SAMPLERS: dict[str, tuple[Callable[[UNet, Diffusion], object], str]] = {
    "float seed of the sampler": (lambda u, d: Sampler(u, d, 2, seed=1.5), "seed must be an integer; got 1.5"),  # type: ignore[arg-type]
    "float seed": (lambda u, d: Sampler(u, d, 2).sample([1.5]), "an image's seed must be an integer; got 1.5"),  # type: ignore[list-item]
    "one number": (lambda u, d: Sampler(u, d, 2).sample(4), "seeds must be a sequence, such as range"),  # type: ignore[arg-type]
    "float timesteps": (lambda u, d: Sampler(u, d, timesteps=[5.7, 2.2]), "timesteps must be integers"),  # type: ignore[list-item]
    "float steps": (lambda u, d: Sampler(u, d, steps=2.5), "steps must be an integer; got 2.5"),  # type: ignore[arg-type]
    "label 99": (lambda u, d: Sampler(u, d, 2).sample([1], [99]), r"labels must be in 0\.\.3; got 99"),
    "float label": (lambda u, d: Sampler(u, d, 2).sample([1], [1.5]), "a label must be an integer; got 1.5"),  # type: ignore[list-item]
    "text as guidance": (lambda u, d: Sampler(u, d, 2, guidance="2"), "guidance must be a number; got '2'"),  # type: ignore[arg-type]
    "text as eta": (lambda u, d: Sampler(u, d, 2, "ddim", "1"), "eta must be a number; got '1'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_says_what_it_takes(name: str) -> None:
    call, message = SAMPLERS[name]
    with pytest.raises(UsageError, match=message):
        call(UNet(LABELLED).eval(), Diffusion())


def test_numpy_integers_are_integers() -> None:
    network = UNet(LABELLED).eval()
    ours = Sampler(network, Diffusion(), np.int64(2), guidance=np.float32(2), seed=np.int64(3))
    expected = Sampler(network, Diffusion(), 2, guidance=2.0, seed=3).sample([5, 6], [0, 1])
    assert torch.equal(ours.sample(np.array([5, 6]), np.array([0, 1])), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_levels_given_as_floats_are_refused(prediction: Any) -> None:
    """Levels of 0..255 would be trained on as if they were in [-1, 1], and every picture would come out wrong."""
    from fastddpm.config import DiffusionConfig

    diffusion, key = Diffusion(DiffusionConfig(prediction=prediction)), NoiseKey.draw(2, torch.device("cpu"))
    network = UNet(TINY).eval()
    levels = torch.randint(0, 256, (2, TINY.image_channels, TINY.image_size, TINY.image_size), dtype=torch.uint8)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"got torch.float32 of up to 25[0-9.]+: divide levels of 0\.\.255 by 127\.5"
        ):
            diffusion.loss(network, levels.float(), key)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"got torch\.float32 with NaN or infinity"):
            diffusion.loss(network, (levels.float() / 127.5 - 1).index_fill(0, torch.tensor([1]), wrong), key)
    with torch.no_grad():
        from_levels, _ = diffusion.loss(network, levels, key)
        from_floats, _ = diffusion.loss(network, levels.float() / 127.5 - 1, key)
    torch.testing.assert_close(from_levels, from_floats)
