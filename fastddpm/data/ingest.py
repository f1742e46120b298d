"""Decode all images of a source by threads, in order, and list those that cannot be used."""

import contextlib
import os
import re
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from fastddpm.errors import DataError
from fastddpm.runtime.progress import Meter

from .image import BadImageError, Brightness, Levels, Preprocessing, as_planes, fitted, open_picture
from .readers.source import EncodedImage, ImageSource

T = TypeVar("T")

Report = Callable[[str], None]
"""Takes one line of text for the user."""

REASONS = 20  # reasons that a message names
EXAMPLES = 5  # bad images that it names for each
_VARIABLE = re.compile(r"\d|\w\.\w")  # in a word of a reason that is a number or a file's name
_SHOWN_FROM = 10_000  # images: from this number on progress is shown from the beginning
_TASK = 8  # images per task of a thread; with one each, small images would spend more time in the queue
_TASKS_AHEAD = 2  # for each thread

# Images that cannot be used


class _Group:
    """The images that cannot be used for one reason: their number, the first five, and the words that all share."""

    def __init__(self, words: list[str]) -> None:
        self.count = 0
        self._words: list[str | None] = list(words)
        self._examples: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        pairs = zip(self._words, reason.split(" "), strict=True)
        self._words = [word if word == other else None for word, other in pairs]
        if len(self._examples) < EXAMPLES:
            self._examples.append((name, reason))

    def lines(self) -> list[str]:
        """Return "name: reason" of a single image, else the number and the reason, and the names below."""
        if self.count == 1:
            return ["  {}: {}".format(*self._examples[0])]
        reason = " ".join(".." if word is None else word for word in self._words)
        lines = [f"  {self.count} images: {reason}"]
        differ = None in self._words
        lines += [f"    {name}: {own}" if differ else f"    {name}" for name, own in self._examples]
        return lines + (
            [f"    and {self.count - len(self._examples)} more"] if self.count > len(self._examples) else []
        )


class Problems:
    """The images that cannot be used, grouped by reason, with up to five examples of each of 20 reasons in memory.

    Reasons that differ in numbers or file names are one. If not all images are examples, all are written to the file
    `full_list`, or line by line to `report` if that file cannot be written.
    """

    def __init__(self, image_source: ImageSource, full_list: Path, report: Report) -> None:
        self.count = 0
        self.image_source, self._path, self._report = image_source, full_list, report
        self._groups: dict[tuple[str, ...], _Group] = {}
        self._shown: list[str] = []
        self._file: IO[str] | None = None
        self._spilled: Callable[[str], object] | None = None

    def add(self, name: str, reason: str) -> None:
        """Add one image; a name with unprintable characters is escaped, since it may go to a terminal."""
        name = name if name.isprintable() else repr(name)
        line = f"{name}: {reason}"
        self.count += 1
        key = tuple("" if _VARIABLE.search(word) else word for word in reason.split(" "))
        group = self._groups.get(key)
        if group is None and len(self._groups) < REASONS:
            group = self._groups[key] = _Group(reason.split(" "))
        if group is not None:
            group.add(name, reason)
        if self._spilled is None and group is not None and group.count <= EXAMPLES:
            self._shown.append(line)
            return
        if self._spilled is None:
            self._spilled = self._opened()
            for earlier in self._shown:
                self._spilled(earlier)
        self._spilled(line)

    def message(self) -> str:
        """Return the number of bad images, each reason with examples, and where all are listed; close the file."""
        lines = [f"{self.count} of {self.image_source.count} images in {self.image_source.name} cannot be used:"]
        for group in self._groups.values():
            lines += group.lines()
        others = self.count - sum(group.count for group in self._groups.values())
        if others:
            lines.append(f"  {others} for other reasons")
        if self._spilled is not None:
            where = "listed above" if self._file is None else f"in {self._path}"
            lines.append(f"  the whole list is {where}")
        self.close()
        return "\n".join(lines)

    def close(self) -> None:
        """Close the file `full_list` if it was opened."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: the message still has examples
                self._file.close()

    def _opened(self) -> Callable[[str], object]:
        """Open `full_list` and return a function that writes a line to it, or `report` if it cannot be opened."""
        try:
            self._file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
        except OSError:
            return self._report
        return lambda line: print(line, file=self._file)


def raise_or_report(problems: Problems, num_good: int, *, skip_bad: float, report: Report) -> None:
    """Report the bad images if they are at most the share `skip_bad` of all; raise DataError if they are more.

    `skip_bad`: False (0) allows none, True (1) any number. Always raises if no image is good.
    """
    if problems.count:
        text = problems.message()
        if not num_good:
            raise DataError(f"{text}\nno image is left")
        if problems.count > skip_bad * (problems.count + num_good):
            most = f"more than {100 * skip_bad:.3g}% of all: " if skip_bad else ""
            raise DataError(f"{text}\n{most}mend or remove them, or use --skip-bad to go on without them")
        report(f"{text}\n{left_out(skip_bad)}")
    elif not num_good:
        raise DataError(f"{problems.image_source.name} holds no images")


def refuse_mixture(brightness: Brightness, image_source: ImageSource) -> None:
    """Raise DataError if images of 32 bits were scaled from different ranges."""
    if mixture := brightness.mixture():
        raise DataError(f"{image_source.name}: {mixture}")


def left_out(skip_bad: float) -> str:
    """Return that bad images are left out, and why they may be."""
    return "left out, as --skip-bad asks" if skip_bad == 1 else f"left out, as they are at most {100 * skip_bad:.3g}%"


# Decoding by threads


class Decoded(NamedTuple):
    """Labels, int64 (N,) or None, the number of bad images, and advice about 16-bit images or None."""

    labels: np.ndarray | None
    num_bad: int
    advice: str | None


def decode_all(
    image_source: ImageSource,
    preprocessing: Preprocessing,
    append: Callable[[np.ndarray], object],
    *,
    skip_bad: float,
    report: Report,
    full_list: Path,
) -> Decoded:
    """Pass each decoded image, uint8 (C, S, S), to `append` in order; return what else was found.

    Raises DataError that lists the bad images by reason if their share is more than `skip_bad`, and always if no image
    is good (`raise_or_report`); and for images of 32 bits of different ranges. If the message does not name all, the
    complete list is written to the file `full_list`, or line by line to `report` if that file cannot be written.
    """
    labels = Labels(image_source.name)
    problems = Problems(image_source, full_list, report)
    brightness = Brightness()

    def work(item: EncodedImage) -> tuple[np.ndarray, Levels]:
        picture = open_picture(item.read(), preprocessing.background)
        return as_planes(fitted(picture, preprocessing), preprocessing), picture.levels

    for _, item, (image, levels) in map_images(image_source, work, problems):
        append(image)
        labels.append(item.label)
        brightness.add(levels)
    raise_or_report(problems, len(labels), skip_bad=skip_bad, report=report)
    refuse_mixture(brightness, image_source)
    return Decoded(labels.array(), problems.count, brightness.note())


def map_images(
    image_source: ImageSource, work: Callable[[EncodedImage], T], problems: Problems, *, title: str = "decoding"
) -> Iterator[tuple[int, EncodedImage, T]]:
    """Yield (number, image, work(image)) in order, with `work` done by threads.

    An image for which `work` raises BadImageError, OSError or ValueError is added to `problems` instead. At most 16
    images per processor are in memory, with their results. Progress is shown on stderr, of fewer
    than 10,000 images only after a second.
    """
    items = enumerate(image_source.items())
    meter = Meter(title, image_source.count, "images", brief=image_source.count < _SHOWN_FROM)
    threads = os.cpu_count() or 1
    running: deque[Future[list[tuple[int, EncodedImage, T | _Reason]]]] = deque()
    with meter, warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
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
            meter.update(meter.done + len(done), f"{problems.count} bad" if problems.count else "")


class _Reason(str):
    """Why an image cannot be used; a type of its own tells it from the result of `work`."""


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


class Labels:
    """The labels of images, in order: either every image has one or none has."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values = array("q")
        self._num_unknown = 0
        self._largest = -1

    def append(self, label: int | None) -> None:
        """Add the label of the next image, None if it has none."""
        if label is None:
            self._num_unknown += 1
            label = -1
        self._largest = max(self._largest, label)
        # A label of 2^31 or more is refused by `array`; here it is only cut to fit into 64 bits.
        self._values.append(min(label, 2**31))

    def __len__(self) -> int:
        return len(self._values)

    def array(self) -> np.ndarray | None:
        """Return the labels, int64 (N,), or None if no image has one.

        Raises DataError if only some images have one, and for labels of 2^31 and above.
        """
        if self._num_unknown == len(self._values):
            return None
        if self._num_unknown:
            raise DataError(f"{self._name}: {self._num_unknown} images have no label, the others do")
        if self._largest >= 2**31:
            raise DataError(
                f"{self._name}: label {self._largest} is too large to be a class; labels must be below {2**31:,}"
            )
        return np.array(self._values, dtype=np.int64)
