"""random_normal: the normals of a counter, and nothing else."""

import numpy as np
import pytest
import torch
from helpers import contract, oracle
from helpers.marks import with_large

from fastddpm.ops import random_normal


# One element; a count that is no multiple of a Philox block's 4; CIFAR's; a single dimension; many.
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (3, 32, 32), (10,), (2, 1, 3, 2)])
@pytest.mark.parametrize("seed", with_large([0, -3, 2**63 - 1], 0))
def test_numbers(shape: tuple[int, ...], seed: int, device: torch.device) -> None:
    images, step, stream = [0, 7, 2**32 - 1], 999, 2
    z = random_normal(shape, **contract.key_tensors(images, seed, step, device), stream=stream)
    assert z.dtype == torch.float32 and z.shape == (3, *shape) and z.is_contiguous() and z.device.type == device.type
    np.testing.assert_allclose(
        contract.float64(z), oracle.normals(shape, np.array(images), seed, step, stream), rtol=2e-6, atol=1e-6
    )


def test_dropout_streams_are_words_above_the_low_byte(device: torch.device) -> None:
    """A stream beyond 255 is not cut."""
    z = random_normal((4,), **contract.key_tensors([1], 2, 3, device), stream=8 + 256 * 31)
    np.testing.assert_allclose(contract.float64(z), oracle.normals((4,), np.array([1]), 2, 3, 8 + 256 * 31), atol=1e-6)


def test_an_image_does_not_depend_on_its_batch(device: torch.device) -> None:
    images = [12, 5, 99, 3]
    together = random_normal((3, 4, 4), **contract.key_tensors(images, 1, 2, device), stream=0)
    apart = [random_normal((3, 4, 4), **contract.key_tensors([i], 1, 2, device), stream=0) for i in images]
    assert torch.equal(together, torch.cat(apart))


def test_empty_batch(device: torch.device) -> None:
    assert random_normal((3, 4, 4), **contract.key_tensors([], 1, 2, device), stream=0).shape == (0, 3, 4, 4)


def test_opcheck(device: torch.device) -> None:
    key = contract.key_tensors([1, 2], -3, 4, device)
    contract.opcheck(torch.ops.fastddpm.random_normal, ([3, 4, 4], key["images"], key["seed"], key["step"], 1))


@pytest.mark.large
def test_compiles_with_a_dynamic_batch(device: torch.device) -> None:
    def arguments(n: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        key = contract.key_tensors(range(n), 5, 6, device)
        return [key["images"]], [key["seed"], key["step"]]

    def function(images: torch.Tensor, seed: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return random_normal((3, 4, 4), images, seed, step, 1) * 2

    contract.assert_compiles_for_any_batch(function, arguments, [2, 3, 7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3)}, r"random_normal: images must be int64 \(N,\); got torch.float32 \(3,\)"),
        ({"images": torch.tensor(0)}, r"images must be int64 \(N,\); got torch.int64 \(\)"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed must be a 0-d int64 tensor; got torch.int64 \(1,\)"),
        ({"step": torch.tensor(1.0)}, r"step must be a 0-d int64 tensor; got torch.float32 \(\)"),
    ],
)
def test_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = contract.key_tensors([0, 1, 2], 0, 0, torch.device("cpu")) | change
    with pytest.raises(ValueError, match=message):
        random_normal((2,), **arguments, stream=0)
