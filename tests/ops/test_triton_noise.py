"""The Triton kernels that draw noise: its bits, and what they do without asking the host."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import contract
from helpers.marks import slow
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.kernels import native
from fastddpm.kernels.philox import STREAM_FORWARD, reference
from fastddpm.kernels.random_normal import cpu as compiled
from fastddpm.kernels.reverse_step import COLUMNS
from fastddpm.ops import q_sample, random_normal, registry, reverse_step

IMAGES = [0, 1, 12345, 2**31, 2**32 - 1]
KEYS = [(0, 0), (-1, 999), (2**63 - 1, 2**31 - 1), (-(2**63), 800_000), (0x0123456789ABCDEF, 5)]


@pytest.fixture(autouse=True)
def only_triton(implementation: str) -> None:
    if implementation != "triton":
        pytest.skip("the Triton kernels alone")


@pytest.mark.parametrize(("seed", "step"), KEYS)
def test_integers_are_those_of_numpy(seed: int, step: int, device: torch.device) -> None:
    from fastddpm.kernels.random_normal.triton import philox_words

    stream = 8 + 256 * 31
    ours = philox_words(300, **contract.key_tensors(IMAGES, seed, step, device), stream=stream)
    block, image = np.arange(300)[None, :], np.array(IMAGES)[:, None]
    expected = np.stack(reference.philox(block, image, np.array(step), np.array(stream), seed), axis=-1)
    np.testing.assert_array_equal(ours.cpu().numpy().view(np.uint32), expected)


@pytest.mark.skipif(native.unavailable() is not None, reason="compares with the compiled library, which is not here")
@pytest.mark.parametrize(("seed", "step"), [*KEYS[:2], *(slow(*key) for key in KEYS[2:])])
def test_normals_are_those_of_the_compiled_library(seed: int, step: int, device: torch.device) -> None:
    """Bit for bit, over 2e4 of them."""
    ours = random_normal((3, 37, 37), **contract.key_tensors(IMAGES, seed, step, device), stream=1)
    key = contract.key_tensors(IMAGES, seed, step, torch.device("cpu"))
    cpu = registry.call(compiled, "random_normal", ([3, 37, 37], *key.values(), 1))
    assert torch.equal(ours.cpu(), cpu)


def test_a_timestep_outside_the_table_gives_nan(device: torch.device) -> None:
    key = contract.key_tensors([0, 1, 2], 1, 2, device)
    table = torch.rand(10, 2, device=device)
    t = torch.tensor([-1, 10, 9], device=device)
    x_t, eps = q_sample(torch.zeros(3, 1, 4, 4, device=device), t, table, **key)
    assert x_t[:2].isnan().all() and x_t[2].isfinite().all()
    assert torch.equal(eps, random_normal((1, 4, 4), **key, stream=STREAM_FORWARD))


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_the_table_gives_nan(index: int, device: torch.device) -> None:
    assert one_step(index, device).isnan().all() and one_step(9, device).isfinite().all()


def one_step(index: int, device: torch.device) -> Tensor:
    key = contract.key_tensors([0, 1], 1, index, device)
    x = torch.ones(2, 1, 4, 4, device=device)
    table, timesteps = torch.rand(10, COLUMNS, device=device), torch.arange(10, device=device)
    table[:, -1] = 0  # there is no step before
    return reverse_step(x, x.clone(), table, timesteps, key["step"], key["images"], key["seed"])


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_noise_that_is_not_used_may_be_anything(clip: float, device: torch.device) -> None:
    """On the last step, where sigma is 0, the result is the mean: NaN times 0 does not come in."""
    key = contract.key_tensors([0], 1, 0, device)
    row = torch.tensor([[1.5, -0.5, 0.25, 0.5, 0.125, 0.0, 0.0, 0.0, 0.0]], device=device)
    x, out = torch.full((1, 1, 2, 2), 2.0, device=device), torch.full((1, 1, 2, 2), 0.5, device=device)
    noise = torch.full_like(x, torch.nan)
    zero = torch.tensor([0], device=device)
    reverse_step(x, out, row, zero, key["step"], key["images"], key["seed"], clip=clip, noise=noise)
    x0 = 1.5 * 2 - 0.5 * 0.5
    expected = 0.25 * (min(x0, clip) if clip else x0) + 0.5 * 2 + 0.125 * 0.5
    assert (x == expected).all()


class _Reads(TorchDispatchMode):
    """Notes what brings a value of a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_by_the_host(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Not even inside the kernels' launchers: a captured graph must find step, index and seed where they lie."""
    from fastddpm.kernels.q_sample import triton as q_sample_triton
    from fastddpm.kernels.random_normal import triton as random_normal_triton
    from fastddpm.kernels.reverse_step import triton as reverse_step_triton

    launched = []
    for module in (q_sample_triton, random_normal_triton, reverse_step_triton):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **options: launched.append(kernel))
    key = contract.key_tensors([0, 1], 1, 2, device)
    images, seed, step = key.values()
    x, table = torch.zeros(2, 1, 4, 4, device=device), torch.rand(10, COLUMNS, device=device)
    t, timesteps = torch.arange(2, device=device), torch.arange(10, device=device)
    with _Reads() as reads:
        registry.call(random_normal_triton, "random_normal", ([1, 4, 4], images, seed, step, 0))
        registry.call(q_sample_triton, "q_sample", (x, t, table[:, :2], None, None, images, seed, step))
        arguments = (x, x, table, timesteps, step, images, seed, 1.0, 0, None, None)
        registry.call(reverse_step_triton, "reverse_step", arguments)
    assert len(launched) == 3 and reads.names == []
