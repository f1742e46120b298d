"""python -m fastddpm.pretrained RUN FILE: pack the model of a run into one file, as the built-in model was."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastddpm.errors import UsageError
from fastddpm.runtime import cli
from fastddpm.runtime.progress import announced
from fastddpm.storage.files import check_out

PROGRAM = "fastddpm.pretrained"


@dataclass(frozen=True)
class Command:
    """Pack the EMA weights of a run, as float16, into one file, which every command takes as CHECKPOINT."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run directory, or one of its checkpoints."""
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The .safetensors file to write."""
    steps: int | None = None
    """Steps of the chain that samples take by default. Default: the run's."""


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    command = cli.parse(Command, arguments, program=PROGRAM)
    if command.file.suffix != ".safetensors":
        raise UsageError(f"name a .safetensors file to write; got {command.file}")
    check_out(command.file.parent)
    command.file.parent.mkdir(parents=True, exist_ok=True)
    with announced("loading PyTorch"):
        from .compact import pack

    checksum = pack(command.run, command.file, steps=command.steps)
    print(f"{command.file}: {command.file.stat().st_size:,} bytes, sha256 {checksum}")


if __name__ == "__main__":
    cli.run(main)
