"""How an operation becomes `torch.ops.fastddpm.<name>`: schema, implementation, shape rule, gradient."""

from collections.abc import Callable
from typing import Any

import torch

from .backend import implementation

_library = torch.library.Library("fastddpm", "FRAGMENT")


def register(
    name: str, schema: str, fake: Callable[..., Any], *, operation: str | None = None, autocast: tuple[str, ...] = ()
) -> None:
    """Define `fastddpm::name` with `schema`; its body is `forward` of whatever backend is chosen at the call.

    `operation` names another operation whose `backward` this is. `autocast` names the arguments that
    torch.autocast brings to its dtype; parameters keep theirs, and statistics are float32 whatever comes.
    `Library.define` and `impl` rather than `custom_op`: a call costs a quarter as much, and a U-Net makes some
    hundred of them.
    """
    verb = "forward" if operation is None else "backward"

    def run(*args: Any) -> Any:
        arguments = dict(zip(names, args, strict=True))
        device = _device(name, arguments)
        return getattr(implementation(operation or name, device.type, arguments), verb)(*args)

    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    names = [argument.name for argument in getattr(torch.ops.fastddpm, name).default._schema.arguments]
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastddpm::{name}", fake, lib=_library)
    if autocast:
        for device_type in ("cuda", "cpu"):
            _register_autocast(name, names, autocast, device_type)


def _register_autocast(name: str, names: list[str], cast: tuple[str, ...], device_type: str) -> None:
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


def _is_castable(value: Any) -> bool:
    """Whether autocast changes it: like torch's own operators, ours leave float64 alone."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _device(name: str, arguments: dict[str, Any]) -> torch.device:
    """The one device of all tensors; ValueError, naming the argument, for a tensor on another."""
    places = {key: value.device for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    first, device = next(iter(places.items()))
    for other, place in places.items():
        if place != device:
            raise ValueError(f"{name}: {first} is on {device}, but {other} is on {place}; move all to one device")
    return device


def register_without_gradient(name: str) -> None:
    """Its results never require a gradient. A rule of the dispatcher, since a saved export has none of torch.no_grad
    around an operation that returns nothing."""
    overload = getattr(torch.ops.fastddpm, name).default

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    _library.impl(name, run, "Autograd")


def register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    torch.library.register_autograd(f"fastddpm::{name}", backward, setup_context=setup_context, lib=_library)
