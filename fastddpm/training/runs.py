"""The directories of runs: the newest one and its checkpoint to resume, a free one for a new run. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastddpm.errors import DataError, UsageError
from fastddpm.presets import read_preset
from fastddpm.runtime import distributed
from fastddpm.runtime.progress import log

if TYPE_CHECKING:
    from fastddpm.storage import checkpoint


def newest_run(name: str | None) -> Path:
    """Return the run in runs/ whose last checkpoint is the newest, of the preset `name` if one is given.

    Raises `UsageError` if there is none.
    """
    runs = [path.parent for path in Path("runs").glob("*/config.json")]
    if name is not None:
        runs = [run for run in runs if _preset_name(run) == name]
    if not runs:
        what = "run" if name is None else f"run of preset {name}"
        raise UsageError(f"nothing to resume: no {what} in {Path('runs').resolve()}; name one with --out")
    return max(runs, key=_last_saved)


def _preset_name(run: Path) -> str | None:
    try:
        return read_preset(run / "config.json").name
    except (UsageError, DataError) as error:
        log(f"{run} is passed over: {error}")
        return None


def _last_saved(run: Path) -> float:
    """Return when the newest checkpoint of a run was written, or its configuration if it has none."""
    saved = [path.stat().st_mtime for path in (run / "checkpoints").glob("step-*")]
    return max(saved, default=(run / "config.json").stat().st_mtime)


def free_run(name: str) -> Path:
    """Return runs/NAME, or the first of runs/NAME-2, runs/NAME-3, .. that does not exist."""
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def newest_checkpoint(
    run: Path, group: distributed.ProcessGroup, report: Callable[[str], None]
) -> "checkpoint.Checkpoint | None":
    """Return the newest undamaged checkpoint, found and verified by rank 0 and read by each process; None if none."""
    from fastddpm.storage import checkpoint

    own: list[checkpoint.Checkpoint] = []

    def find() -> tuple[Path, list[str]] | None:
        saved = checkpoint.load_newest(run, report)
        if saved is None:
            return None
        own.append(saved)
        return saved.path, [*saved.tensors]

    found = distributed.on_main(find, group)
    if found is None or own:
        return own[0] if own else None
    return checkpoint.load(*found)
