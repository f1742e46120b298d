"""All images of a collection, and one message about all those that cannot be used."""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from fastddpm.errors import DataError

from .collection import Collection, Item
from .decode import BadImageError, Rule, decode

Report = Callable[[str], None]
_AHEAD = 128  # encoded images in memory at a time
_TASK = 16  # images a thread takes at once; one by one, small images would spend more time in the queue
_SHOWN = 20


def decode_all(
    collection: Collection,
    rule: Rule,
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
    labels: list[int | None] = []
    problems: list[str] = []
    for item, result in _decoded(collection, rule):
        if isinstance(result, str):
            problems.append(f"{item.name if item.name.isprintable() else repr(item.name)}: {result}")
        else:
            append(result)
            labels.append(item.label)
    if problems:
        text = _message(collection, problems, full_list, report)
        if not labels:
            raise DataError(f"{text}\nno image is left")
        if not skip_bad:
            raise DataError(f"{text}\nmend or remove them, or use --skip-bad to go on without them")
        report(f"{text}\nleft out, as --skip-bad asks")
    elif not labels:
        raise DataError(f"{collection.name} holds no images")
    return _label_array(labels, collection.name), len(problems)


def _decoded(collection: Collection, rule: Rule) -> Iterator[tuple[Item, np.ndarray | str]]:
    items = collection.items()
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` has a lower limit of its own
        while ahead := list(islice(items, _AHEAD)):
            tasks = [ahead[i : i + _TASK] for i in range(0, len(ahead), _TASK)]
            results = pool.map(lambda task: [_try(item, rule) for item in task], tasks)
            yield from zip(ahead, (result for done in results for result in done), strict=True)


def _try(item: Item, rule: Rule) -> np.ndarray | str:
    try:
        return decode(item.read(), rule)
    except BadImageError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"cannot be read: {error}"


def _message(collection: Collection, problems: list[str], full_list: Path, report: Report) -> str:
    lines = [f"{len(problems)} of {collection.count} images in {collection.name} cannot be used:"]
    lines += [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        where = f"the whole list is in {full_list}"
        try:
            full_list.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError:
            where = "listed above"
            for problem in problems:
                report(problem)
        lines.append(f"  and {len(problems) - _SHOWN} more; {where}")
    return "\n".join(lines)


def _label_array(labels: list[int | None], name: str) -> np.ndarray | None:
    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        raise DataError(f"{name}: {len(labels) - len(known)} images have no label, the others do")
    if known and max(known) >= 2**31:
        raise DataError(f"{name}: label {max(known)} is too large to be a class")
    return np.array(known, dtype=np.int64) if known else None
