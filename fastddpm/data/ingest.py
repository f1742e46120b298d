"""All images of a source, decoded by threads, in order."""

import contextlib
import os
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image

from fastddpm.errors import DataError
from fastddpm.runtime.progress import Meter

from .image import BadImageError, Preprocessing, decode
from .readers.source import EncodedImage, ImageSource

# Images that cannot be used

Report = Callable[[str], None]
SHOWN = 20


class Problems:
    """Images that cannot be used, one `add` each; memory holds the first 20.

    When there are more, all go into the file `full_list`, or line by line to `report` if that cannot be written.
    """

    def __init__(self, image_source: ImageSource, full_list: Path, report: Report) -> None:
        self.count = 0
        self.image_source, self._path, self._report = image_source, full_list, report
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
        lines = [f"{self.count} of {self.image_source.count} images in {self.image_source.name} cannot be used:"]
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


T = TypeVar("T")
_SHOWN_FROM = 10_000  # images: fewer take seconds
_TASK = 8  # images a thread takes at once; one by one, small images would spend more time in the queue
_TASKS_AHEAD = 2  # for each thread


def decode_all(
    image_source: ImageSource,
    preprocessing: Preprocessing,
    append: Callable[[np.ndarray], object],
    *,
    skip_bad: bool,
    report: Report,
    full_list: Path,
) -> tuple[np.ndarray | None, int]:
    """Hand each image, uint8 (C, S, S), to `append` in order; return labels int64 (N,) or None, and how many are bad.

    Raises DataError that lists the bad images, unless `skip_bad`, and always if none is good. When there are more
    than a message holds, the list goes to the file `full_list`, or line by line to `report` if that cannot be.
    """
    labels = Labels(image_source.name)
    problems = Problems(image_source, full_list, report)
    for _, item, image in map_images(image_source, lambda item: decode(item.read(), preprocessing), problems):
        append(image)
        labels.append(item.label)
    raise_or_report(problems, len(labels), skip_bad=skip_bad, report=report)
    return labels.array(), problems.count


def map_images(
    image_source: ImageSource, work: Callable[[EncodedImage], T], problems: Problems, *, title: str = "decoding"
) -> Iterator[tuple[int, EncodedImage, T]]:
    """(number, image, its `work`) in order, the work done by threads; BadImageError, OSError, ValueError are problems.

    At most 16 images for each processor are in memory, with their results. Progress shows on stderr for collections
    of 10,000 or more.
    """
    items = enumerate(image_source.items())
    meter = Meter(title, image_source.count, "images") if image_source.count >= _SHOWN_FROM else None
    threads = os.cpu_count() or 1
    running: deque[Future[list[tuple[int, EncodedImage, T | _Reason]]]] = deque()
    with meter or nullcontext(), warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` has a lower limit of its own
        task = list(islice(items, _TASK))
        while task or running:
            if task:
                running.append(pool.submit(_try_all, task, work))
                task = list(islice(items, _TASK))
                if len(running) < _TASKS_AHEAD * threads:
                    continue
            done = running.popleft().result()
            for number, item, result in done:
                if isinstance(result, _Reason):
                    problems.add(item.name, result)
                else:
                    yield number, item, result
            if meter:
                meter.update(meter.done + len(done), f"{problems.count} bad" if problems.count else "")


def raise_or_report(problems: Problems, num_good: int, *, skip_bad: bool, report: Report) -> None:
    """Raise DataError if no image is good or, without `skip_bad`, any is bad; else report the bad ones."""
    if problems.count:
        text = problems.message()
        if not num_good:
            raise DataError(f"{text}\nno image is left")
        if not skip_bad:
            raise DataError(f"{text}\nmend or remove them, or use --skip-bad to go on without them")
        report(f"{text}\nleft out, as --skip-bad asks")
    elif not num_good:
        raise DataError(f"{problems.image_source.name} holds no images")


class Labels:
    """Classes as they come: all of the images have one, or none has."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values = array("q")
        self._num_unknown = 0
        self._largest = -1

    def append(self, label: int | None) -> None:
        if label is None:
            self._num_unknown += 1
            label = -1
        self._largest = max(self._largest, label)
        # A label that no class has is refused at the end; until then it need not fit into 64 bits.
        self._values.append(min(label, 2**31))

    def __len__(self) -> int:
        return len(self._values)

    def array(self) -> np.ndarray | None:
        """int64 (N,), or None without labels. Raises DataError for a mixture, or labels of 2^31 and above."""
        if self._num_unknown == len(self._values):
            return None
        if self._num_unknown:
            raise DataError(f"{self._name}: {self._num_unknown} images have no label, the others do")
        if self._largest >= 2**31:
            raise DataError(f"{self._name}: label {self._largest} is too large to be a class")
        return np.array(self._values, dtype=np.int64)


class _Reason(str):
    """Why an image cannot be used."""


def _try_all(
    task: list[tuple[int, EncodedImage]], work: Callable[[EncodedImage], T]
) -> list[tuple[int, EncodedImage, T | _Reason]]:
    return [(number, item, _try(item, work)) for number, item in task]


def _try(item: EncodedImage, work: Callable[[EncodedImage], T]) -> T | _Reason:
    try:
        return work(item)
    except BadImageError as error:
        return _Reason(error)
    except OSError as error:
        return _Reason(f"cannot be read: {error.strerror or error}")
    except ValueError as error:
        return _Reason(f"cannot be read: {error}")
