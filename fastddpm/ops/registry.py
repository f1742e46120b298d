"""Registers an operation as `torch.ops.fastddpm.<name>`: schema, implementations, shape rule and gradient."""

import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .backend import implementation

_library = torch.library.Library("fastddpm", "FRAGMENT")
_PLAIN_TYPES = (Tensor, nn.Parameter)
_SCALARS = {"int": (int,), "float": (float, int), "bool": (bool,)}  # of a schema, and what Python has for them


def _keys(tensor: Tensor) -> int:
    """Return the dispatch keys of a tensor: what kinds of work an operator on it may have to be led through."""
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys


def _plain_keys() -> set[int]:
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(_keys(torch.empty(0, device="cpu")))
    return found


_PLAIN_KEYS = _plain_keys()


class _Operator:
    """One operator, and the conversion of its positional arguments to those of the functions behind it.

    A forward function takes the operation's NamedTuple. A backward function takes it too, with defaults for the fields
    that the operator lacks, and then the operator's other arguments: grad and what the forward pass saved.
    """

    run: Callable[[str, Sequence[Any]], Any]  # the implementation that is chosen for a device type and the arguments
    gradient: type[torch.autograd.Function] | None = None  # the same with the autograd rule, if there is one

    def __init__(self, name: str, verb: str, arguments: Any, casts: bool) -> None:
        self.overload = getattr(torch.ops.fastddpm, name).default
        schema = self.overload._schema.arguments
        names = self.names = [argument.name for argument in schema]
        self.tensors = [index for index, argument in enumerate(schema) if "Tensor" in str(argument.type)]
        self.scalars = [(i, _SCALARS[str(arg.type)]) for i, arg in enumerate(schema) if str(arg.type) in _SCALARS]
        self.verb, self.arguments, self.casts = verb, arguments, casts
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
    verb = "forward" if operation is None else "backward"
    this = _operators[name] = _Operator(name, verb, arguments, bool(autocast))
    names = this.names

    def run(device_type: str, args: Sequence[Any]) -> Any:
        named = dict(zip(names, args, strict=True))
        return call(implementation(operation or name, device_type, named), name, args)

    this.run = run
    _library.impl(name, lambda *args: run(_device(name, this, args).type, args), "CompositeExplicitAutograd")
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


def evaluate(name: str, *args: Any) -> Any:
    """Run the operator `name`, on the CPU past PyTorch's dispatcher where that would add nothing but its time.

    The dispatcher takes a third of a small call and its gradient. `args`: all arguments, in the schema's order.
    """
    this = _operators[name]
    tensors = [args[index] for index in this.tensors if args[index] is not None]
    if (
        not is_plain(tensors)
        or (this.casts and torch.is_autocast_enabled("cpu"))
        or any(type(args[index]) not in types for index, types in this.scalars)  # the dispatcher converts or refuses
    ):
        return this.overload(*args)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return this.overload(*args) if this.gradient is None else this.gradient.apply(*args)
    return this.run("cpu", args)


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether PyTorch's dispatcher has nothing to do for an operation on these tensors: eager, on the CPU.

    It has where something looks at operators or replaces them: compilation, tracing, the profiler, modes, subclasses,
    transforms; and where a tensor is not what its memory says: batched, negated, zero without memory, sparse.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) in _PLAIN_TYPES and _keys(tensor) in _PLAIN_KEYS for tensor in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.autograd.profiler._is_profiler_enabled
        and torch._C._get_tracing_state() is None
    )


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


def _device(name: str, this: _Operator, args: Sequence[Any]) -> torch.device:
    """Return the device of all tensors. Raises ValueError, naming the argument, for a tensor on another device."""
    first, device = "", None
    for key, value in ((this.names[index], args[index]) for index in this.tensors):
        if value is None:
            continue
        if device is None:
            first, device = key, value.device
        elif value.device != device:
            raise ValueError(f"{name}: {first} is on {device}, but {key} is on {value.device}; move all to one device")
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
    this = _operators[name]

    def forward(ctx: Any, *args: Any) -> Any:
        output = this.run("cpu", args)
        setup_context(ctx, args, output)
        return output

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    this.gradient = type(name, (torch.autograd.Function,), functions)
