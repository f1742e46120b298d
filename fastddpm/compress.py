"""python -m fastddpm.compress encode|decode: images to a small file by a trained model, and back."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastddpm.config import CodecOptions, EngineConfig
from fastddpm.errors import UsageError
from fastddpm.runtime import cli
from fastddpm.runtime.options import Checkpoint, Device, Resize, check_checkpoint, check_positive

if TYPE_CHECKING:
    import numpy as np

    from fastddpm.codec import Encoded
    from fastddpm.sampling.sampler import Sampler

PROGRAM = "fastddpm.compress"


@dataclass(frozen=True)
class Encode:
    """Code images: exactly, or with --lossy. The model that decodes must be the very same."""

    checkpoint: Checkpoint
    images: Annotated[str, tyro.conf.Positional]
    """An image, an .npz as the sample command writes it, whatever --data of training takes, or the word digits: those
    embedded (a folder of that name is ./digits)."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write."""
    count: int | None = None
    """Only the first images."""
    resize: Resize = "none"
    labels: bool = False
    """Code the images' classes, too, and the images given their class."""
    codec: Annotated[CodecOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CodecOptions)
    device: Device = "auto"
    engine: Annotated[EngineConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Decode:
    """Give back the images of a file that encode made, with the same model, on the same kind of machine."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The model that the images were coded with."""
    file: Annotated[Path, tyro.conf.Positional]
    """What encode wrote."""
    out: Annotated[Path, tyro.conf.Positional]
    """An .npz to write, or a directory for one PNG of each image."""
    device: Device = "auto"
    engine: Annotated[EngineConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Command:
    """Code images with a trained model's conditionals, at the price of its variational bound."""

    action: Annotated[
        Annotated[Encode, tyro.conf.subcommand("encode")] | Annotated[Decode, tyro.conf.subcommand("decode")],
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.OmitArgPrefixes,
    ]


def main(arguments: Sequence[str]) -> None:
    action = cli.parse(Command, arguments, program=PROGRAM).action
    check_checkpoint(action.checkpoint)
    if isinstance(action, Encode):
        _encode(action)
    else:
        _decode(action)


def _encode(action: Encode) -> None:
    check_positive(count=action.count)
    if action.out.is_dir():
        raise UsageError(f"{action.out} is a directory; name the file to write, such as {action.out / 'images.fdz'}")
    cli.check_out(action.out.parent)

    from fastddpm.codec import encode, file_format
    from fastddpm.runtime.progress import Meter

    sampler = _sampler(action)
    images, labels = _images(action, sampler)
    if action.labels and labels is None:
        raise UsageError(f"--labels: {action.images} has none")
    most = sampler.diffusion.timesteps - action.codec.last(sampler.diffusion.timesteps)
    steps = min(action.codec.steps or most, most)
    print(f"{len(images)} images, {steps} steps: {len(images) * steps:,} evaluations of the network", file=sys.stderr)
    with Meter("coding", len(images) * steps, "image steps") as meter:

        def progress(done: int) -> None:
            meter.update(done, lambda rate: f"{rate / steps:.2f} images/s")

        coded = encode(sampler, images, labels if action.labels else None, action.codec, progress=progress)
    file_format.write(coded.data, action.out)
    print(_summary(coded, images, action.out))


def _decode(action: Decode) -> None:
    from fastddpm.codec import decode, file_format
    from fastddpm.codec.file_format import Header
    from fastddpm.runtime.progress import Meter
    from fastddpm.sampling.images import grid, save_png
    from fastddpm.storage.files import save_arrays

    arrays = action.out.suffix == ".npz"
    cli.check_out(action.out.parent if arrays else action.out)
    data = file_format.read(action.file)
    header = Header.of(file_format.unpack(data, action.file)[0], str(action.file))
    sampler = _sampler(action)
    steps = len(header.timesteps)
    with Meter("decoding", header.num_images * steps, "image steps") as meter:

        def progress(done: int) -> None:
            meter.update(done, lambda rate: f"{rate / steps:.2f} images/s")

        decoded = decode(sampler, data, str(action.file), progress=progress)
    if arrays:
        action.out.parent.mkdir(parents=True, exist_ok=True)
        labels = {} if decoded.labels is None else {"labels": decoded.labels}
        save_arrays({"images": decoded.images, **labels}, action.out)
    else:
        action.out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(decoded.images):
            save_png(grid(image[None], padding=0, scale=1), action.out / f"{i:010d}.png")
    print(f"{action.out}: {len(decoded.images)} images")


def _sampler(action: Encode | Decode) -> "Sampler":
    from fastddpm import pretrained
    from fastddpm.runtime.device import choose_device
    from fastddpm.sampling.sampler import Sampler

    model = pretrained.load(action.checkpoint, choose_device(action.device))
    return Sampler(model.unet, model.diffusion, engine=action.engine)


def _images(action: Encode, sampler: "Sampler") -> tuple["np.ndarray", "np.ndarray | None"]:
    """uint8 (N, C, H, W) and labels, if there are any."""
    import numpy as np

    from fastddpm.data.image import Preprocessing
    from fastddpm.data.inputs import read_images

    config = sampler.unet.config
    images, labels = read_images(action.images, Preprocessing(config.image_size, config.image_channels, action.resize))
    count = len(images) if action.count is None else action.count
    return np.ascontiguousarray(images[:count]), None if labels is None else labels[:count]


def _summary(coded: "Encoded", images: "np.ndarray", out: Path) -> str:
    import numpy as np

    dims = coded.dimensions
    lines = [
        f"{out}: {len(images)} images, {len(coded.data):,} bytes, {coded.gross_bits_per_dim:.3f} bits/dim",
        f"  of these {coded.bits_per_dim:.3f} for the images, {coded.initial / dims:.3f} to begin with, "
        f"{coded.overhead / dims:.3f} for the header",
    ]
    if coded.header.levels < 256:
        error = np.sqrt(np.square(coded.images.astype(np.float64) - images).mean())
        lines.append(f"  {coded.header.levels} levels of a pixel; root mean squared error {error:.2f} of 255")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
