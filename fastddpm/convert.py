"""python -m fastddpm.convert SOURCE OUT: another implementation's checkpoint as a file that every command takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastddpm.errors import UsageError, all_problems, problem, refuse
from fastddpm.runtime import cli
from fastddpm.runtime.progress import announced
from fastddpm.storage.documents import read_object
from fastddpm.storage.files import check_out

PROGRAM = "fastddpm.convert"


@dataclass(frozen=True)
class Command:
    """Convert a DDPM that another implementation trained into one file, which every command takes as CHECKPOINT.

    Formats: diffusers, the paper's own (TensorFlow), pesser, tqch, w86763777, OpenAI's improved- and guided-diffusion
    (docs/import.md). No other framework is needed. A pickle is read in a process of its own, within limits, and only
    tensors of it.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """File or directory to convert; of a TensorFlow checkpoint its directory or its prefix, as model.ckpt-790000."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The .safetensors file to write."""
    like: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """What SOURCE is: a published model, as openai/256x256_diffusion_uncond, or a format, as guided-diffusion. Default:
    the format that the tensors' names tell."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """JSON object with fields of the network (UNetConfig) and the process (DiffusionConfig) that the tensors do not
    tell, as {"image_size": 64, "heads": 4}. They hold before those of --like. Default: none."""
    weights: Literal["average", "raw"] | None = None
    """Averaged (EMA) or raw weights. Default: averaged, if SOURCE has them."""


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    command = cli.parse(Command, arguments, program=PROGRAM)
    given: dict[str, Any] = {}
    with all_problems():
        if command.out.suffix != ".safetensors":
            refuse([f"name a .safetensors file to write; got {command.out}"])
        if command.out.exists():
            refuse([f"{command.out} exists; name another file, or remove it"])
        if command.config is not None:
            with problem():
                given = _given(command.config)
    check_out(command.out.parent)
    with announced("loading PyTorch"):
        from fastddpm.pretrained import foreign
    model = foreign.convert(command.source, command.out, like=command.like, given=given, weights=command.weights)
    print("\n".join(model))


def _given(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise UsageError(f"--config: there is no file {path}") from error


if __name__ == "__main__":
    cli.run(main)
