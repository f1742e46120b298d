"""python -m fastddpm.inpaint CHECKPOINT: draw the missing part of images."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from fastddpm.errors import UsageError
from fastddpm.runtime import cli
from fastddpm.runtime.options import (
    BatchSize,
    Checkpoint,
    Device,
    Resize,
    check_checkpoint,
    check_positive,
    parse_numbers,
)
from fastddpm.sampling.options import ChainOptions

if TYPE_CHECKING:
    from fastddpm.sampling.inpainting import Inpainted
    from fastddpm.sampling.sampler import Sampler

PROGRAM = "fastddpm.inpaint"
MAX_FRAMES = 1000  # all of them are in memory until the file is written
_GREY = 128  # of what is not known


@dataclass(frozen=True)
class Command:
    """Draw the missing part of images (RePaint). What is known stays as it is, to the bit."""

    checkpoint: Checkpoint
    images: str = "digits"
    """An image, an .npz as the sample command writes it, whatever --data of training takes, or digits: those
    embedded (a folder of that name is ./digits)."""
    pick: str | None = None
    """Which of the images, as in 0-7 or 1,5,10-19; eight of them, evenly spread, unless given."""
    mask: str = "left-half"
    """What is to be drawn: left-half, right-half, top-half, bottom-half, center, every-other-row, or an image file in
    which it is white (128 and above)."""
    seeds: str = "0-3"
    """A completion of each image for each seed: numbers and ranges, each in 0..4294967295."""
    labels: str | None = None
    """Classes: one for each image picked, or one for all. Without it: the images' own, or no class."""
    resize: Resize = "none"
    resamplings: int = 10
    """How often each stretch of the chain is taken; 1 is fastest and fits least."""
    jump_length: int = 10
    """Steps of a stretch."""
    chain: Annotated[ChainOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ChainOptions)
    batch: BatchSize = None
    frames: int = 40
    """Frames of the animation; 0 for none."""
    out: Path | None = None
    """Directory for the pictures. Without it, inpainting in the run's directory."""
    device: Device = "auto"


def main(arguments: Sequence[str]) -> None:
    command = cli.parse(Command, arguments, program=PROGRAM)
    seeds = parse_numbers(command.seeds, "seeds")
    check_positive(batch=command.batch)
    if not 0 <= command.frames <= MAX_FRAMES:
        raise UsageError(f"--frames must be in 0..{MAX_FRAMES}; got {command.frames}")
    check_checkpoint(command.checkpoint)
    out = command.out or cli.run_of(command.checkpoint) / "inpainting"
    cli.check_out(out)

    from fastddpm.runtime.device import choose_device

    _, sampler, batch = command.chain.open(command.checkpoint, choose_device(command.device), command.batch)
    for path in _complete(command, sampler, seeds, batch, out):
        print(path)


def _complete(command: Command, sampler: "Sampler", seeds: list[int], batch: int, out: Path) -> list[Path]:
    """Read, draw, write; the paths of the files."""
    from fastddpm.data.image import Preprocessing
    from fastddpm.data.inputs import read_hole, read_images
    from fastddpm.runtime.progress import Meter
    from fastddpm.sampling.inpainting import cost, inpaint

    preprocessing = Preprocessing(sampler.unet.config.image_size, sampler.unet.config.image_channels, command.resize)
    known = ~read_hole(command.mask, preprocessing)
    everything, classes = read_images(command.images, preprocessing)
    pick = _pick(command.pick, len(everything))
    given = everything[pick]
    labels = _labels(command.labels, None if classes is None else classes[pick].tolist(), len(given), sampler)
    total = cost(sampler, known, len(given) * len(seeds), command.jump_length, command.resamplings)
    print(
        f"{len(given)} images, {len(seeds)} completions of each, {sampler.steps} steps, "
        f"{total:,} evaluations of the network",
        file=sys.stderr,
    )
    with Meter("inpainting", total, "evaluations") as meter:
        found = inpaint(
            sampler, given.repeat(len(seeds), axis=0), known, seeds * len(given),
            None if labels is None else [label for label in labels for _ in seeds],
            jump_length=command.jump_length, resamplings=command.resamplings, frames=command.frames, batch=batch,
            progress=lambda more: meter.update(meter.done + more),
        )  # fmt: skip
    return _save(found, given, known, seeds, labels, out)


def _pick(text: str | None, count: int) -> list[int]:
    """Which of `count` images: those of `text`, or eight evenly spread."""
    if text is None:
        return np.unique(np.linspace(0, count - 1, 8).round().astype(int)).tolist()
    pick = parse_numbers(text, "pick")
    if max(pick) >= count:
        raise UsageError(f"--pick: there are images 0..{count - 1}; got {max(pick)}")
    return pick


def _labels(text: str | None, own: list[int] | None, count: int, sampler: "Sampler") -> list[int] | None:
    """A class for each image where the network wants one: those of `text`, or the images' own, or none at all."""
    if text is not None:
        labels = parse_numbers(text, "labels")
        if len(labels) not in (1, count):
            raise UsageError(f"--labels gives {len(labels)} classes for {count} images; give one for each, or for all")
        return labels * count if len(labels) == 1 else labels
    if not sampler.unet.config.num_classes:
        return None
    if own is not None:
        return own
    if sampler.unet.null_label is None:
        raise UsageError("this network wants a class for every image, and these have none: give --labels")
    return [sampler.unet.null_label] * count


def _save(
    found: "Inpainted", given: np.ndarray, known: np.ndarray, seeds: list[int], labels: list[int] | None, out: Path
) -> list[Path]:
    """A row an image: what is known of it, then a completion for each seed."""
    from fastddpm.evaluation.figures.layout import Panel, save_frames, save_panels
    from fastddpm.storage.files import save_arrays

    out.mkdir(parents=True, exist_ok=True)
    rows, columns = len(given), len(seeds)
    shown = np.where(known, given, np.uint8(_GREY))
    images = found.images.reshape(rows, columns, *given.shape[1:])
    blocks = [Panel(shown[:, None], ["known"]), Panel(images, [str(seed) for seed in seeds])]
    arrays = {"images": images, "given": given, "known": known, "seeds": np.array(seeds)}
    if labels is not None:
        arrays["labels"] = np.array(labels)
    save_arrays(arrays, out / "inpainted.npz")
    paths = [save_panels(blocks, out / "inpainted.png"), out / "inpainted.npz"]
    if found.x0.shape[1]:
        moments = found.x0.reshape(rows, columns, *found.x0.shape[1:])
        frames = [np.concatenate([shown[:, None], moments[:, :, i]], axis=1) for i in range(moments.shape[2])]
        paths.append(save_frames([f.reshape(-1, *given.shape[1:]) for f in frames], out / "inpainted.gif", columns + 1))
    return paths


if __name__ == "__main__":
    cli.run(main)
