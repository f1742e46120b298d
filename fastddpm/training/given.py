"""The options of the command line that decide what is chosen from the data, and those that have no place there.

Imports no torch.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastddpm.config import Preset
from fastddpm.runtime import cli
from fastddpm.runtime.image_size import ImageSize, image_size

from .network_sizes import NetworkSize

NAME = "photos"  # of the configuration, and so of the run directory


@dataclass(frozen=True)
class Given:
    """The options of the command line that other choices depend on; None where the choice is free."""

    image_size: ImageSize | None = None
    image_channels: int | None = None
    num_classes: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    steps: int | None = None
    minutes: float | None = None
    network: NetworkSize | None = None
    resize: str | None = None
    background: str | None = None
    model: Preset | None = None  # whose network and diffusion are taken (--init)

    @staticmethod
    def of(arguments: Sequence[str], model: Preset | None = None) -> "Given":
        """Return the options among `arguments`. Values of a wrong type count as not given: the parser refuses them."""
        kinds = {"minutes": float, "network": str, "resize": str, "background": str}
        found: dict[str, Any] = {}
        for field in dataclasses.fields(Given):
            text = cli.peek(arguments, f"--{field.name.replace('_', '-')}")
            try:
                found[field.name] = None if text is None else kinds.get(field.name, int)(text)
            except ValueError:
                continue
        found["image_size"] = _image_size(arguments)
        if found.get("network") not in typing.get_args(NetworkSize):
            found["network"] = None
        return Given(**found | {"model": model})


def _image_size(arguments: Sequence[str]) -> ImageSize | None:
    """Return the one or two numbers of --image-size; None for others, which the parser refuses."""
    try:
        sizes = [int(word) for word in cli.peek_all(arguments, "--image-size")]
    except ValueError:
        return None
    return sizes[0] if len(sizes) == 1 else image_size(sizes) if len(sizes) == 2 else None


def names_images(arguments: Sequence[str]) -> bool:
    """Return whether --data names images, and not the embedded digits, which are None."""
    return cli.peek(arguments, "--data") not in (None, "None")


def problems(
    arguments: Sequence[str], name: str, allow_bad: float, minutes: float | None, *, resuming: bool
) -> Iterator[str]:
    """Yield what is wrong with options of a configuration that is chosen from the data, or that they have no place.

    `name`: of the configuration. `resuming`: --resume was given.
    """
    if name == NAME and not resuming and not names_images(arguments):
        yield f"{NAME} is chosen from your images: name them with --data"
    if not 0 <= allow_bad <= 1:
        yield f"--allow-bad must be in 0..1, a share of the images; got {allow_bad}"
    if minutes is not None and not 0 < minutes < math.inf:
        yield f"--minutes must be more than 0; got {minutes}"
    if minutes is not None and cli.peek(arguments, "--steps") is not None:
        yield "--minutes chooses the number of steps; give --minutes or --steps, not both"
    if minutes is not None and resuming:
        yield "--minutes chooses the number of steps of a new run; with --resume, --steps changes it"
    background = cli.peek(arguments, "--background")
    if background not in (None, "None"):
        from fastddpm.data.image import check_background

        check_background(background)
    if cli.peek(arguments, "--network") is not None and cli.peek(arguments, "--init") is not None:
        yield "--network chooses a network, and --init brings that of its model; leave one of them out"
    elif cli.peek(arguments, "--network") is not None and (name != NAME or resuming):
        yield (
            "--network chooses a network for the images that --data names, without --preset; a preset has its own, "
            "which --width, --multipliers and --blocks change"
        )
