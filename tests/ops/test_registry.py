"""An operation's arguments: the operators' schemas, and what the implementations take."""

import importlib
import importlib.util
import inspect

import pytest
import torch

from fastddpm.ops import backend


def schema_names(operator: str) -> tuple[str, ...]:
    return tuple(argument.name for argument in getattr(torch.ops.fastddpm, operator).default._schema.arguments)


@pytest.mark.parametrize("operation", backend.OPERATIONS)
def test_arguments_are_those_of_the_schema(operation: str) -> None:
    """In this order: a forward operator's arguments become the fields by position."""
    arguments = importlib.import_module(f"fastddpm.kernels.{operation}").Arguments
    assert arguments._fields == schema_names(operation)


@pytest.mark.parametrize("operation", ["group_norm_silu", "attention", "conv3x3", "linear_bf16"])
def test_backward_functions_take_the_rest_of_the_schema(operation: str) -> None:
    """Fields that the backward operator lacks have defaults; its other arguments follow by position."""
    arguments = importlib.import_module(f"fastddpm.kernels.{operation}").Arguments
    names = schema_names(f"{operation}_backward")
    assert {*arguments._fields} - {*names} <= {*arguments._field_defaults}
    others = [name for name in names if name not in arguments._fields]
    rungs = [rung for rung in (*backend.LADDERS["cuda"], "cpu") if backend._exists(operation, rung)]
    if importlib.util.find_spec("triton") is None:
        rungs = [rung for rung in rungs if rung != "triton"]
    for rung in rungs:
        function = importlib.import_module(f"fastddpm.kernels.{operation}.{rung}").backward
        assert list(inspect.signature(function).parameters)[1:] == others, rung
