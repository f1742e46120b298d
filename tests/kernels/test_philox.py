"""Philox4x32-10: known answers, eager equal to NumPy bit for bit, and the quality of what is drawn."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import oracle

from fastddpm.kernels import philox as philox_package
from fastddpm.kernels.philox import eager, reference

# (counter, key, output), low word first: philox4x32 with 10 rounds in Random123's kat_vectors.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# Both signs, both words in use, the top bit, and the extremes of int64.
SEEDS = [0, 1, -1, 12345, 2**32 - 1, 2**32, 2**62 + 987654321, -(2**62) - 5, 2**63 - 1, -(2**63)]


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(key: list[int]) -> int:
    """A 64-bit key, low word first, as the int64 that has its bits."""
    value = key[0] + (key[1] << 32)
    return value - 2**64 if value >= 2**63 else value


def int64(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, output: str) -> None:
    words, seed = hexadecimal(counter), signed(hexadecimal(key))
    from_oracle = oracle.philox(tuple(words), seed)
    from_reference = reference.philox(*(np.array(word) for word in words), seed)
    from_eager = eager.philox(*(int64(word) for word in words), int64(seed))
    assert [int(word) for word in from_oracle] == hexadecimal(output)
    assert [int(word) for word in from_reference] == hexadecimal(output)
    assert [int(word) for word in from_eager] == hexadecimal(output)


@pytest.mark.parametrize("seed", SEEDS)
def test_eager_equals_numpy(rng: np.random.Generator, seed: int) -> None:
    counter = rng.integers(0, 2**32, (4, 1000), dtype=np.uint64)
    counter[:, :2] = [[0, 2**32 - 1]] * 4
    expected = oracle.philox(tuple(counter), seed)
    words = eager.philox(*(int64(c.astype(np.int64)) for c in counter), int64(seed))
    np.testing.assert_array_equal(torch.stack(words, -1).numpy(), expected.astype(np.int64))
    np.testing.assert_array_equal(np.stack(reference.philox(*counter, seed), -1), expected)


def test_counter_words_count_by_their_low_32_bits() -> None:
    large = eager.philox(int64(2**32 + 7), int64(-1), int64(2**40), int64(3), int64(0))
    expected = oracle.philox((7, 2**32 - 1, 0, 3), 0)
    assert [int(word) for word in large] == expected.tolist()


def test_per_image_words_name_their_counter() -> None:
    """Word w of block b of an image is word w of counter (b, image, step, stream)."""
    images, steps, seeds = [5, 2**32 - 1, 0], [7, 8, 2**31], [3, -4, 2**40]
    words = eager.per_image_words(6, int64(images), int64(seeds), int64(steps), stream=9)
    for n, (image, step, seed) in enumerate(zip(images, steps, seeds, strict=True)):
        expected = oracle.image_words(24, np.array([image]), seed, step, 9)[0]
        np.testing.assert_array_equal(torch.stack(words, -1)[n].flatten().numpy(), expected)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 7, 48])
def test_normals_are_box_muller_of_the_words(num: int) -> None:
    images, seed, step = np.array([0, 3, 2**32 - 1]), -(2**45), 999
    drawn = eager.normals(num, int64(images), int64(seed), int64(step), 2)
    assert drawn.dtype == torch.float32 and drawn.shape == (3, num)
    expected = oracle.normals((num,), images, seed, step, 2)
    # Rounded once from float64: half a unit in the last place.
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=2**-24, atol=1e-15)
    words = oracle.image_words(4 * ((num + 3) // 4), images, seed, step, 2).reshape(3, -1, 4)
    specification = reference.normals(tuple(np.moveaxis(words, -1, 0))).reshape(3, -1)[:, :num]
    np.testing.assert_allclose(specification, expected, rtol=1e-15, atol=1e-15)


def test_normals_of_the_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words 0 and 2^32 - 1: the radius's logarithm stays finite, at most 6.764, and never turns positive."""
    words = np.array([[0, 0, 2**32 - 1, 2**32 - 1], [1, 2**30, 2**10, 2**31]])
    monkeypatch.setattr(eager, "per_image_words", lambda *_: tuple(int64(word)[:, None] for word in words.T))
    z = eager.normals(4, int64([0, 1]), int64(0), int64(0), 0).double().numpy()
    u, v = words[:, ::2] / 2**32 + 2.0**-33, 2 * np.pi * words[:, 1::2] / 2**32
    expected = np.sqrt(-2 * np.log(u))[..., None] * np.stack([np.cos(v), np.sin(v)], axis=-1)
    np.testing.assert_allclose(z, expected.reshape(2, 4), rtol=2**-23, atol=1e-14)
    assert abs(z[0, 0] - 6.764) < 1e-3 and 0 < np.hypot(z[0, 2], z[0, 3]) < 2e-5


def test_normals_have_the_moments_and_distribution_of_a_normal() -> None:
    num = 1_000_000
    z = eager.normals(1000, torch.arange(1000), int64(2024), int64(0), 0).double().numpy().ravel()
    # Within five standard errors of 0, 1, 0 and 3: those of N samples are sqrt of 1, 2, 15 and 96 over N.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 5 * np.sqrt(variance / num), f"moment {power}"
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-4
    assert 4.4 < np.abs(z).max() <= 6.77  # the largest of 1e6 normals; the bound of a 32-bit radius


def test_normals_are_uncorrelated_along_every_counter_word() -> None:
    """Neighbouring elements, images, steps and streams: correlations of 1e5 samples, within five errors."""
    images = torch.arange(1000)

    def draw(images: torch.Tensor = images, step: int = 0, stream: int = 0, seed: int = 0) -> np.ndarray:
        return eager.normals(101, images, int64(seed), int64(step), stream).double().numpy()

    base = draw()
    others = {
        "element": base[:, 1:],
        "image": draw(images + 1)[:, :-1],
        "step": draw(step=1)[:, :-1],
        "stream": draw(stream=1)[:, :-1],
        "seed": draw(seed=1)[:, :-1],
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base[:, :-1].ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(1e5), name


def test_no_block_is_drawn_twice() -> None:
    """Philox is a bijection of its counter, so distinct (block, image, step, stream) give distinct blocks."""
    blocks = []
    for step, stream in itertools.product([0, 1, 2, 998, 999], [0, 1, 2, 3, 4, 8, 8 + 256, 8 + 512]):
        words = eager.per_image_words(12, torch.arange(64), int64(77), int64(step), stream)
        blocks.append(torch.stack(words, -1).reshape(-1, 4))
    blocks = torch.cat(blocks).numpy()
    assert len(np.unique(blocks, axis=0)) == len(blocks) == 40 * 64 * 12


def test_streams_do_not_overlap() -> None:
    """Dropout's layers sit above the low byte, so no layer's stream is another purpose's."""
    purposes = [value for name, value in vars(philox_package).items() if name.startswith("STREAM_")]
    dropout = [philox_package.STREAM_DROPOUT + 256 * layer for layer in range(1, 1000)]
    assert len(set(purposes) | set(dropout)) == len(purposes) + len(dropout)
    assert max(purposes) < 256


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = int64([4, 9, 11, 2**31])
    together = eager.normals(50, images, int64(5), int64(6), 1)
    apart = torch.cat([eager.normals(50, image[None], int64(5), int64(6), 1) for image in images])
    assert torch.equal(together, apart)
    assert torch.equal(eager.normals(50, images.flip(0), int64(5), int64(6), 1), together.flip(0))
    assert torch.equal(eager.normals(9, images, int64(5), int64(6), 1), together[:, :9])


def test_draws_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    eager.normals(50, torch.arange(3), int64(5), int64(6), 1)
    assert torch.equal(torch.get_rng_state(), before)
