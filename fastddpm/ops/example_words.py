"""example_words: the random words of training examples, which torch.compile must not compute itself.

Inductor's code for a CPU computes Philox wrongly where it is vectorized over images (torch 2.13.0, AVX-512): it gives
other words, without an error. As an operator, the computation is left as it is.
"""

import torch
from torch import Tensor

from fastddpm.kernels.philox.eager import per_image_words


def example_words(images: Tensor, seed: Tensor, step: Tensor, stream: int) -> tuple[Tensor, ...]:
    """Return the four Philox words of block 0 of each image, int64 (N,) each.

    `images`: int64 (N,). `seed`, `step`: 0-d int64. The bits are the same with and without torch.compile.
    """
    if torch.compiler.is_compiling():
        together: Tensor = torch.ops.fastddpm.example_words(images, seed, step, stream)
        return together.unbind()
    return _words(images, seed, step, stream)


def _words(images: Tensor, seed: Tensor, step: Tensor, stream: int) -> tuple[Tensor, ...]:
    return tuple(word[:, 0] for word in per_image_words(1, images, seed, step, stream))


@torch.library.custom_op("fastddpm::example_words", mutates_args=())
def _operator(images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    return torch.stack(_words(images, seed, step, stream))


@_operator.register_fake
def _(images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    return images.new_empty((4, images.shape[0]))
