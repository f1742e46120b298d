"""The floors that benchmarks are held against: bytes and products counted by hand."""

import limits
import pytest
import torch
from shapes import Call, distinct, network_calls, step_calls


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def test_group_norm_silu() -> None:
    """128 channels at 32x32, batch 128, bf16: 33.6 MB read and as much written take 15.6 us at 4.3 TB/s."""
    x, weight = meta(128, 128, 32, 32), meta(128, dtype=torch.float32)
    call = Call("group_norm_silu", (x, weight, weight, 32, 1e-6, *[None] * 4, True, 0.0, *[None] * 3, 0))
    found = limits.limit(call)
    images, parameters, moments = 2 * 128 * 128 * 1024 * 2, 2 * 128 * 4, 2 * 128 * 32 * 4
    assert found == limits.Limit(images + parameters + moments, 0, 0)
    assert found.floor_us() == pytest.approx(15.6, abs=0.05)


@pytest.mark.parametrize(("name", "products"), [("attention", 2), ("attention_backward", 5)])
def test_attention(name: str, products: int) -> None:
    """256 tokens of 512 channels: 2 L^2 C FLOPs a product; at this width memory is what limits."""
    q, lse = meta(64, 256, 512), meta(64, 256, dtype=torch.float32)
    backward = name.endswith("backward")
    found = limits.limit(Call(name, (q, q, q, q, lse, 1.0, False) if backward else (q, q, q, 1.0, False)))
    tensors = 7 if backward else 4
    assert found.matrix_flop == products * 64 * 2 * 256 * 256 * 512
    assert found.num_bytes == tensors * 64 * 256 * 512 * 2 + 64 * 256 * 4
    assert found.floor_us() == pytest.approx(1e6 * found.num_bytes / 4.3e12)


def test_the_step_around_the_network() -> None:
    """CIFAR-10 at batch 2: bytes of an element, from uint8 to two floats, and x read and written in place."""
    elements, key = 2 * 3072, 2 * 8 + 8 + 8
    by_name = {call.name: limits.limit(call) for call in reversed(step_calls("cifar10", 2, torch.bfloat16))}
    assert by_name["random_normal"].num_bytes == 4 * elements + key
    assert by_name["q_sample"].num_bytes == (1 + 4 + 4) * elements + key + 2 * 8
    assert by_name["reverse_step"].num_bytes == (4 + 2 + 4) * elements + key
    assert all(found.float64_flop == 29 * elements for found in by_name.values())


def test_calls_of_the_cifar10_network() -> None:
    """51 norms and 6 attentions, each with its gradient. 36 biases of convolutions and attention's last layers.

    Of these the gradients are sums, and of 40 linear layers: 22 of embeddings and 18 of q, k and v.
    """
    calls = network_calls("cifar10", 1, torch.bfloat16, training=True)
    counts = {name: sum(call.name == name for call in calls) for name in {call.name for call in calls}}
    assert counts == {
        "group_norm_silu": 51, "group_norm_silu_backward": 51, "attention": 6, "attention_backward": 6,
        "add_bias": 36, "channel_sums": 76,
    }  # fmt: skip
    assert sum(count for _, count in distinct(calls)) == len(calls)
