"""python -m fastddpm.sample CHECKPOINT: draw images from a trained model."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastddpm.errors import all_problems, problem, refuse
from fastddpm.runtime import cli, distributed
from fastddpm.runtime.options import (
    BatchSize,
    Checkpoint,
    Device,
    check_checkpoint,
    check_positive,
    one_or_each,
    parse_numbers,
)
from fastddpm.runtime.progress import announced, counted, discard, log
from fastddpm.sampling.options import ChainOptions
from fastddpm.storage.files import check_out

if TYPE_CHECKING:
    from fastddpm.sampling.sampler import Sampler
    from fastddpm.storage.shards import Shards

PROGRAM = "fastddpm.sample"
COMMON = (  # what --help shows; --help-all shows the rest
    "seeds", "labels", "method", "steps", "guidance", "classifier", "classifier_scale", "batch", "out", "png", "gif",
    "device",
)  # fmt: skip
MOST_IN_ONE_FILE = 1024
SHARD_SIZE = 1000


@dataclass(frozen=True)
class Command:
    """Draw images from a checkpoint. An image depends on its seed and these options, but not on --batch."""

    checkpoint: Checkpoint
    seeds: str = "0-63"
    """One image is drawn for each seed. Numbers and ranges, as in 0-63 or 1,5,10-19; each in 0..4294967295."""
    labels: str | None = None
    """Class of each seed, written as --seeds, or one class for all. Default: seed modulo the number of classes."""
    chain: Annotated[ChainOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ChainOptions)
    batch: BatchSize = None
    shard_size: int | None = None
    """Images in each shard-NNNNN.npz. Default: up to 1,024 images are one samples.npz, more are shards of 1,000."""
    out: Path | None = None
    """Directory for the images. Default: samples-FIRST-LAST in the run directory, named by the first and last seed."""
    png: bool = False
    """Also write one PNG for each image, named by its seed."""
    animation: Literal["none", "webp", "gif"] = "none"
    """Also write an animation, denoising.webp of at most 1 MB or denoising.gif of at most 2 MB: x_t beside the x_0
    prediction, of up to 64 images of the first batch. Not available with shards."""
    gif: bool = False
    """The same as --animation gif."""
    npz: Literal["own", "adm"] = "own"
    """Layout of the arrays. own: images uint8 (N, C, H, W), seeds and labels. adm: also adm.npz with arr_0, uint8
    (N, H, W, 3), which the evaluators of ADM and other tools for FID read. With several processes run the command once
    more when all have finished."""
    device: Device = "auto"


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    group = distributed.group_from_environment()
    with all_problems():
        command = cli.parse(Command, arguments, program=PROGRAM, common=COMMON)
        check_positive(batch=command.batch, shard_size=command.shard_size)
        with problem():
            check_checkpoint(command.checkpoint)
        seeds, labels = _seeds_and_labels(command)
        sharded = command.shard_size is not None or len(seeds) > MOST_IN_ONE_FILE or group.world_size > 1
        animation = _animation(command, sharded=sharded)
    out = command.out or cli.run_of(command.checkpoint) / f"samples-{seeds[0]}-{seeds[-1]}"
    check_out(out)

    report = log if group.is_main else discard
    with announced("loading PyTorch", report):
        from fastddpm.runtime.device import choose_device
        from fastddpm.sampling.adm import FILE as ADM_FILE
        from fastddpm.sampling.adm import write_adm
        from fastddpm.sampling.generate import FrameRecorder, sample_batches, save_pictures, save_png_of_each
        from fastddpm.sampling.seeds import seeds_and_labels_fit
        from fastddpm.training.length import report_notes

    device = choose_device(command.device, distributed.local_rank())
    with announced(f"reading {command.checkpoint}", report):
        fit = functools.partial(seeds_and_labels_fit, seeds, labels, any_label=command.chain.classifier is not None)
        model, sampler, batch = command.chain.open(command.checkpoint, device, command.batch, report, check=fit)
    classes = sampler.labels_for(seeds, labels)
    report_notes(model, report)
    extras = "".join(f", {name.replace('_', ' ')} {value}" for name, value in sampler.guide.settings().items())
    report(
        f"{counted(len(seeds), 'images')}, {sampler.method}, {counted(sampler.steps, 'steps')}, guidance "
        f"{sampler.guidance}{extras}, on {device}"
    )
    if sharded:
        _sample_shards(command, sampler, seeds, classes, out, batch, group)
        return
    recorder = FrameRecorder(sampler, min(batch, len(seeds))) if animation is not None else None
    parts = []
    for drawn in sample_batches(sampler, seeds, classes, batch=batch, recorder=recorder):
        parts.append(drawn.images)
        if command.png:
            save_png_of_each(drawn, out)
    frames = recorder.frames if recorder is not None else []
    import numpy as np

    images = np.concatenate(parts)
    for path in save_pictures(images, seeds, classes, frames, out, animation or ".gif"):
        print(path)
    if command.npz == "adm":
        write_adm([images], len(images), classes, out / ADM_FILE)
        print(out / ADM_FILE)


def _sample_shards(
    command: Command,
    sampler: "Sampler",
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    out: Path,
    batch: int,
    group: distributed.ProcessGroup,
) -> None:
    """Draw the shards of this process that `out` lacks."""
    from fastddpm.sampling.generate import fill, save_first_grid, save_png_of_shard
    from fastddpm.storage.shards import Shards

    rank, count = group.rank, group.world_size
    size = command.shard_size or SHARD_SIZE
    report = log if group.is_main else discard
    shards = Shards(out, seeds, labels, size, sampler.interface.shape)
    with announced(f"checking the settings of {out}", report):
        shards.claim(sampler.settings())
    with shards.locked(rank):
        with announced(f"checking the shards in {out}", report):
            missing, damaged = shards.missing(rank, count)
        for line in damaged:
            log(line)
        own = range(rank, len(shards), count)
        mine = len(own)
        if len(missing) < mine:
            log(f"{mine - len(missing)} of {mine} shards are there already")
        for index in sorted({*own}.difference(missing)) if command.png else ():
            save_png_of_shard(shards, index)
        rate = fill(shards, missing, sampler, batch, png=command.png)
        if rank == 0:
            print(save_first_grid(shards))
            if command.npz == "adm":
                _write_adm_of(shards)
        drawn = f", {rate:.2f} images/s" if missing else ""
        print(f"{out}: {counted(mine, 'shards')} of {counted(size, 'images')}{drawn}")


def _write_adm_of(shards: "Shards") -> None:
    """Write the images of all shards as adm.npz, if all are there."""
    from fastddpm.sampling.adm import FILE, write_adm

    missing, _ = shards.missing(0, 1)
    path = shards.directory / FILE
    if missing:
        log(f"{path} is not written yet: {len(missing)} shards of other processes are missing; run the command again")
        return
    write_adm(map(shards.read, range(len(shards))), len(shards.seeds), shards.labels, path)
    print(path)


def _animation(command: Command, *, sharded: bool) -> str | None:
    """Return the suffix of the animation, None for no animation. Raises `UsageError` if it cannot be written."""
    suffix = ".gif" if command.gif else {"none": None, "webp": ".webp", "gif": ".gif"}[command.animation]
    if command.gif and command.animation == "webp":
        refuse(["--gif and --animation webp exclude each other; give one of them"])
    elif command.animation == "webp":
        from PIL import features

        if not features.check("webp"):
            refuse(["this installation of Pillow writes no WebP; use --animation gif"])
    if sharded and suffix is not None:
        option = "--gif" if command.gif else "--animation"
        refuse(
            [
                f"{option} is for up to {MOST_IN_ONE_FILE:,} images in one file, drawn by one process: leave it out, "
                "or draw fewer seeds without --shard-size"
            ]
        )
    return suffix


def _seeds_and_labels(command: Command) -> tuple[list[int], list[int] | None]:
    """Return the seeds and the class of each, None for the default ones. Raises `UsageError` for unfit numbers."""
    seeds: list[int] = []
    labels = None
    with problem():
        seeds = parse_numbers(command.seeds, "seeds")
    with problem():
        labels = None if command.labels is None else parse_numbers(command.labels, "labels")
    if labels is None or not seeds:
        return seeds, labels
    with problem():
        labels = one_or_each(labels, len(seeds), "seed")
    return seeds, labels


if __name__ == "__main__":
    cli.run(main)
