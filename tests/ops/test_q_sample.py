"""q_sample: equation 4 from uint8 or floats, with its own noise or a given one."""

import numpy as np
import pytest
import torch
from helpers import contract, oracle
from helpers.marks import with_large

from fastddpm.ops import q_sample, random_normal

STREAM_FORWARD = 2


def table(device: torch.device, timesteps: int = 1000) -> torch.Tensor:
    bar = np.cumprod(1 - oracle.betas("linear", timesteps))
    return torch.tensor(np.stack([np.sqrt(bar), np.sqrt(1 - bar)], 1), dtype=torch.float32, device=device)


def all_bytes(n: int, device: torch.device) -> torch.Tensor:
    """n images (1, 16, 16) that hold every byte value."""
    return torch.arange(256, dtype=torch.uint8, device=device).reshape(1, 1, 16, 16).repeat(n, 1, 1, 1)


# CIFAR; non-square with an odd count of elements; one pixel; batch 1.
SHAPES = [(4, 3, 32, 32), (3, 1, 3, 5), (2, 1, 1, 1), (1, 3, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype", with_large([torch.uint8, torch.float32, torch.float64, torch.bfloat16], torch.float64)
)
def test_numbers(shape: tuple[int, ...], dtype: torch.dtype, rng: np.random.Generator, device: torch.device) -> None:
    n, seed, step = shape[0], -(2**40) - 1, 31
    raw = rng.integers(0, 256, shape, dtype=np.uint8)
    x0 = torch.tensor(raw, device=device)
    if dtype != torch.uint8:
        x0 = (x0.double() / 127.5 - 1).to(dtype)
    scaled = raw / 127.5 - 1 if dtype == torch.uint8 else contract.float64(x0)
    t = np.array([0, 999, 500, 9])[:n]
    flip = np.array([True, False, False, True])[:n]
    images = np.array([3, 2**32 - 1, 0, 8])[:n]

    x_t, eps = q_sample(
        x0, torch.tensor(t, device=device), table(device), **contract.key_tensors(images.tolist(), seed, step, device),
        flip=torch.tensor(flip, device=device),
    )  # fmt: skip
    scaled = np.where(oracle.column(flip), scaled[..., ::-1], scaled)
    expected_eps = oracle.normals(shape[1:], images, seed, step, STREAM_FORWARD)
    assert x_t.dtype == eps.dtype == torch.float32 and x_t.shape == eps.shape == shape
    np.testing.assert_allclose(contract.float64(eps), expected_eps, rtol=2e-6, atol=1e-6)
    expected = oracle.Process.respaced().forward(t, scaled, expected_eps)
    np.testing.assert_allclose(contract.float64(x_t), expected, rtol=0, atol=2e-6)


def test_bytes_are_scaled_exactly(device: torch.device) -> None:
    """v / 127.5 - 1 in float32 for each of the 256 values: -1 and 1 at the ends, to the last bit between."""
    identity = torch.tensor([[1.0, 0.0]], device=device)
    x_t, _ = q_sample(
        all_bytes(1, device), torch.zeros(1, dtype=torch.int64, device=device), identity,
        **contract.key_tensors([0], 0, 0, device),
    )  # fmt: skip
    value = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(x_t.cpu().numpy().ravel(), value / np.float32(127.5) - np.float32(1))
    assert x_t.min() == -1 and x_t.max() == 1


def test_given_noise_is_used_and_returned(rng: np.random.Generator, device: torch.device) -> None:
    x0, noise = rng.uniform(-1, 1, (2, 3, 4, 4)), rng.standard_normal((2, 3, 4, 4))
    given = torch.tensor(noise, dtype=torch.float32, device=device)
    t = np.array([10, 700])
    x_t, eps = q_sample(
        torch.tensor(x0, device=device), torch.tensor(t, device=device), table(device),
        **contract.key_tensors([0, 1], 0, 0, device), noise=given,
    )  # fmt: skip
    assert torch.equal(eps, given) and eps.data_ptr() != given.data_ptr()
    expected = oracle.Process.respaced().forward(t, x0, noise)
    np.testing.assert_allclose(contract.float64(x_t), expected, atol=1e-6)


def test_flip_mirrors_the_image_and_not_its_noise(device: torch.device) -> None:
    x0 = all_bytes(2, device)
    t = torch.tensor([200, 200], device=device)
    key = contract.key_tensors([6, 6], 1, 1, device)
    x_t, eps = q_sample(x0, t, table(device), **key, flip=torch.tensor([False, True], device=device))
    assert torch.equal(eps[0], eps[1])
    signal = x_t - table(device)[200, 1] * eps
    torch.testing.assert_close(signal[1], signal[0].flip(-1), rtol=0, atol=1e-6)
    assert not torch.allclose(signal[1], signal[0], atol=1e-3)


@pytest.mark.large
@pytest.mark.parametrize("t", [0, 9, 300, 999])
def test_moments_of_x_t(t: int, device: torch.device) -> None:
    """Over 2e5 draws x_t has mean sqrt(alpha_bar) x_0 and variance 1 - alpha_bar, within five errors."""
    num, x0 = 200_000, 0.5
    images = torch.full((200, 1, 1, 1000), x0, device=device)
    x_t, _ = q_sample(
        images, torch.full((200,), t, device=device), table(device), **contract.key_tensors(range(200), 3, t, device)
    )
    bar = np.cumprod(1 - oracle.betas("linear", 1000))[t]
    values = contract.float64(x_t)
    assert abs(values.mean() - np.sqrt(bar) * x0) < 5 * np.sqrt((1 - bar) / num)
    assert abs(values.var() / (1 - bar) - 1) < 5 * np.sqrt(2 / num)


@pytest.mark.parametrize("dtype", with_large([torch.uint8, torch.float32], torch.float32))
@pytest.mark.parametrize("layout", contract.LAYOUTS)
def test_layout_of_the_input_changes_nothing(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    x0 = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8, device=device).to(dtype)
    t, key = torch.tensor([5, 50], device=device), contract.key_tensors([1, 2], 3, 4, device)
    expected = q_sample(x0, t, table(device), **key)
    x_t, eps = q_sample(contract.LAYOUTS[layout](x0), t, table(device), **key)
    assert torch.equal(x_t, expected[0]) and torch.equal(eps, expected[1])
    assert x_t.is_contiguous() and eps.is_contiguous()


def test_noise_is_that_of_random_normal(device: torch.device) -> None:
    key = contract.key_tensors([4, 2], 8, 9, device)
    t = torch.tensor([1, 2], device=device)
    _, eps = q_sample(torch.zeros(2, 3, 5, 5, device=device), t, table(device), **key)
    assert torch.equal(eps, random_normal((3, 5, 5), **key, stream=STREAM_FORWARD))


def test_empty_batch(device: torch.device) -> None:
    empty = torch.zeros(0, 3, 4, 4, device=device)
    t = torch.zeros(0, dtype=torch.int64, device=device)
    x_t, eps = q_sample(empty, t, table(device), **contract.key_tensors([], 0, 0, device))
    assert x_t.shape == eps.shape == (0, 3, 4, 4)


def test_is_never_differentiable(device: torch.device) -> None:
    x0 = torch.zeros(1, 1, 2, 2, device=device, requires_grad=True)
    t = torch.tensor([3], device=device)
    x_t, eps = q_sample(x0, t, table(device), **contract.key_tensors([0], 0, 0, device), noise=x0 + 1)
    assert not x_t.requires_grad and not eps.requires_grad


@pytest.mark.parametrize("given", ["nothing", "flip", "noise"])
def test_opcheck(given: str, device: torch.device) -> None:
    x0 = all_bytes(2, device)
    flip = torch.tensor([True, False], device=device) if given == "flip" else None
    noise = torch.randn(2, 1, 16, 16, device=device) if given == "noise" else None
    key = contract.key_tensors([1, 2], -3, 4, device)
    t = torch.tensor([0, 999], device=device)
    contract.opcheck(torch.ops.fastddpm.q_sample, (x0, t, table(device), flip, noise, *key.values()))


@pytest.mark.large
def test_compiles_with_a_dynamic_batch(device: torch.device) -> None:
    def arguments(n: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        key = contract.key_tensors(range(n), 5, 6, device)
        t = torch.arange(n, device=device) * 100
        return [all_bytes(n, device), t, key["images"], t % 200 == 0], [table(device), key["seed"], key["step"]]

    def function(
        x0: torch.Tensor, t: torch.Tensor, images: torch.Tensor, flip: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        coefficients, seed, step = rest
        return q_sample(x0, t, coefficients, images, seed, step, flip=flip)

    contract.assert_compiles_for_any_batch(function, arguments, [2, 3, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(3, 4, 4)}, r"x0 must be uint8 or floating \(N, C, H, W\); got torch.float32 \(3, 4, 4\)"),
        ({"x0": torch.zeros(2, 1, 4, 4, dtype=torch.int32)}, r"got torch.int32 \(2, 1, 4, 4\)"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, r"t must be int64 \(2,\); got torch.int64 \(3,\)"),
        ({"t": torch.zeros(2)}, r"t must be int64 \(2,\); got torch.float32 \(2,\)"),
        ({"table": torch.zeros(1000, 3)}, r"table must be float32 \(T, 2\); got torch.float32 \(1000, 3\)"),
        ({"table": torch.zeros(9, 2, dtype=torch.float64)}, r"table must be float32 \(T, 2\); got torch.float64"),
        ({"flip": torch.zeros(2)}, r"flip must be bool \(2,\); got torch.float32 \(2,\)"),
        ({"noise": torch.zeros(2, 1, 4, 5)}, r"noise must be \(2, 1, 4, 4\) like x0; got \(2, 1, 4, 5\)"),
        ({"images": torch.zeros(3, dtype=torch.int64)}, r"images must be \(2,\); got \(3,\)"),
        ({"seed": torch.tensor(1.5)}, r"seed must be a 0-d int64 tensor; got torch.float32 \(\)"),
    ],
)
def test_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    cpu = torch.device("cpu")
    arguments = {
        "x0": torch.zeros(2, 1, 4, 4),
        "t": torch.zeros(2, dtype=torch.int64),
        "table": table(cpu),
        **contract.key_tensors([0, 1], 0, 0, cpu),
    }
    with pytest.raises(ValueError, match="q_sample: .*" + message):
        q_sample(**(arguments | change))
