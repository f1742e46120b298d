"""What is said about the images of a collection that cannot be used: a few in a message, all of them in a file."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .collection import Collection

Report = Callable[[str], None]
SHOWN = 20


class Problems:
    """Images that cannot be used, one `add` each; memory holds the first 20.

    When there are more, all go into the file `full_list`, or line by line to `report` if that cannot be written.
    """

    def __init__(self, collection: Collection, full_list: Path, report: Report) -> None:
        self.count = 0
        self.collection, self._path, self._report = collection, full_list, report
        self._shown: list[str] = []
        self._file: IO[str] | None = None
        self._spilled: Callable[[str], object] | None = None

    def add(self, name: str, reason: str) -> None:
        """Note one image, its name made harmless for a terminal."""
        line = f"{name if name.isprintable() else repr(name)}: {reason}"
        self.count += 1
        if self.count <= SHOWN:
            self._shown.append(line)
            return
        if self._spilled is None:
            self._spilled = self._opened()
            for earlier in self._shown:
                self._spilled(earlier)
        self._spilled(line)

    def message(self) -> str:
        """How many there are, the first of them, and where the others are listed. Closes the file."""
        lines = [f"{self.count} of {self.collection.count} images in {self.collection.name} cannot be used:"]
        lines += [f"  {line}" for line in self._shown]
        if self.count > SHOWN:
            where = "listed above" if self._file is None else f"the whole list is in {self._path}"
            lines.append(f"  and {self.count - SHOWN} more; {where}")
        self.close()
        return "\n".join(lines)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: the message has the first 20
                self._file.close()

    def _opened(self) -> Callable[[str], object]:
        try:
            self._file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
        except OSError:
            return self._report
        return lambda line: print(line, file=self._file)
