"""What a training step draws besides its noise, and image seeds."""

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import oracle

from fastddpm.diffusion import draw_examples
from fastddpm.errors import UsageError
from fastddpm.ops.noise import NoiseKey
from fastddpm.sampling.seeds import image_seeds

STREAM_EXAMPLE = 3


def test_draws_are_words_of_the_example_stream() -> None:
    """t from word 0, flip from word 1, drop_label from word 2 of the image's counter."""
    images, seed, step = np.array([0, 1, 17, 2**32 - 1, 5]), -(2**50) + 3, 1234
    draws = draw_examples(NoiseKey.of(seed, step, images.tolist()), timesteps=1000, label_dropout=0.25)
    words = oracle.image_words(4, images, seed, step, STREAM_EXAMPLE).astype(np.float64) / 2**32
    np.testing.assert_array_equal(draws.t.numpy(), np.floor(words[:, 0] * 1000))
    np.testing.assert_array_equal(draws.flip.numpy(), words[:, 1] < 0.5)
    np.testing.assert_array_equal(draws.drop_label.numpy(), words[:, 2] < 0.25)
    assert draws.t.dtype == torch.int64 and draws.flip.dtype == draws.drop_label.dtype == torch.bool


def test_draws_have_their_distributions_and_are_independent() -> None:
    num, timesteps = 200_000, 50
    draws = draw_examples(NoiseKey.of(3, 4, torch.arange(num)), timesteps, label_dropout=0.1)
    counts = torch.bincount(draws.t, minlength=timesteps).numpy()
    assert len(counts) == timesteps
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    for name, chosen, p in (("flip", draws.flip, 0.5), ("drop_label", draws.drop_label, 0.1)):
        assert abs(chosen.float().mean().item() - p) < 5 * np.sqrt(p * (1 - p) / num), name
    columns = torch.stack([draws.t.double(), draws.flip.double(), draws.drop_label.double()]).numpy()
    correlation = np.corrcoef(columns) - np.eye(3)
    assert np.abs(correlation).max() < 5 / np.sqrt(num)


def test_draws_differ_by_step_and_seed() -> None:
    images = torch.arange(10_000)
    base = draw_examples(NoiseKey.of(0, 0, images), 1000).t.double().numpy()
    for other in (NoiseKey.of(0, 1, images), NoiseKey.of(1, 0, images)):
        correlation = np.corrcoef(base, draw_examples(other, 1000).t.double().numpy())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(10_000)


@pytest.mark.parametrize("timesteps", [2, 3, 1000, 100_000])
def test_t_stays_in_range_and_reaches_both_ends(timesteps: int) -> None:
    """The largest word, 2^32 - 1, must not give T."""
    t = draw_examples(NoiseKey.of(0, 0, torch.arange(2_000_000 if timesteps == 100_000 else 50_000)), timesteps).t
    assert t.min() == 0 and t.max() == timesteps - 1


def test_no_label_is_dropped_without_label_dropout() -> None:
    assert not draw_examples(NoiseKey.of(0, 0, torch.arange(100_000)), 1000).drop_label.any()


def test_a_part_of_a_key_draws_what_the_whole_does() -> None:
    key = NoiseKey.of(8, 9, [3, 1, 4, 1, 5, 9, 2, 6])
    whole = draw_examples(key, 1000, 0.5)
    parts = [draw_examples(key.part(start, end), 1000, 0.5) for start, end in ((0, 3), (3, 4), (4, 8))]
    for name in ("t", "flip", "drop_label"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_of_takes_plain_numbers() -> None:
    key = NoiseKey.of(-7, 2**40, [1, 2])
    assert (key.seed.item(), key.step.item(), key.images.tolist()) == (-7, 2**40, [1, 2])
    assert key.seed.shape == key.step.shape == ()
    assert {key.seed.dtype, key.step.dtype, key.images.dtype} == {torch.int64}


def test_draw_follows_torchs_generator() -> None:
    def seed_after(manual_seed: int) -> int:
        torch.manual_seed(manual_seed)
        key = NoiseKey.draw(3, torch.device("cpu"))
        assert key.images.tolist() == [0, 1, 2] and key.step.item() == 0
        return int(key.seed.item())

    assert seed_after(1) == seed_after(1)
    assert seed_after(1) != seed_after(2)


def test_image_seeds_are_counter_words() -> None:
    assert image_seeds(range(3)) == [0, 1, 2]
    assert image_seeds(np.array([2**32 - 1, 0])) == [2**32 - 1, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "at least one seed is needed"),
        ([1, -1], r"image seeds must be in 0\.\.4294967295; got -1"),
        ([2**32], r"image seeds must be in 0\.\.4294967295; got 4294967296"),
    ],
)
def test_image_seeds_refuse(seeds: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        image_seeds(seeds)
