"""What is known of an implementation's checkpoints: names, tensors, and the configurations that it has published."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .mapping import Family

PAPER_RESOLUTION = 16  # pixels of the feature maps with attention, in the paper's networks and those after it


class Published(NamedTuple):
    """A published model: fields of UNetConfig, of DiffusionConfig, and options of the format's own."""

    unet: Mapping[str, Any]
    diffusion: Mapping[str, Any]
    options: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Format:
    """The checkpoints of one implementation.

    `repository`: where its code is published; `files`: what it writes, for people. `signature`: tensors that tell the
    format. `family`: the table of its tensors, which may depend on `options`, fields of --config with their defaults.
    `diffusion`: fields of DiffusionConfig, and a text of what they assume, from those of UNetConfig and those given.
    `sets`: the prefix of its averaged and of its raw weights; "" if the tensors are the whole file, which does not
    tell. `ignored`: tensors beside those of the network. `published`: configurations by name; `refused`: published
    files that are no such model, with the reason. `needed`: what has to be given, each with a word on it; one of
    several by names joined by "|". `image_size`: from the levels that have attention and from the file's other
    tensors, if they tell it. `refuses`: why a network of these fields of UNetConfig is none that fastddpm has.
    """

    name: str
    repository: str
    files: str
    signature: Sequence[str]
    family: Callable[[Mapping[str, Any]], Family]
    diffusion: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Mapping[str, Any], str]]
    sets: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    ignored: Sequence[str] = ()
    published: Mapping[str, Published] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    needed: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    refuses: Callable[[Mapping[str, Any]], str | None] = lambda fields: None
    image_size: Callable[[Sequence[bool], Mapping[str, Tensor]], int | None] = lambda attends, others: None


def paper_image_size(attends: Sequence[bool], others: Mapping[str, Tensor]) -> int | None:
    """Return the image size of a network whose first attention is at 16 pixels; None without attention."""
    return PAPER_RESOLUTION << list(attends).index(True) if any(attends) else None


def paper_diffusion(unet: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the process of the paper's released code for images of this size: fixedlarge on CIFAR-10 only."""
    size = unet["image_size"]
    variance = "fixedlarge" if isinstance(size, int) and size <= 32 else "fixedsmall"
    return {"variance": variance}, f"the paper's process at this image size: T = 1000, linear, eps, {variance}"
