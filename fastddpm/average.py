"""python -m fastddpm.average RUN OUT --sigma-rel S: an average of a run's weights of any length, after the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastddpm.errors import all_problems, refuse
from fastddpm.runtime import cli
from fastddpm.runtime.checks import sigma_rel_problems
from fastddpm.runtime.options import check_positive
from fastddpm.runtime.progress import announced, log
from fastddpm.storage.files import check_out

PROGRAM = "fastddpm.average"
MOST_ERROR = 0.1  # of a profile, above which the average is not the one that was asked for


@dataclass(frozen=True)
class Command:
    """Make a power-function average of the weights, of any length, from the snapshots of a run (--ema-snapshots).

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The directory of a run that was trained with --ema-snapshots."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The directory to write, which every command then takes as CHECKPOINT."""
    sigma_rel: float
    """Length of the average, 0.001 to 0.28: the standard deviation of its weighting over the steps, as a fraction of
    the run. The mean of all steps has 0.2887."""
    step: int | None = None
    """Step at which the average is taken, as if the run had ended there. Default: the last snapshot's."""


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    with all_problems():
        command = cli.parse(Command, arguments, program=PROGRAM)
        refuse(sigma_rel_problems(command.sigma_rel, "--sigma-rel"))
        check_positive(step=command.step)
        if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
            refuse([f"{command.out} exists and is not empty; choose another directory"])
    check_out(command.out)
    with announced("loading PyTorch"):
        from fastddpm.training.snapshots import average
    with announced(f"averaging the snapshots of {command.run}"):
        averaged = average(command.run, command.sigma_rel, command.step)
    found = averaged.average
    if found.error > MOST_ERROR:
        log(
            f"note: the weighting of the steps is {found.error:.0%} from that of sigma_rel {found.sigma_rel:g}; a "
            "longer average, the step of a snapshot, or more snapshots in the next run come nearer"
        )
    averaged.save(command.out)
    print(
        f"{command.out}: average of sigma_rel {found.sigma_rel:g} at step {averaged.step:,}, of {found.combined} "
        f"stored averages; error of its weighting {found.error:.2g}"
    )


if __name__ == "__main__":
    cli.run(main)
