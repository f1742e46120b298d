"""The protocol of a network: how it is called, and what it says about itself.

A network is a `torch.nn.Module` whose `forward(x_t, t)`, or `forward(x_t, t, label)` if it has classes, returns a
tensor. x_t: (N, C, H, W), float32, or in the sampler of the dtype of the weights. t: int64 (N,) in 0..T-1. label: int64
(N,), never passed without classes. The result is floating (N, C, H, W), or (N, 2C, H, W) if the diffusion's variance is
learned. Attributes, all optional:

    image_shape        (C, H, W) of the images; otherwise an argument, or that of the data set
    num_classes        number of classes; 0, the default: no labels
    null_label         label that means "no label", which guidance and label dropout need; default: None
    takes_noise_key    whether forward takes `noise_key`, a `NoiseKey` to draw dropout masks from; default: False

`fastddpm.UNet` is one of them, and has all four.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.errors import UsageError, refuse

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Interface:
    """What the rest of the package needs to know of a network.

    `shape`: (C, H, W) of the images. `num_classes`: 0 if the network takes no labels. `null_label`: the label that
    means "no label", None if there is none.
    """

    shape: tuple[int, int, int]
    num_classes: int = 0
    null_label: int | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or not all(type(size) is int and size > 0 for size in self.shape):
            raise UsageError(f"a network's image shape is three positive integers, (C, H, W); got {self.shape}")
        if type(self.num_classes) is not int or self.num_classes < 0:
            raise UsageError(f"a network's num_classes must be an integer, 0 or more; got {self.num_classes!r:.100}")
        if self.null_label is not None and (type(self.null_label) is not int or self.null_label < 0):
            raise UsageError(f"a network's null_label must be None or an integer; got {self.null_label!r:.100}")
        if self.null_label is not None and not self.num_classes:
            raise UsageError(f"null_label {self.null_label} needs num_classes; the network has none")


def interface_of(
    network: nn.Module, *, shape: tuple[int, int, int] | None = None, num_classes: int | None = None
) -> Interface:
    """Return the interface of `network`, from its attributes and, where it has none, from the arguments.

    Raises `UsageError` if the image shape is not known, if an argument contradicts an attribute, and if `forward`
    cannot be called with the arguments of the protocol.
    """
    if not isinstance(network, nn.Module):
        raise UsageError(f"a network must be a torch.nn.Module; got {type(network).__name__}: wrap it in a module")
    name = type(network).__name__
    lazy = [n for n, p in network.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise UsageError(
            f"{name} has parameters without a shape, {lazy[0]} for one; call it on a batch first, as lazy modules need"
        )
    own_shape = getattr(network, "image_shape", None)
    if own_shape is not None:
        own_shape = tuple(own_shape) if isinstance(own_shape, Sequence) else (own_shape,)
    if shape is not None and own_shape not in (None, tuple(shape)):
        raise UsageError(f"shape is {tuple(shape)}, but {name} is for images {own_shape}")
    known = shape if own_shape is None else own_shape
    if known is None:
        raise UsageError(f"the image shape of {name} is unknown: give shape=(C, H, W), or set its image_shape")
    own_classes = getattr(network, "num_classes", None)
    if num_classes is not None and own_classes not in (None, num_classes):
        raise UsageError(f"num_classes is {num_classes}, but {name} has {own_classes}")
    classes = (num_classes or 0) if own_classes is None else own_classes
    interface = Interface(tuple(known), classes, getattr(network, "null_label", None))
    _check_forward(network, interface)
    return interface


def _check_forward(network: nn.Module, interface: Interface) -> None:
    """Raise `UsageError` if `forward` does not take the arguments that it will get."""
    names = ["x_t", "t", "label"] if interface.num_classes else ["x_t", "t"]
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # one in C, which has no signature to look at
        return
    try:
        signature.bind(*names)
        signature.bind(*names, **({"noise_key": None} if getattr(network, "takes_noise_key", False) else {}))
    except TypeError as error:
        labels = f", since it has {interface.num_classes} classes" if interface.num_classes else ""
        raise UsageError(
            f"{type(network).__name__}.forward{signature} is called as forward({', '.join(names)}){labels}: {error}"
        ) from None


def evaluate(
    network: Network, x_t: Tensor, t: Tensor, label: Tensor | None = None, *, key: Any = None, learned_variance: bool
) -> Tensor:
    """Return network(x_t, t), or network(x_t, t, label) if there is a label.

    `key`: passed on if the network's `takes_noise_key` is true. Raises `UsageError` unless the result is a floating
    tensor (N, C, H, W), or (N, 2C, H, W) with `learned_variance`, if the network writes into its arguments, which
    the caller still needs, and if it fails on a shape or dtype of images that is not its own.
    """
    options = {"noise_key": key} if key is not None and getattr(network, "takes_noise_key", False) else {}
    before = _versions(x_t, t, label)
    arguments = (x_t, t) if label is None else (x_t, t, label)
    if torch.compiler.is_compiling():
        out = network(*arguments, **options)
    else:
        try:
            out = network(*arguments, **options)
        except UsageError:
            raise
        except (RuntimeError, ValueError) as error:
            if reason := _unfit(network, x_t):
                raise UsageError(f"{reason}; its forward failed: {str(error).splitlines()[0]:.200}") from error
            raise
    expected = (x_t.shape[0], x_t.shape[1] * (1 + learned_variance), *x_t.shape[2:])
    if not isinstance(out, Tensor):
        raise UsageError(f"a network must return a tensor {tuple(expected)}; got a {type(out).__name__}")
    if _versions(x_t, t, label) != before:
        raise UsageError(
            "the network writes into x_t, t or label, as an operation in place does (mul_, ReLU(inplace=True) as the "
            "first layer), and they are needed afterwards; let it write into a copy"
        )
    if out.shape != expected or not out.is_floating_point():
        why = "learned" if learned_variance else "fixed"
        raise UsageError(
            f"a network must return a floating {tuple(expected)} for images {tuple(x_t.shape)} and a {why} variance; "
            f"got {out.dtype} {tuple(out.shape)}"
        )
    return out


def check_examples(
    images: Tensor, key: Any, label: Tensor | None, null_label: int | None, label_dropout: float
) -> None:
    """Raise `UsageError` for arguments of `Diffusion.loss` that do not go together; nothing while one compiles it."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(getattr(key, "images", None), Tensor):
        raise UsageError(f"key must be a NoiseKey, such as NoiseKey.draw(len(images), device); got {key!r:.100}")
    problems = []
    if len(key.images) != len(images):
        problems.append(f"key is of {len(key.images)} images, and there are {len(images)}")
    if label is not None and (label.shape != (len(images),) or label.dtype != torch.int64):
        problems.append(f"label must be int64 ({len(images)},); got {label.dtype} {tuple(label.shape)}")
    if not 0 <= label_dropout <= 1:
        problems.append(f"label_dropout must be in [0, 1]; got {label_dropout}")
    elif label_dropout and label is not None and null_label is None:
        problems.append("label_dropout needs null_label, the label that means none")
    refuse(problems)


def _unfit(network: Network, x_t: Tensor) -> str | None:
    """Return why `network` is not for images like x_t, of those reasons that it tells; None if there is no such."""
    if not isinstance(network, nn.Module):
        return None
    name, shape = type(network).__name__, getattr(network, "image_shape", None)
    if shape is not None and tuple(shape) != tuple(x_t.shape[1:]):
        return f"{name} is for images {tuple(shape)}, and got {tuple(x_t.shape[1:])}"
    dtype, device = precision_of_weights(network), device_of(network)
    if device != x_t.device:
        return f"{name} is on {device}, and the images are on {x_t.device}; move one of them"
    if dtype != x_t.dtype:
        return (
            f"{name} has weights of {dtype}, and x_t is {x_t.dtype}; train float32 weights, under torch.autocast for a "
            "lower precision"
        )
    return None


def _versions(*tensors: Tensor | None) -> list[int]:
    """Return how often each tensor was written to, of those that count it; nothing while a graph is compiled."""
    if torch.compiler.is_compiling():
        return []
    return [tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference()]


def device_of(network: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU if there is none."""
    return next((tensor.device for tensor in network.parameters()), None) or next(
        (tensor.device for tensor in network.buffers()), torch.device("cpu")
    )


def precision_of_weights(network: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating parameter; float32 if there is none."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def constants(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict that are not trained, by name: buffers and frozen parameters."""
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    return {
        name: tensor.detach()
        for name, tensor in network.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and id(tensor) not in trained
    }


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name; one that layers share has the name that it has first."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def stored(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a model is stored as, by name: trained parameters, and the constants beside them."""
    return {**{name: p.detach() for name, p in trained(network).items()}, **constants(network)}


def checksum(network: nn.Module) -> str:
    """Return the sha256 of all parameters and buffers with their names, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()]):
        values = tensor.detach().cpu().reshape(-1)
        digest.update(name.encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
