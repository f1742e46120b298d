"""The network that a trainer trains: what is checked of it, the randomness of its dropout, and its averaged weights."""

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fastddpm.config import Preset
from fastddpm.data import Dataset
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.network import Interface, interface_of, stored, trained
from fastddpm.storage.documents import difference
from fastddpm.unet import UNet, meta_network

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def check_network(network: nn.Module, preset: Preset, dataset: Dataset) -> Interface:
    """Return the interface of a network that is to be trained with `preset` on `dataset`.

    Raises `UsageError` if the network cannot be trained on these images or with these options, and `DataError` if the
    data set lacks the labels that it needs.
    """
    if isinstance(network, UNet):
        if network.config != preset.unet:
            raise UsageError(
                f"the network is not the one of the preset: {'; '.join(difference(preset.unet, network.config))}"
            )
        interface = interface_of(network)
    else:
        channels, height, width = dataset.images.shape[1:]
        interface = interface_of(network, shape=(channels, height, width))
        if interface.num_classes and preset.unet.label_dropout and interface.null_label is None:
            raise UsageError(
                f"label_dropout {preset.unet.label_dropout} needs a null label, which {type(network).__name__} does "
                "not have: set its null_label, or label_dropout 0"
            )
        _check_parameters(network)
    _check_labels(interface, dataset)
    return interface


def _check_parameters(network: nn.Module) -> None:
    """Raise `UsageError` for weights that cannot be trained or averaged."""
    name = type(network).__name__
    for layer, module in network.named_modules():
        if isinstance(module, _BATCH_NORM) and module.track_running_stats:
            raise UsageError(
                f"{name} has batch normalization ({layer}), whose statistics are neither averaged nor the same for "
                "another number of processes; use GroupNorm or LayerNorm"
            )
    if not trained(network):
        raise UsageError(f"{name} has no parameter to train: all are frozen, or there is none")
    for parameter, p in trained(network).items():
        if p.dtype != torch.float32:
            raise UsageError(
                f"{name} has weights of {p.dtype} ({parameter}), and float32 is trained; convert it with .float(), and "
                "choose precision bf16 to compute in bfloat16"
            )


def _check_labels(interface: Interface, dataset: Dataset) -> None:
    if not interface.num_classes:
        return
    if dataset.labels is None:
        raise DataError(f"{dataset.name} has no labels, which num_classes {interface.num_classes} needs")
    if dataset.labels.max() >= interface.num_classes:
        raise DataError(f"{dataset.name} has label {dataset.labels.max()}, but num_classes is {interface.num_classes}")


@contextlib.contextmanager
def dropout_of(network: nn.Module, seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Make what a network draws inside the block a function of (seed, step, rank), unless a noise key does so already.

    torch's default generators are as before afterwards.
    """
    if getattr(network, "takes_noise_key", False):
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0x2545F4914F6CDD1D + rank) % 2**63)
        yield


def is_plain(network: nn.Module) -> bool:
    """Return whether a network is a `UNet` as it is configured, so that its configuration and weights tell all."""
    return type(network) is UNet and stored(network).keys() == meta_network(network.config).state_dict().keys()


def averaged_copy(network: nn.Module, tensors: Mapping[str, Tensor], interface: Interface) -> nn.Module:
    """Return a copy of `network` with the tensors `tensors`, by name, in evaluation mode.

    It has `interface` as its attributes.
    """
    own = copy.deepcopy(network).requires_grad_(False).eval()
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(tensors[name])
    classes, null_label = interface.num_classes, interface.null_label
    for name, value in (("image_shape", interface.shape), ("num_classes", classes), ("null_label", null_label)):
        if getattr(own, name, None) != value:
            setattr(own, name, value)
    return own
