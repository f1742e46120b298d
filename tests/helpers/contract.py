"""What every operation of `fastddpm.ops` must do besides computing the right numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LOW_PRECISION = [torch.bfloat16, torch.float16]


def opcheck(op: Any, args: Sequence[Any], checks: Sequence[str] = OPCHECKS) -> None:
    """The schema is honest about mutation, gradients are registered, fake and compiled agree with eager."""
    torch.library.opcheck(op, tuple(args), test_utils=tuple(checks))


def _poison(x: Tensor) -> Tensor:
    """Values that spoil a result that reads them."""
    return torch.full_like(x, torch.nan if x.is_floating_point() else 255)


# The ways a (N, C, H, W) tensor may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, _poison(x)], dim=1)[:, : x.shape[1]],
    "strided": lambda x: torch.stack([x, _poison(x)], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([_poison(x).flatten()[:1], x.flatten()])[1:].reshape(x.shape),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def key_tensors(images: Sequence[int], seed: int, step: int, device: torch.device) -> dict[str, Tensor]:
    """`images`, `seed` and `step` as the operations take them."""
    return {
        "images": torch.tensor(images, dtype=torch.int64, device=device),
        "seed": torch.tensor(seed, dtype=torch.int64, device=device),
        "step": torch.tensor(step, dtype=torch.int64, device=device),
    }


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy()


def assert_within_twice_the_error_of(low: Tensor, ours: Tensor, expected: np.ndarray) -> None:
    """The largest and the mean error are at most twice those of the same maths in low precision throughout.

    One rounding of the largest value is added: where the maths is short, `low` may hit the exact result.
    """
    error, low_error = (np.abs(float64(x) - expected) for x in (ours, low))
    rounding = torch.finfo(ours.dtype).eps / 2
    assert error.max() <= 2 * low_error.max() + rounding * np.abs(expected).max()
    assert error.mean() <= 2 * low_error.mean() + rounding * np.abs(expected).mean()


def assert_compiles_for_any_batch(
    function: Callable[..., Any], arguments: Callable[[int], tuple[list[Tensor], list[Any]]], batches: Sequence[int]
) -> None:
    """torch.compile(fullgraph=True) traces `function` once and gives the eager numbers for every batch size.

    `arguments(n)`: the tensors whose first dimension is the batch, and what follows them. Tensors that
    require grad are compared by their gradients too.
    """
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, example_inputs)

    compiled = torch.compile(function, fullgraph=True, backend=counting)
    for n in batches:
        results = []
        for run in (function, compiled):
            batched, others = arguments(n)
            for tensor in batched:
                torch._dynamo.mark_dynamic(tensor, 0)
            outputs = run(*batched, *others)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if any(output.requires_grad for output in outputs):
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            inputs = [x for x in (*batched, *others) if isinstance(x, Tensor)]
            results.append([*outputs, *inputs, *(x.grad for x in inputs if x.grad is not None)])
        eager, traced = results
        assert len(eager) == len(traced)
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
    assert graphs == 1, f"{graphs} graphs for batches {batches}"
