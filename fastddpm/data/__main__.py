"""python -m fastddpm.data: inspect a data set, verify it, or pack it into one file for training."""

import contextlib
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastddpm.errors import DataError, UsageError
from fastddpm.runtime import cli
from fastddpm.runtime.image_size import ImageSize, sides, size_text
from fastddpm.runtime.options import Background, Resize, SkipBad, quoted
from fastddpm.runtime.progress import counted, log
from fastddpm.storage.files import check_out

if TYPE_CHECKING:
    from .image import Preprocessing
    from .inspect import Findings
    from .pack.format import Pack

PROGRAM = "fastddpm.data"
_SHOWN = 12
_ANY_MEMORY = 2.0**40  # bytes


@dataclass(frozen=True)
class Inspect:
    """Count the images of a source: kinds, sizes, classes, equal images, bad images. Exits 3 if any image is bad."""

    source: Annotated[str, tyro.conf.Positional]
    """Any source that training takes as --data."""
    split: Literal["train", "test"] = "train"
    """Which split of the source. test is refused if the source has no splits and its name does not say test."""
    background: Background = "white"
    duplicates: bool = True
    """Look for images with equal pixels."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class Verify:
    """Read a whole source: every byte and pixel of a .fdpack, every image of other sources. Exits 3 if any is bad."""

    source: Annotated[str, tyro.conf.Positional]
    """Any source that training takes as --data."""
    split: Literal["train", "test"] = "train"
    """Which split of the source. test is refused if the source has no splits and its name does not say test."""
    image_size: Annotated[ImageSize | None, tyro.conf.arg(metavar="N [N]")] = None
    """Also check that the images suit a model of this height and width in pixels, one number if they are equal.
    Default: any size. Unused for a .fdpack, which has a size of its own."""
    image_channels: Literal[1, 3] = 3
    """With --image-size: channels of the model, 1 for grey or 3 for colour."""
    resize: Literal["none", "area", "lanczos"] = "none"
    """With --image-size: antialiasing filter that images of another size will be resized with. none counts them as
    bad."""
    background: Background = None


@dataclass(frozen=True)
class MakePack:
    """Write all images into one .fdpack, decoding each once to check it. Exits 3 if any is bad."""

    source: Annotated[str, tyro.conf.Positional]
    """Any source that training takes as --data."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write, NAME.fdpack."""
    image_size: Annotated[ImageSize, tyro.conf.arg(metavar="N [N]")]
    """Height and width of the model's images in pixels, one number if they are equal."""
    image_channels: Literal[1, 3] = 3
    """Channels of the model's images, 1 for grey or 3 for colour."""
    resize: Resize = "none"
    background: Background = None
    store: Literal["fitted", "original"] = "fitted"
    """fitted: images are resized now and stored without loss. original: files are stored unchanged and resized
    whenever they are read."""
    split: Literal["train", "test"] = "train"
    """Which split of the source. test is refused if the source has no splits and its name does not say test."""
    skip_bad: SkipBad = False
    overwrite: bool = False
    """Replace OUT if it exists, instead of refusing."""


COMMANDS: Any = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[MakePack, tyro.conf.subcommand("pack")]
)


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    command = cli.parse(COMMANDS, arguments, program=PROGRAM)
    if isinstance(command, Inspect):
        _inspect(command)
    elif isinstance(command, Verify):
        _verify(command)
    else:
        _pack(command)


def _inspect(command: Inspect) -> None:
    from .image import check_background
    from .inspect import scan
    from .pack.format import ENDING, open_pack
    from .sources import open_image_source

    check_background(command.background)
    image_source = open_image_source(command.source, command.split)
    pack = open_pack(Path(command.source)) if command.source.lower().endswith(ENDING) else None
    with _problem_list() as full_list:
        found = scan(
            image_source, background=command.background, duplicates=command.duplicates, full_list=full_list, report=log
        )
    if command.background is not None and found.converted:
        found.notes += (
            f"{found.converted:,} of them are good on a background only (transparent, CMYK, 32 bits and the like): "
            f"train with --background {command.background}, which --data without --preset takes by itself",
        )
    proposal = _proposal(command.source, found) if command.split == "train" else []
    if command.json:
        print(json.dumps({**vars(found), "pack": pack and _described(pack), "training": proposal}, indent=1))
    else:
        print("\n".join(_lines(found, pack)))
        if proposal:
            print("next: " + "\n  ".join(proposal))
    faults = [found.problems] if found.bad else []
    if found.mixture:
        faults.append(f"{found.source}: {found.mixture}")
    if faults:
        raise DataError("\n".join(faults))


def _verify(command: Verify) -> None:
    from .image import Preprocessing
    from .inspect import faults, scan
    from .pack.format import ENDING, open_pack
    from .sources import open_image_source

    with _problem_list() as full_list:
        if command.source.lower().endswith(ENDING) and Path(command.source).is_file():
            pack = open_pack(Path(command.source))
            messages = faults(pack, full_list=full_list, report=log)
            summary = f"{len(pack):,} images, {_preprocessing_text(pack)}, sha256 of the pixels {pack.checksum}"
        else:
            preprocessing = None
            if command.image_size is not None:
                preprocessing = Preprocessing(
                    _size(command.image_size), command.image_channels, command.resize, command.background
                )
            image_source = open_image_source(command.source, command.split)
            found = scan(image_source, preprocessing=preprocessing, duplicates=False, full_list=full_list, report=log)
            messages = [text for text in (found.problems, found.mixture) if text]
            summary = f"{found.good:,} images" + (
                f", fit for {size_text(preprocessing.image_size)}" if preprocessing else ""
            )
    if messages:
        raise DataError("\n".join(messages))
    print(f"{command.source}: whole; {summary}")


def _pack(command: MakePack) -> None:
    from .image import Preprocessing
    from .pack.format import ENDING
    from .pack.writer import write_pack
    from .sources import open_image_source

    if command.out.suffix.lower() != ENDING:
        raise UsageError(f"the file to write must end in {ENDING}; got {command.out}")
    if command.out.exists() and not command.overwrite:
        raise UsageError(f"{command.out} exists; --overwrite replaces it")
    if not command.out.parent.is_dir():
        raise UsageError(f"there is no folder {command.out.parent}; make it first")
    check_out(command.out.parent)
    preprocessing = Preprocessing(_size(command.image_size), command.image_channels, command.resize, command.background)
    image_source = open_image_source(command.source, command.split)
    for note in image_source.notes:
        log(note)
    pack = write_pack(
        image_source, command.out, preprocessing, store=command.store, skip_bad=command.skip_bad, report=log
    )
    size = command.out.stat().st_size
    print(f"{command.out}: {len(pack):,} images, {_preprocessing_text(pack)}, {size:,} bytes")
    print(f"sha256 of the pixels {pack.checksum}")
    print(f"next: python -m fastddpm.train {_training_options(pack.preprocessing, command.out)}")


def _training_options(preprocessing: "Preprocessing", pack: Path) -> str:
    """Return options for training on the pack, based on the paper's preset for images of about that size."""
    from fastddpm.presets import PRESETS

    base = PRESETS["cifar10" if max(sides(preprocessing.image_size)) < 256 else "lsun256"]
    options = f"--preset {base.name} --data {quoted(str(pack))}"
    if preprocessing.image_size != base.unet.image_size:
        size = preprocessing.image_size
        options += f" --image-size {size if isinstance(size, int) else ' '.join(map(str, size))}"
    return (
        options
        if preprocessing.channels == base.unet.image_channels
        else f"{options} --image-channels {preprocessing.channels}"
    )


def _proposal(source: str, found: "Findings") -> list[str]:
    """Return the command that trains on a source, and what it will choose on a CPU; or why it cannot be trained on.

    `found`: all images of the source; what training will choose depends on a survey of their headers.
    """
    from fastddpm.training.from_data import MOST_BAD, Given, Machine, choose, look

    if not found.good:
        return ["nothing can be trained on, as no image is good"]
    if found.mixture:
        return ["nothing can be trained on, before images of 32 bits have one range"]
    surveyed, packed = look(source)
    try:
        chosen = choose(surveyed, Machine("cpu", _ANY_MEMORY), Given(), source=source, packed=packed)
    except DataError as error:
        return [str(error)]
    heading = "chosen on a CPU; a GPU takes a larger network, and --dry-run tells what this machine does:"
    path = f"./{source}" if source.startswith("-") else source
    skip = " --skip-bad" if found.bad > MOST_BAD * (found.good + found.bad) else ""
    return [f"python -m fastddpm.train --data {quoted(path)}{skip}", heading, *chosen.lines]


def _size(image_size: ImageSize) -> ImageSize:
    """Return `image_size`, or raise UsageError if it is out of range."""
    from .pack.format import MAX_SIZE

    if not all(1 <= side <= MAX_SIZE for side in sides(image_size)):
        raise UsageError(f"--image-size must be in 1..{MAX_SIZE}; got {image_size}")
    return image_size


def _lines(found: "Findings", pack: "Pack | None") -> list[str]:
    """Format the findings as text."""
    names = found.class_names[:_SHOWN] + ([".."] if len(found.class_names) > _SHOWN else [])
    lines = [
        f"{found.source}: {counted(found.images, 'images')}, {found.good:,} of them good, {found.bad:,} bad",
        f"kinds      {_counts(found.kinds)}",
        f"sizes      {_counts(found.sizes)}; shorter side {found.smallest} to {found.largest}",
        f"bytes      {found.encoded_bytes:,} encoded",
        f"classes    {len(found.classes) or 'none'}"
        + (f", {min(found.classes.values()):,} to {max(found.classes.values()):,} images each" if found.classes else "")
        + (f": {', '.join(map(_safe, names))}" if names else ""),
    ]
    if found.duplicates is not None:
        lines.append(f"duplicates {found.duplicates:,} images equal an earlier one in every pixel")
        lines += [f"  {_safe(later)} = {_safe(first)}" for first, later in found.equal]
        if found.duplicates > len(found.equal):
            lines.append(f"  and {found.duplicates - len(found.equal):,} more")
    if pack is not None:
        lines += [f"packed     {name}: {_safe(str(value))}" for name, value in _described(pack).items()]
    return [*lines, *(f"note       {note}" for note in found.notes)]


def _described(pack: "Pack") -> dict[str, Any]:
    """Return how the pack was made, under the names of its description in the file."""
    names = ("source", "store", "decoder", "left_out", "checksum", "sha256")
    return {"rule": dataclasses.asdict(pack.preprocessing)} | {name: getattr(pack, name) for name in names}


def _preprocessing_text(pack: "Pack") -> str:
    preprocessing = pack.preprocessing
    resize = "" if preprocessing.resize == "none" else f", resized by {preprocessing.resize}"
    return f"{size_text(preprocessing.image_size)}x{preprocessing.channels}{resize}, stored {pack.store}"


def _counts(counts: Counter[str]) -> str:
    """Format the 12 largest counts."""
    shown = ", ".join(f"{count:,} {name}" for name, count in counts.most_common(_SHOWN)) or "none"
    return shown + (f", and {len(counts) - _SHOWN:,} others" if len(counts) > _SHOWN else "")


def _safe(text: str) -> str:
    """Escape text from a file if it has unprintable characters, since it may go to a terminal."""
    return text if text.isprintable() else repr(text)


@contextlib.contextmanager
def _problem_list() -> Iterator[Path]:
    """Provide the path of a file that may list bad images; if it was written it stays, because a message names it."""
    folder = Path(tempfile.mkdtemp(prefix="fastddpm-data-"))
    try:
        yield folder / "problems.txt"
    finally:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


if __name__ == "__main__":
    cli.run(main)
