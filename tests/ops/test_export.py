"""torch.export of every operation, with a batch of any size: saved, loaded, and equal to the operation itself."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import contract
from helpers.marks import with_large
from torch import Tensor

from fastddpm.kernels.reverse_step import COLUMNS
from fastddpm.ops import attention, group_norm_silu, q_sample, random_normal, reverse_step

Arguments = tuple[list[Tensor], list[Tensor]]


def key(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    images, seed, step = contract.key_tensors(range(n), 5, 2, device).values()
    return images, seed, step


def of_group_norm_silu(n: int, device: torch.device) -> Arguments:
    images, seed, step = key(n, device)
    x, skip = (torch.randn(n, c, 3, 4, device=device) for c in (4, 8))
    parameters = [torch.randn(12, device=device) for _ in range(2)]
    return [x, skip, torch.randn(n, 12, device=device), images], [*parameters, seed, step]


def call_group_norm_silu(x: Tensor, skip: Tensor, temb: Tensor, images: Tensor, *rest: Tensor) -> Tensor:
    weight, bias, seed, step = rest
    return group_norm_silu(x, weight, bias, 3, skip=skip, temb=temb, dropout=0.3, images=images, seed=seed, step=step)


def of_attention(n: int, device: torch.device) -> Arguments:
    return [torch.randn(n, 6, 8, device=device) for _ in range(3)], []


def of_q_sample(n: int, device: torch.device) -> Arguments:
    images, seed, step = key(n, device)
    x0 = torch.randint(256, (n, 1, 3, 4), dtype=torch.uint8, device=device)
    t = torch.arange(n, device=device)
    return [x0, t, t % 2 == 0, images], [torch.rand(10, 2, device=device), seed, step]


def call_q_sample(x0: Tensor, t: Tensor, flip: Tensor, images: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    table, seed, step = rest
    return q_sample(x0, t, table, images, seed, step, flip=flip)


def of_reverse_step(n: int, device: torch.device) -> Arguments:
    images, seed, step = key(n, device)
    table = torch.rand(10, COLUMNS, device=device)
    table[:, -1] = 0  # there is no step before
    x, out = (torch.randn(n, 1, 3, 4, device=device) for _ in range(2))
    return [x, out, images], [table, torch.arange(10, device=device), step, seed]


def call_reverse_step(x: Tensor, out: Tensor, images: Tensor, *rest: Tensor) -> Tensor:
    """A sampler's step that leaves the state it was given as it was."""
    table, timesteps, index, seed = rest
    return reverse_step(x.clone(), out, table, timesteps, index, images, seed)


def of_random_normal(n: int, device: torch.device) -> Arguments:
    images, seed, step = key(n, device)
    return [images], [seed, step]


def call_random_normal(images: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    return random_normal((1, 3, 4), images, seed, step, 0)


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[int, torch.device], Arguments]]] = {
    "group_norm_silu": (call_group_norm_silu, of_group_norm_silu),
    "attention": (attention, of_attention),
    "q_sample": (call_q_sample, of_q_sample),
    "reverse_step": (call_reverse_step, of_reverse_step),
    "random_normal": (call_random_normal, of_random_normal),
}


@pytest.mark.parametrize("name", with_large(OPERATIONS, *list(OPERATIONS)[1:]))
def test_export_round_trip(name: str, device: torch.device) -> None:
    function, arguments = OPERATIONS[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors)

    batch = torch.export.Dim("batch", min=1, max=64)
    batched, others = arguments(3, device)
    dynamic = (tuple({0: batch} for _ in batched) + tuple({} for _ in others),)
    program = torch.export.export(Module(), (*batched, *others), dynamic_shapes=dynamic)
    graphs = [str(m.graph) for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any(f"fastddpm.{name}" in graph for graph in graphs)  # perhaps in a part without gradients
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    batched, others = arguments(5, device)
    ours, expected = loaded(*batched, *others), function(*batched, *others)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
