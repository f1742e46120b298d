"""Options that several commands share, and checks of their values. Imports no torch."""

import importlib.util
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastddpm.errors import UsageError, refuse

Checkpoint = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CHECKPOINT",
        help="A run directory, one of its checkpoints, a diffusers pipeline directory, a packed .safetensors file, or "
        "digits: the model that comes with fastddpm. hub:USER/NAME or hub:USER/NAME@REVISION: a model of the Hugging "
        "Face hub, downloaded unless it is cached.",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    tyro.conf.arg(help="Device to compute on. auto: a CUDA or ROCm GPU if there is one, otherwise the CPU."),
]
BatchSize = Annotated[
    int | None,
    tyro.conf.arg(
        help="Images evaluated at once. Default: as many as memory holds, up to 512 on a GPU and 64 on a CPU."
    ),
]
ResizeName = Literal["none", "area", "lanczos"]
Resize = Annotated[
    ResizeName,
    tyro.conf.arg(
        help="Antialiasing filter for images of another size, which are cropped to the centre square and resized. "
        "none: refuse them."
    ),
]
SkipBad = Annotated[
    bool, tyro.conf.arg(help="Leave out images that cannot be used. Default: stop with a list of them.")
]
Background = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="COLOUR",
        help='Put transparent images on this colour, a name or "#rrggbb", and convert CMYK and the like to RGB. '
        "None: refuse these images.",
    ),
]

BUILT_IN = "digits"
HUB = "hub:"  # of models at the Hugging Face hub
MAX_NUMBERS = 10_000_000
_HUB_NAME = re.compile(r"hub:([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_NUMBER = re.compile("[0-9]{1,19}")


def check_positive(**values: int | None) -> None:
    """Raise `UsageError` for options below 1. None, an option that was not given, passes."""
    refuse(
        f"--{name.replace('_', '-')} must be positive; got {value}"
        for name, value in values.items()
        if value is not None and value < 1
    )


def check_checkpoint(path: Path) -> None:
    """Raise `UsageError` if there is nothing at `path`, or if it is the name of a model of the hub that cannot be."""
    if is_hub_name(path):
        check_hub_name(os.fspath(path))
        return
    if is_built_in(path) or path.exists():
        return
    if not path.with_name(f"{path.name}.index").is_file():  # a TensorFlow checkpoint is named by its prefix
        raise UsageError(
            f"no checkpoint at {path}; give a run directory, one of its checkpoints, a diffusers pipeline directory, a "
            "packed or converted .safetensors file, the prefix of a TensorFlow checkpoint, digits, or hub:USER/NAME"
        )


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` names a model of the Hugging Face hub, with the prefix hub:, well or badly."""
    return os.fspath(path).startswith(HUB)


def check_hub_name(name: str) -> None:
    """Raise `UsageError` unless `name` is hub:USER/NAME or hub:USER/NAME@REVISION and huggingface_hub is installed."""
    hub_name(name)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError("models of the hub need huggingface_hub: pip install 'fastddpm[hub]'")


def hub_name(name: str) -> tuple[str, str | None]:
    """Return USER/NAME and the revision, None if none is named, of hub:USER/NAME@REVISION.

    Raises `UsageError` for another form.
    """
    found = _HUB_NAME.fullmatch(name)
    if found is None:
        raise UsageError(f"a model of the hub is hub:USER/NAME or hub:USER/NAME@REVISION; got {name!r:.200}")
    return found[1], found[2]


def is_built_in(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is "digits", the model that comes with the package.

    Raises `UsageError` if there is also something at the path digits, as one of the two would be taken by surprise.
    """
    if os.fspath(path) != BUILT_IN:
        return False
    if os.path.lexists(path):
        where = Path(path).absolute()
        raise UsageError(
            f"{path} is both the model that comes with fastddpm and a path here. For the path write {where}; for the "
            "model call the command in another directory"
        )
    return True


def parse_numbers(text: str, option: str) -> list[int]:
    """Return the numbers in `text`, as in "1,5,10-19", in the order given.

    `option`: its name in messages. Raises `UsageError` for other text and for more than 10 million numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _NUMBER.fullmatch(first) or (dash and not _NUMBER.fullmatch(last)):
            raise UsageError(f"--{option} takes numbers and ranges, as in 0-63 or 1,5,10-19; got {part.strip()!r:.60}")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise UsageError(f"--{option}: {part.strip()} runs backwards; write {high}-{low}")
        if len(numbers) + high - low >= MAX_NUMBERS:
            raise UsageError(f"--{option}: more than {MAX_NUMBERS:,} numbers; divide them among several calls")
        numbers += range(low, high + 1)
    return numbers


def one_or_each(labels: Sequence[int], count: int, of: str) -> list[int]:
    """Return a class for each of `count` seeds or images, `of` which name: `labels`, or the only one of them for all.

    Raises `UsageError` for another number of labels.
    """
    if len(labels) not in (1, count):
        raise UsageError(
            f"--labels gives {len(labels)} classes for {count} {of}s; give one for each {of}, or one for all"
        )
    return [*labels] * count if len(labels) == 1 else [*labels]


def quoted(text: str) -> str:
    """Return a word as a shell takes it; one with bytes that are no text, or control characters, as $'..' (bash)."""
    if text.isprintable():
        return shlex.quote(text)
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:  # no file has this name, but a document may say so
        data = text.encode("utf-8", "surrogatepass")
    escaped = re.sub(rb"[^A-Za-z0-9./_:@=+,-]", lambda found: b"\\x%02x" % found[0][0], data)
    return f"$'{escaped.decode('ascii')}'"


def parse_names(text: str, known: Sequence[str], option: str) -> list[str]:
    """Return the names in `text`, as in "fid,is", each once and in the order of `known`.

    "all" gives all names, "none" no name. `option`: its name in messages. Raises `UsageError` for an unknown name.
    """
    wanted = {name.strip() for name in text.split(",")}
    if wanted == {"all"}:
        return list(known)
    unknown = sorted(wanted.difference(known, ["none"]))
    if unknown:
        raise UsageError(f"--{option} takes {', '.join(known)}, all or none; got {', '.join(map(repr, unknown))}")
    return [name for name in known if name in wanted]
