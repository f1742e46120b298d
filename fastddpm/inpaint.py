"""python -m fastddpm.inpaint CHECKPOINT: draw the missing part of images."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from fastddpm.errors import UsageError, all_problems, problem, refuse
from fastddpm.runtime import cli
from fastddpm.runtime.options import (
    BatchSize,
    Checkpoint,
    Device,
    Resize,
    check_checkpoint,
    check_positive,
    one_or_each,
    parse_numbers,
)
from fastddpm.runtime.progress import Meter, announced, log
from fastddpm.sampling.options import ChainOptions
from fastddpm.storage.files import check_out

if TYPE_CHECKING:
    from fastddpm.pretrained.model import Model
    from fastddpm.sampling.inpainting import Inpainted
    from fastddpm.sampling.sampler import Sampler

PROGRAM = "fastddpm.inpaint"
COMMON = (  # what --help shows; --help-all shows the rest
    "images", "pick", "mask", "seeds", "labels", "resize", "resamplings", "steps", "guidance", "out", "device",
)  # fmt: skip
MAX_FRAMES = 1000  # they are all in memory until the file is written
_GREY = 128  # the level in which unknown pixels are shown


@dataclass(frozen=True)
class Command:
    """Draw the missing part of images (RePaint). Known pixels stay exactly as they are."""

    checkpoint: Checkpoint
    images: str = "digits"
    """An image file, an .npz of the sample command, or a source that training takes as --data.
    digits: the embedded digits (a folder of that name is ./digits)."""
    pick: str | None = None
    """Indices of the images to complete, as in 0-7 or 1,5,10-19. Default: eight, evenly spread over all images."""
    mask: str = "left-half"
    """The part to draw: left-half, right-half, top-half, bottom-half, center, every-other-row,
    or an image file that is white (level 128 and above) there."""
    seeds: str = "0-3"
    """Each image is completed once for each seed. Numbers and ranges, as in 1,5,10-19; each in 0..4294967295."""
    labels: str | None = None
    """Class of each picked image, or one class for all. Default: the images' own labels, or no class without labels."""
    resize: Resize = "none"
    resamplings: int = 10
    """How often each stretch of the chain is taken. 1 is the fastest; more make the drawn part fit better."""
    jump_length: int = 10
    """Steps of a stretch of the chain."""
    chain: Annotated[ChainOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ChainOptions)
    batch: BatchSize = None
    frames: int = 40
    """Frames of the animation, 0..1000; fewer if it would be larger than 2 MB. 0: no animation."""
    out: Path | None = None
    """Directory for the pictures. Default: inpainting in the run directory."""
    device: Device = "auto"


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    seeds: list[int] = []
    with all_problems():
        command = cli.parse(Command, arguments, program=PROGRAM, common=COMMON)
        check_positive(batch=command.batch, jump_length=command.jump_length, resamplings=command.resamplings)
        if not 0 <= command.frames <= MAX_FRAMES:
            refuse([f"--frames must be in 0..{MAX_FRAMES}; got {command.frames}"])
        with problem():
            check_checkpoint(command.checkpoint)
        with problem():
            seeds = parse_numbers(command.seeds, "seeds")
        with problem():
            parse_numbers(command.pick or "0", "pick")
        with problem():
            parse_numbers(command.labels or "0", "labels")
    out = command.out or cli.run_of(command.checkpoint) / "inpainting"
    check_out(out)

    with announced("loading PyTorch"):
        from fastddpm.runtime.device import choose_device
        from fastddpm.sampling.seeds import seeds_and_labels_fit

    device = choose_device(command.device)
    labels = None if command.labels is None else parse_numbers(command.labels, "labels")
    with announced(f"reading {command.checkpoint}"):
        model, sampler, batch = command.chain.open(
            command.checkpoint, device, command.batch, multistep=False,
            check=functools.partial(
                seeds_and_labels_fit, seeds, labels, any_label=command.chain.classifier is not None
            ),
        )  # fmt: skip
    for path in _complete(command, model, sampler, seeds, batch, out):
        print(path)


def _complete(
    command: Command, model: "Model", sampler: "Sampler", seeds: list[int], batch: int, out: Path
) -> list[Path]:
    """Read the images, complete them and write the files; return their paths."""
    from fastddpm.data.image import Preprocessing
    from fastddpm.data.inputs import read_hole, read_images
    from fastddpm.sampling.inpainting import check_method, cost, inpaint
    from fastddpm.training.length import report_notes

    check_method(sampler)
    channels, height, width = sampler.interface.shape
    preprocessing = Preprocessing((height, width), channels, command.resize)
    known = ~read_hole(command.mask, preprocessing)
    everything, classes = read_images(command.images, preprocessing)
    labels: list[int] | None = None
    with all_problems():
        pick = _pick(command.pick, len(everything))
        if command.labels is not None:
            with problem():
                labels = one_or_each(parse_numbers(command.labels, "labels"), len(pick), "image")
    given = everything[pick]
    if labels is None:
        labels = _own_labels(None if classes is None else classes[pick].tolist(), len(given), sampler)
    report_notes(model, log)
    total = cost(sampler, known, len(given) * len(seeds), command.jump_length, command.resamplings)
    log(
        f"{len(given)} images, {len(seeds)} completions of each, {sampler.steps} steps, "
        f"{total:,} evaluations of the network"
    )
    with Meter("inpainting", total, "evaluations") as meter:
        inpainted = inpaint(
            sampler, given.repeat(len(seeds), axis=0), known, seeds * len(given),
            None if labels is None else [label for label in labels for _ in seeds],
            jump_length=command.jump_length, resamplings=command.resamplings, frames=command.frames, batch=batch,
            progress=lambda more: meter.update(meter.done + more),
        )  # fmt: skip
    return _save(inpainted, given, known, seeds, labels, out)


def _pick(text: str | None, count: int) -> list[int]:
    """Return the indices in `text`, each below `count`. None: eight of them, evenly spread."""
    if text is None:
        return np.unique(np.linspace(0, count - 1, 8).round().astype(int)).tolist()
    pick = parse_numbers(text, "pick")
    refuse([f"--pick takes indices of images, 0..{count - 1}; got {max(pick)}"] if max(pick) >= count else [])
    return pick


def _own_labels(own: list[int] | None, count: int, sampler: "Sampler") -> list[int] | None:
    """Return a class for each image where none are given: its `own`, otherwise the network's null label.

    None if the network takes none.
    """
    if not sampler.interface.num_classes:
        return None
    if own is not None:
        return own
    if sampler.interface.null_label is None:
        raise UsageError("this network needs a class for every image, and these images have none; give --labels")
    return [sampler.interface.null_label] * count


def _save(
    inpainted: "Inpainted", given: np.ndarray, known: np.ndarray, seeds: list[int], labels: list[int] | None, out: Path
) -> list[Path]:
    """Write the picture, the arrays and, given frames, the animation; return their paths.

    The picture has a row for each image: its known pixels, then a completion for each seed.
    """
    from fastddpm.evaluation.figures.layout import Panel, save_frames, save_panels
    from fastddpm.storage.files import save_arrays

    out.mkdir(parents=True, exist_ok=True)
    rows, columns = len(given), len(seeds)
    shown = np.where(known, given, np.uint8(_GREY))
    images = inpainted.images.reshape(rows, columns, *given.shape[1:])
    blocks = [Panel(shown[:, None], ["known"]), Panel(images, [str(seed) for seed in seeds])]
    arrays = {"images": images, "given": given, "known": known, "seeds": np.array(seeds)}
    if labels is not None:
        arrays["labels"] = np.array(labels)
    save_arrays(arrays, out / "inpainted.npz")
    paths = [save_panels(blocks, out / "inpainted.png"), out / "inpainted.npz"]
    if inpainted.x0.shape[1]:
        x0 = inpainted.x0.reshape(rows, columns, *inpainted.x0.shape[1:])
        frames = [np.concatenate([shown[:, None], x0[:, :, i]], axis=1) for i in range(x0.shape[2])]
        paths.append(save_frames([f.reshape(-1, *given.shape[1:]) for f in frames], out / "inpainted.gif", columns + 1))
    return paths


if __name__ == "__main__":
    cli.run(main)
