"""python -m fastddpm.curves RUN [RUN ...]: plot loss, gradient norm and loss by timestep of runs in one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastddpm.errors import UsageError
from fastddpm.presets import read_preset
from fastddpm.runtime import cli
from fastddpm.runtime.progress import announced, log
from fastddpm.storage.files import check_out

PROGRAM = "fastddpm.curves"


@dataclass(frozen=True)
class Command:
    """Plot the loss, gradient norm and loss by timestep of one run, or of several in the same panels."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, of finished runs or of runs that are still training."""
    out: Path | None = None
    """The PNG file to write. Default: curves.png in the first run directory."""


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    command = cli.parse(Command, arguments, program=PROGRAM)
    if not command.runs:
        raise UsageError("no run given; name one or more run directories")
    out = command.out or command.runs[0] / "curves.png"
    for run in command.runs:
        if not (run / "log.jsonl").is_file():
            raise UsageError(f"{run} is not a run directory: it has no log.jsonl")
    try:
        with announced("loading matplotlib"):
            from fastddpm.training.plots import Curve, curves
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UsageError("curves need matplotlib: pip install 'fastddpm[report]'") from None
    from fastddpm.training.environment import changes
    from fastddpm.training.run_log import read_log

    logs = {}
    for name, run in zip(_names(command.runs), command.runs, strict=True):
        records = read_log(run / "log.jsonl")
        if not records:
            log(f"{run} has no line in its log yet")
            continue
        logs[name] = Curve(records, read_preset(run / "config.json").diffusion.timesteps, changes(run))
    if not logs:
        raise UsageError("nothing to draw: no run has a line in its log")
    check_out(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with announced("drawing the curves"):
        curves(logs, out)
    print(out)


def _names(runs: Sequence[Path]) -> list[str]:
    """Return a name for each run: its directory's name if these all differ, otherwise its path."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [str(run) for run in runs]
    if len(set(paths)) < len(paths):
        raise UsageError("a run is named twice; name each one once")
    return paths


if __name__ == "__main__":
    cli.run(main)
