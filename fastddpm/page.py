"""python -m fastddpm.page RUN: write index.html of a run, to look at it in a browser."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastddpm.errors import UsageError
from fastddpm.runtime import cli
from fastddpm.runtime.progress import announced
from fastddpm.storage.files import check_out

PROGRAM = "fastddpm.page"


@dataclass(frozen=True)
class Command:
    """Write index.html of each run: data, curves, previews, samples and scores, on one page without a network.

    Training writes it, too, at each preview and at its end.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories: finished, stopped, or still training."""


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    command = cli.parse(Command, arguments, program=PROGRAM)
    if not command.runs:
        raise UsageError("no run given; name one or more run directories")
    for run in command.runs:
        if not run.is_dir():
            raise UsageError(f"there is no directory {run}; name a run directory")
        if not any((run / name).exists() for name in ("config.json", "log.jsonl", "checkpoints")):
            raise UsageError(f"{run} is not a run directory: it has no config.json, log.jsonl or checkpoints")
        check_out(run)
    with announced("loading PyTorch"):
        from fastddpm.training.page import write_page
    for run in command.runs:
        print(write_page(run))


if __name__ == "__main__":
    cli.run(main)
