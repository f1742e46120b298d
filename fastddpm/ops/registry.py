"""Registers an operation as `torch.ops.fastddpm.<name>`: schema, implementations, shape rule and gradient."""

import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backend import implementation

_library = torch.library.Library("fastddpm", "FRAGMENT")


class _Operator:
    """The conversion of one operator's positional arguments to those of the functions behind it.

    A forward function takes the operation's NamedTuple. A backward function takes it too, with defaults for the fields
    that the operator lacks, and then the operator's other arguments: grad and what the forward pass saved.
    """

    def __init__(self, verb: str, arguments: Any, names: list[str]) -> None:
        self.verb, self.arguments = verb, arguments
        fields = arguments._fields
        self.defaults = tuple(arguments._field_defaults[field] for field in fields if field not in names)
        known = [*names, *(field for field in fields if field not in names)]
        self.own = operator.itemgetter(*(known.index(field) for field in fields))
        self.others = tuple(index for index, name in enumerate(names) if name not in fields)

    def apply(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        if self.verb == "forward":
            return function(self.arguments(*args))
        own = self.own((*args, *self.defaults))
        return function(self.arguments(*own), *[args[index] for index in self.others])


_operators: dict[str, _Operator] = {}


def register(
    name: str,
    arguments: Any,
    schema: str,
    fake: Callable[..., Any],
    *,
    operation: str | None = None,
    autocast: tuple[str, ...] = (),
) -> None:
    """Define the operator `fastddpm::name`, which runs the implementation that is chosen at each call.

    `arguments`: the operation's NamedTuple, with the fields of the forward `schema` in order. An implementation has
    `forward(arguments)`. `operation`: for a backward pass, the operation that it belongs to; then the implementation's
    `backward(arguments, *others)` runs. `fake` is called likewise and returns empty tensors. `autocast`: the arguments
    that torch.autocast casts to its dtype; parameters keep theirs.
    """
    # Library.define and impl instead of custom_op: a call costs a quarter as much, and a U-Net makes about a hundred.
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    names = [argument.name for argument in getattr(torch.ops.fastddpm, name).default._schema.arguments]
    this = _operators[name] = _Operator("forward" if operation is None else "backward", arguments, names)

    def run(*args: Any) -> Any:
        named = dict(zip(names, args, strict=True))
        device = _device(name, named)
        return call(implementation(operation or name, device.type, named), name, args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastddpm::{name}", lambda *args: this.apply(fake, args), lib=_library)
    if autocast:
        for device_type in ("cuda", "cpu"):
            _register_autocast(name, names, autocast, device_type)


def call(module: ModuleType, name: str, args: Sequence[Any]) -> Any:
    """Run the operator `name` ("attention", "attention_backward", ...) by one implementation of its operation.

    `args`: all arguments, in the order of the operator's schema.
    """
    this = _operators[name]
    return this.apply(getattr(module, this.verb), args)


def _register_autocast(name: str, names: Sequence[str], cast: tuple[str, ...], device_type: str) -> None:
    key = f"Autocast{device_type.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    overload = getattr(torch.ops.fastddpm, name).default

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        casted = [
            value.to(dtype) if argument in cast and _is_castable(value) else value
            for argument, value in zip(names, args, strict=True)
        ]
        with torch._C._ExcludeDispatchKeyGuard(below):
            return overload(*casted)

    _library.impl(name, run, key)


def computed_dtype(x: Tensor) -> torch.dtype:
    """Return torch.autocast's dtype on the device of `x` where it is enabled, and otherwise that of `x`."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def _is_castable(value: Any) -> bool:
    """Return whether autocast changes `value`. Like torch's own operators, ours leave float64 alone."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _device(name: str, arguments: dict[str, Any]) -> torch.device:
    """Return the device of all tensors. Raises ValueError, naming the argument, for a tensor on another device."""
    first, device = "", None
    for key, value in arguments.items():
        # `is not None` for speed: Tensor's metaclass makes isinstance slow for other objects.
        if value is not None and isinstance(value, Tensor):
            if device is None:
                first, device = key, value.device
            elif value.device != device:
                raise ValueError(
                    f"{name}: {first} is on {device}, but {key} is on {value.device}; move all to one device"
                )
    assert device is not None
    return device


def register_without_gradient(name: str) -> None:
    """Make the results of an operator never require a gradient.

    This is a rule of the dispatcher rather than torch.no_grad around the call, because an exported program loses
    no_grad around an operator that returns nothing.
    """
    overload = getattr(torch.ops.fastddpm, name).default

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    _library.impl(name, run, "Autograd")


def register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the autograd rule of an operator, as torch.library.register_autograd takes it."""
    torch.library.register_autograd(f"fastddpm::{name}", backward, setup_context=setup_context, lib=_library)
