"""Operators in eager mode on the CPU go around PyTorch's dispatcher: with the same bits, where it has nothing to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import ops
from fastddpm.ops.linear_bf16 import linear_bf16
from fastddpm.ops.registry import is_plain


def images() -> Tensor:
    return torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last).requires_grad_()


def parameter(*size: int) -> Tensor:
    return torch.nn.Parameter(torch.randn(size))


OPERATIONS: dict[str, Callable[[], tuple[Callable[..., Tensor], list[Tensor]]]] = {
    "conv3x3": lambda: (ops.conv3x3, [images(), parameter(16, 32, 3, 3), parameter(16)]),
    "linear_bf16": lambda: (linear_bf16, [torch.randn(9, 32, requires_grad=True), parameter(16, 32), parameter(16)]),
    "attention": lambda: (ops.attention, [torch.randn(2, 20, 32, requires_grad=True) for _ in range(3)]),
    "group_norm_silu": lambda: (
        lambda x, weight, bias: ops.group_norm_silu(x, weight, bias, 8), [images(), parameter(32), parameter(32)]
    ),
}  # fmt: skip


class Seen(TorchDispatchMode):
    """Notes the operators that the dispatcher runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def results(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    out = function(*inputs)
    grad = torch.ones_like(out) if grad is None else grad
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_bits_as_the_dispatchers(name: str) -> None:
    function, inputs = OPERATIONS[name]()
    around = results(function, inputs)
    with Seen() as seen:
        through = results(function, inputs)
    assert {f"fastddpm::{name}", f"fastddpm::{name}_backward"} <= {*seen.names}
    assert all(torch.equal(one, other) for one, other in zip(around, through, strict=True))


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_goes_around_with_and_without_gradients(name: str) -> None:
    function, inputs = OPERATIONS[name]()
    out = function(*inputs)
    assert out.grad_fn is not None and out.grad_fn.name() == f"{name}Backward"
    with torch.no_grad():
        without = function(*inputs)
    assert without.grad_fn is None and not without.requires_grad and torch.equal(without, out)


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives(name: str) -> None:
    """Of a gradient that was computed with create_graph, in float64 beside plain PyTorch's reference backend."""
    function, inputs = OPERATIONS[name]()
    found = []
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            out = function(*inputs)
            first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            found.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs))
    for ours, reference in zip(*found, strict=True):
        assert (ours - reference).norm() <= 2e-2 * reference.norm()


def test_the_profiler_sees_operators() -> None:
    function, inputs = OPERATIONS["conv3x3"]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results(function, inputs)
    assert {"fastddpm::conv3x3", "fastddpm::conv3x3_backward"} <= {event.key for event in profile.key_averages()}


class Subclass(Tensor):
    """A tensor with a meaning of its own."""


def test_what_the_dispatcher_is_needed_for() -> None:
    x = torch.randn(3)
    assert is_plain([x, torch.nn.Parameter(x)])
    assert not is_plain([x, x.as_subclass(Subclass)])
    assert not is_plain([x, x.to("meta")])
    with Seen():
        assert not is_plain([x])
    with torch.device("cpu"):  # a mode of __torch_function__
        assert not is_plain([x])
    asked: list[bool] = []
    torch.func.vmap(lambda row: (asked.append(is_plain([row])), row)[1])(torch.randn(2, 3))
    compiled = torch.compile(lambda y: y + is_plain([y]), backend="eager", fullgraph=True)
    assert asked == [False] and torch.equal(compiled(x), x)


@pytest.mark.parametrize("name", OPERATIONS)
def test_batched_gradients(name: str) -> None:
    """They are tensors without memory, of PyTorch's own type."""
    function, inputs = OPERATIONS[name]()
    out = function(*inputs)
    grads = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for ours, one in zip(batched, torch.autograd.grad(out, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], one)


@pytest.mark.parametrize("name", OPERATIONS)
def test_negated_and_zero_tensors_are_what_they_stand_for(name: str) -> None:
    """Their memory holds something else, or nothing."""
    function, inputs = OPERATIONS[name]()
    x, *parameters = (tensor.detach() for tensor in inputs)
    negated = torch._neg_view(-x)
    assert negated.is_neg() and torch.equal(function(negated, *parameters), function(x, *parameters))
    zero = torch._efficientzerotensor(parameters[0].shape)
    assert torch.equal(function(x, zero, *parameters[1:]), function(x, torch.zeros_like(zero), *parameters[1:]))


def test_the_schema_is_kept() -> None:
    x, weight = torch.randn(1, 16, 4, 4), torch.randn(16, 16, 3, 3)
    with pytest.raises(RuntimeError, match="bf16"):
        ops.conv3x3(x, weight, bf16="no")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="groups"):
        ops.group_norm_silu(x, torch.ones(16), torch.zeros(16), 8.0)  # type: ignore[arg-type]
