"""Write index.html of a run."""

from collections.abc import Callable
from pathlib import Path

from fastddpm.runtime.progress import announced, log
from fastddpm.storage.files import write_text

from .render import render
from .summary import summarize

FILE = "index.html"


def write_page(run: Path, *, training: bool | None = None) -> Path:
    """Write `run`/index.html, one page that needs neither network nor script, and return its path.

    `training`: whether a process trains in `run`; None: look whether one holds its lock. Whatever is missing or damaged
    in the run is said on the page. The page has at most about 8 MB, whatever the length of the run. Raises
    `StorageError` if it cannot be written.
    """
    path = run / FILE
    write_text(path, render(summarize(run, training=training)))
    return path


def try_write_page(run: Path, *, training: bool | None = None, report: Callable[[str], None] = log) -> list[Path]:
    """Write the page as `write_page` does, and return its path in a list; after a failure, an empty one.

    A failure of any kind is a line to `report`, because a page must not stop the work that it shows.
    """
    try:
        with announced(f"writing {run / FILE}", report):
            return [write_page(run, training=training)]
    except Exception as error:
        report(f"{run / FILE} is not written: {str(error) or type(error).__name__}")
        return []
