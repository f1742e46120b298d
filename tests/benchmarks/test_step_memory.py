"""The memory of a step, counted by hand, and the batch that fits."""

import torch
from step_memory import CHIPS, USABLE, fitting, peak_of


def test_what_is_freed_does_not_count() -> None:
    """Two tensors of 4,096 bytes at a time, views free, and odd sizes rounded up to 512 bytes."""

    def step() -> None:
        x = torch.empty(1024, device="meta")
        for _ in range(3):
            x = x.view(32, 32) * 2
        del x
        torch.empty(1, device="meta")

    assert peak_of(step) == 2 * 4096
    assert peak_of(lambda: [torch.empty(1, device="meta") for _ in range(3)]) == 3 * 512


def test_what_autograd_keeps_counts() -> None:
    """exp keeps its output for the gradient: input, three outputs; then gradients come, and outputs go."""

    def step() -> None:
        x = torch.empty(1024, device="meta", requires_grad=True)
        x.exp().exp().exp()

    assert peak_of(step) >= 4 * 4096


def test_the_batch_that_fits() -> None:
    """A constant of 1 GB and 10 MB an image."""
    assert (
        fitting(lambda batch: max(2 * 10**9, 10**9 + 10**7 * batch), 8)[1] == fitting(lambda b: 10**9 + 10**7 * b, 8)[1]
    )
    peak, batches = fitting(lambda batch: 10**9 + 10**7 * batch, 8)
    assert peak == 1_080_000_000
    assert batches == {name: int((USABLE * size - 1e9) // 1e7) for name, size in CHIPS.items()}
