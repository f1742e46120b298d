"""python -m fastddpm.compress encode|decode: compress images with a trained model, and decompress them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastddpm.config import CodecOptions, EngineConfig
from fastddpm.errors import UsageError, all_problems, problem, refuse
from fastddpm.runtime import cli
from fastddpm.runtime.options import Checkpoint, Device, Resize, check_checkpoint, check_positive
from fastddpm.runtime.progress import Meter, announced, counted, log
from fastddpm.storage.files import check_out

if TYPE_CHECKING:
    import numpy as np

    from fastddpm.codec import Encoded
    from fastddpm.pretrained.model import Model
    from fastddpm.sampling.sampler import Sampler

PROGRAM = "fastddpm.compress"


@dataclass(frozen=True)
class Encode:
    """Compress images, without loss or with --lossy. Decoding needs exactly the same model."""

    checkpoint: Checkpoint
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """An image file, an .npz of the sample command, or a source that training takes as --data.
    digits: the embedded digits (a folder of that name is ./digits)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The file to write, for example images.fdz."""
    count: int | None = None
    """Number of images to compress, the first ones. Default: all."""
    resize: Resize = "none"
    labels: bool = False
    """Store the classes too, and condition the model on them. For a model and images with classes."""
    codec: Annotated[CodecOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CodecOptions)
    device: Device = "auto"
    engine: Annotated[EngineConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Decode:
    """Decompress the images of a file that encode wrote, with the same model and on the same kind of machine."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The model that the file was encoded with, named as for encode."""
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The file that encode wrote."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """An .npz file to write, or a directory for one PNG per image."""
    device: Device = "auto"
    engine: Annotated[EngineConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Command:
    """Compress images with a trained model, to about as many bits as its variational bound, and decompress them."""

    action: Annotated[
        Annotated[Encode, tyro.conf.subcommand("encode")] | Annotated[Decode, tyro.conf.subcommand("decode")],
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.OmitArgPrefixes,
    ]


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    with all_problems():
        action = cli.parse(Command, arguments, program=PROGRAM).action
        with problem():
            check_checkpoint(action.checkpoint)
        if isinstance(action, Encode):
            check_positive(count=action.count)
            if action.out.is_dir():
                refuse([f"{action.out} is a directory; name the file to write, such as {action.out / 'images.fdz'}"])
    if isinstance(action, Encode):
        _encode(action)
    else:
        _decode(action)


def _encode(action: Encode) -> None:
    check_out(action.out.parent)

    with announced("loading PyTorch"):
        from fastddpm.codec import encode, file_format
        from fastddpm.training.length import report_notes

    model = _model(action)
    sampler = _sampler(action, model)
    images, labels = _images(action, sampler)
    if action.labels and labels is None:
        raise UsageError(f"--labels needs images with classes; {action.images} has none")
    most = sampler.diffusion.timesteps - action.codec.last(sampler.diffusion.timesteps)
    steps = min(action.codec.steps or most, most)
    report_notes(model, log)
    log(
        f"{counted(len(images), 'images')}, {counted(steps, 'steps')}: "
        f"{counted(len(images) * steps, 'evaluations')} of the network"
    )
    with Meter("coding", len(images) * steps, "image steps") as meter:

        def progress(done: int) -> None:
            meter.update(done, lambda rate: f"{rate / steps:.2f} images/s")

        coded = encode(sampler, images, labels if action.labels else None, action.codec, progress=progress)
    file_format.write(coded.data, action.out)
    print(_summary(coded, images, action.out))


def _decode(action: Decode) -> None:
    arrays = action.out.suffix == ".npz"
    check_out(action.out.parent if arrays else action.out)
    with announced("loading PyTorch"):
        from fastddpm.codec import decode, file_format
        from fastddpm.codec.file_format import Header
        from fastddpm.sampling.images import grid, save_png
        from fastddpm.storage.files import save_arrays
        from fastddpm.training.length import report_notes

    data = file_format.read(action.file)
    header = Header.of(file_format.unpack(data, action.file)[0], str(action.file))
    model = _model(action)
    sampler, steps = _sampler(action, model), len(header.timesteps)
    report_notes(model, log)
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
    print(f"{action.out}: {counted(len(decoded.images), 'images')}")


def _model(action: Encode | Decode) -> "Model":
    from fastddpm import pretrained
    from fastddpm.runtime.device import choose_device

    device = choose_device(action.device)
    with announced(f"reading {action.checkpoint}"):
        return pretrained.load(action.checkpoint, device)


def _sampler(action: Encode | Decode, model: "Model") -> "Sampler":
    from fastddpm.sampling.sampler import Sampler

    return Sampler(model.unet, model.diffusion, engine=action.engine)


def _images(action: Encode, sampler: "Sampler") -> tuple["np.ndarray", "np.ndarray | None"]:
    """Read the images to encode, uint8 (N, C, H, W), and their labels, int64 (N,) or None."""
    import numpy as np

    from fastddpm.data.image import Preprocessing
    from fastddpm.data.inputs import read_images

    channels, height, width = sampler.interface.shape
    images, labels = read_images(action.images, Preprocessing((height, width), channels, action.resize))
    count = len(images) if action.count is None else action.count
    return np.ascontiguousarray(images[:count]), None if labels is None else labels[:count]


def _summary(coded: "Encoded", images: "np.ndarray", out: Path) -> str:
    import numpy as np

    dims = coded.dimensions
    lines = [
        f"{out}: {counted(len(images), 'images')}, {len(coded.data):,} bytes, {coded.gross_bits_per_dim:.3f} bits/dim",
        f"  of these {coded.bits_per_dim:.3f} for the images, {coded.initial / dims:.3f} for the initial bits, "
        f"{coded.overhead / dims:.3f} for the header",
    ]
    if coded.header.levels < 256:
        error = np.sqrt(np.square(coded.images.astype(np.float64) - images).mean())
        lines.append(f"  {coded.header.levels} levels of a pixel; root mean squared error {error:.2f} of 255")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
