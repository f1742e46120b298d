"""A progress bar on the terminal, drawn by rich."""

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class Bar(Progress):
    """One progress bar on a console, with a note on the line below. Not shown before `start`."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        super().__init__(
            TextColumn(title), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(), TextColumn("left"), console=console,
        )  # fmt: skip
        self._task = self.add_task(title, total=total, completed=done, note="")

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar and its note; rich calls this."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"], no_wrap=True, overflow="ellipsis")

    def advance_to(self, done: int, note: str) -> None:
        """Show that `done` of the total are finished, and the note."""
        self.update(self._task, completed=done, note=note)


def bar_on_terminal(title: str, total: int, done: int) -> Bar | None:
    """Return a bar on standard error, or None if that is no terminal."""
    console = Console(stderr=True)
    return Bar(console, title, total, done) if console.is_terminal else None
