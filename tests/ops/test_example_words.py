"""The random words of training examples: the bits of Philox's reference, also under torch.compile."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm.diffusion import draw_examples
from fastddpm.kernels.philox import STREAM_EXAMPLE
from fastddpm.kernels.philox.reference import philox
from fastddpm.ops.example_words import example_words
from fastddpm.ops.noise import NoiseKey


def test_numbers() -> None:
    images = torch.tensor([0, 1, 7, 2**31 + 3])
    ours = example_words(images, torch.tensor(2**40 + 5), torch.tensor(9), STREAM_EXAMPLE)
    expected = philox(np.zeros(1), images.numpy(), np.full(1, 9), np.full(1, STREAM_EXAMPLE), 2**40 + 5)
    assert all(word.dtype == torch.int64 for word in ours)
    np.testing.assert_array_equal(torch.stack(ours).numpy(), np.stack(expected).reshape(4, -1).astype(np.int64))


@pytest.mark.parametrize("images", [1, 8, 37])
def test_compiled_code_draws_the_same_examples(images: int) -> None:
    """With Inductor, whose own code for this is wrong where it is vectorized over images."""
    key = NoiseKey.of(5, 3, list(range(images)))

    def draw(key: NoiseKey) -> tuple[Tensor, ...]:
        drawn = draw_examples(key, 1000, 0.3)
        return drawn.t, drawn.flip, drawn.drop_label

    torch._dynamo.reset()
    ours = torch.compile(draw, fullgraph=True)(key)
    assert all(torch.equal(a, b) for a, b in zip(ours, draw(key), strict=True))
