"""What is in a collection: how many images, of which kinds and sizes, which cannot be used, which are equal."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from .collection import Collection, Item
from .decode import Rule, fitted, open_picture
from .decoding import each
from .duplicates import Duplicates, digest
from .problems import Problems, Report

_MAX_SIZES = 1000
_MAX_CLASSES = 100_000
_SHOWN_PAIRS = 20
OTHER = "other"


@dataclass
class Findings:
    """What `scan` found.

    Of good images, `kinds` counts "FORMAT MODE", `sizes` "WIDTHxHEIGHT" (beyond 1,000 sizes "other"), `classes` labels;
    `smallest` and `largest` are pixels of the shorter side. `duplicates`: images that equal an earlier one; `equal`
    names some with the first of their kind.
    """

    source: str
    images: int
    good: int = 0
    encoded_bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    smallest: int = 0
    largest: int = 0
    classes: Counter[int] = field(default_factory=Counter)
    bad: int = 0
    problems: str = ""
    duplicates: int | None = None
    equal: list[tuple[str, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Seen:
    """An image that can be used."""

    kind: str
    size: tuple[int, int]
    num_bytes: int
    digest: bytes


def scan(
    collection: Collection, *, rule: Rule | None = None, duplicates: bool = True, full_list: Path, report: Report
) -> Findings:
    """Decode every image, at its own size or by `rule`, and count.

    Equal are images whose pixels are, at their own size, by a 128-bit digest. Memory, beside what lists the collection:
    16 encoded images and a decoded one for each processor, counts of 1,000 sizes and of the classes, 20 problems (if
    there are more, all go to `full_list`), and at most 100 MB to find what is equal.
    """
    found = Findings(collection.name, collection.count, notes=collection.notes)
    problems = Problems(collection, full_list, report)

    def look(item: Item) -> _Seen:
        data = item.read()
        picture = open_picture(data)
        if rule is not None:
            fitted(picture, rule)
        name = digest(picture.image) if duplicates else b""
        return _Seen(f"{picture.format} {picture.mode}", picture.image.size, len(data), name)

    with Duplicates() as before:
        for number, item, seen in each(collection, look, problems, title="reading"):
            _count(found, item, seen)
            if duplicates:
                before.add(number, seen.digest)
        found.bad = problems.count
        found.problems = problems.message() if problems.count else ""
        if duplicates:
            _compare(found, before, collection)
    return found


def _count(found: Findings, item: Item, seen: _Seen) -> None:
    found.good += 1
    found.encoded_bytes += seen.num_bytes
    found.kinds[seen.kind] += 1
    size = "{}x{}".format(*seen.size)
    found.sizes[size if size in found.sizes or len(found.sizes) < _MAX_SIZES else OTHER] += 1
    side = min(seen.size)
    found.smallest = side if found.good == 1 else min(found.smallest, side)
    found.largest = max(found.largest, side)
    if item.label is not None and (item.label in found.classes or len(found.classes) < _MAX_CLASSES):
        found.classes[item.label] += 1


def _compare(found: Findings, before: Duplicates, collection: Collection) -> None:
    found.duplicates = 0
    pairs: list[tuple[int, int]] = []
    for pair in before.pairs():
        found.duplicates += 1
        if len(pairs) < _SHOWN_PAIRS:
            pairs.append(pair)
    if pairs:
        wanted = {number for pair in pairs for number in pair}
        items = enumerate(islice(collection.items(), max(wanted) + 1))
        names = {number: item.name for number, item in items if number in wanted}
        found.equal = [(names[first], names[later]) for first, later in pairs]
