"""Recognise splits, classes and wrapping folders by the folders that images lie in."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastddpm.errors import DataError

from .source import EXTENSIONS, counted
from .splits import SHOWN, any_split_kind, certain_splits, listed, require_split, split_kind

_MAX_FOLDERS = 2**18  # kept apart; with more of them, folders are merged from the deepest level on
_MIN_DEPTH = 4
_MAX_DEPTH = 16
_MAX_EXAMPLES = 1000  # folders of which some file names are kept


class Note(NamedTuple):
    """A line about images that are left out, and how deep the folder is that they lie in; -1 for other lines."""

    depth: int
    text: str


@dataclass(frozen=True)
class SplitSelection:
    """The images that belong to a split, by their paths.

    `split_base`: folders that lead to the split, () without splits; `train_base`: to the training split, if another one
    was selected. `base`: folders that lead to the class folders, or to images without classes. `classes`: names of the
    class folders, in the order of their labels; None without classes. `listed`: labels by path, from a list
    (`labels.py`), which replace folders as classes. `notes`: what is left out.
    """

    base: tuple[str, ...]
    split_base: tuple[str, ...]
    classes: tuple[str, ...] | None
    count: int
    notes: tuple[Note, ...] = ()
    listed: dict[str, int] | None = None
    train_base: tuple[str, ...] | None = None
    labels: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", {name: i for i, name in enumerate(self.classes or ())})

    def takes(self, path: PurePosixPath) -> bool:
        """Return whether the image at `path` belongs to the split."""
        folders = _folders(path)
        if self.listed is not None:
            return folders[: len(self.split_base)] == self.split_base
        depth = len(self.base)
        return folders[:depth] == self.base and (self.classes is None or len(folders) > depth)

    def label(self, path: PurePosixPath) -> int | None:
        """Return the class of an image of the split, None without classes."""
        if self.listed is not None:
            return self.listed.get(str(path))
        folders = _folders(path)
        return self.labels.get(folders[len(self.base)]) if len(folders) > len(self.base) else None


def whole_split(choice: SplitSelection, paths: Iterable[PurePosixPath]) -> SplitSelection:
    """Return the selection of all images of the split, whatever folder they lie in, without classes."""
    notes = tuple(note for note in choice.notes if note.depth < len(choice.split_base))
    whole = SplitSelection(choice.split_base, choice.split_base, None, 0, notes, listed={})
    return replace(whole, count=sum(map(whole.takes, paths)))


def choose(
    paths: Iterable[PurePosixPath], split: str, where: Path, *, others: Counter[str], named: bool = False
) -> SplitSelection:
    """Select the images of `split` among `paths`, which are iterated over once and not kept.

    Single folders around everything are passed through. If the folders below them are named like splits (train,
    Testing, val, ..), the images of `split` are selected; "test" falls back to validation images. Classes are the
    folders below that, numbered in sorted order as in the training split, if there are at least two. A few images
    beside split or class folders are left out, which `notes` say.

    `others`: number of files that are not images, by extension, after the iteration. `named`: the names of the files
    already say that all of this is `split`. Raises DataError if there is no image, or if folders can be read in two
    ways, and UsageError for "test" without splits.
    """
    tree, examples = _tree(paths)
    if not tree.total:
        found = f"there are {counted(others)}" if others else "it is empty"
        raise DataError(f"{where} holds no images; files ending in {', '.join(EXTENSIONS)} are read, and {found}")
    found_at = _Finder(where).top(tree, ())
    if isinstance(found_at, _Splits):
        return _of_split(found_at, split, where, examples)
    if not named:
        what = f"{found_at.node.total:,} images"
        if found_at.classes:
            what += f" in {len(found_at.classes)} folders, {listed(found_at.classes)}"
        require_split(split, where, what)
    notes = _left_out(tree, found_at, examples)
    return SplitSelection(found_at.base, (), found_at.classes, found_at.count, notes)


# The tree of folders


@dataclass
class _Node:
    """A folder: number of images in it (`own`) and below it (`total`), and its folders that hold images."""

    own: int = 0
    total: int = 0
    below: dict[str, "_Node"] = field(default_factory=dict)


Examples = dict[tuple[str, ...], list[str]]
"""Names of a few images by folder."""


def _tree(paths: Iterable[PurePosixPath]) -> tuple[_Node, Examples]:
    counts: Counter[tuple[str, ...]] = Counter()
    examples: Examples = {}
    depth = _MAX_DEPTH
    for path in paths:
        folders = _folders(path)[:depth]
        counts[folders] += 1
        if folders in examples or not folders or len(examples) < _MAX_EXAMPLES:
            names = examples.setdefault(folders, [])
            if len(names) < SHOWN:
                names.append(path.name)
        if len(counts) > _MAX_FOLDERS and depth > _MIN_DEPTH:
            depth -= 1
            merged: Counter[tuple[str, ...]] = Counter()
            for key, count in counts.items():
                merged[key[:depth]] += count
            counts = merged
    root = _Node()
    for folders, count in counts.items():
        node = root
        node.total += count
        for name in folders:
            node = node.below.setdefault(name, _Node())
            node.total += count
        node.own += count
    return root, examples


def _folders(path: PurePosixPath) -> tuple[str, ...]:
    """Return the folders of a path; none for a path of an archive that leads out of it."""
    folders = path.parts[:-1]
    return () if any(part in ("..", "/") for part in folders) else folders


# What the folders mean


@dataclass(frozen=True)
class _Splits:
    """Folders that are splits: their `kinds` by name, below the folders `base`."""

    node: _Node
    base: tuple[str, ...]
    kinds: dict[str, str]


@dataclass(frozen=True)
class _Images:
    """Images below the folders `base`, with the names of their class folders or None; `count` of them are taken."""

    node: _Node
    base: tuple[str, ...]
    classes: tuple[str, ...] | None

    @property
    def count(self) -> int:
        return self.node.total - (self.node.own if self.classes else 0)


class _Finder:
    """Finds splits and classes in a tree of folders. Raises DataError if they can be read in two ways."""

    def __init__(self, where: Path) -> None:
        self._where = where

    def top(self, node: _Node, base: tuple[str, ...]) -> _Splits | _Images:
        """Return the splits or images, below any single folders."""
        kinds = self._split_kinds(node, base)
        if len(node.below) == 1 and _few(node.own, node.total - node.own):
            (name, child), *_ = node.below.items()
            if not kinds or _several_splits(child):
                found = self.top(child, (*base, name))
                if not node.own or isinstance(found, _Splits) or found.classes:
                    return found
                return _Images(node, base, None)
        if kinds:
            if not _few(node.own, node.total - node.own):
                raise DataError(
                    f"{self._shown(base)} has {node.own:,} images beside the splits {listed(kinds)}: move them into a "
                    "split, or elsewhere"
                )
            return _Splits(node, base, kinds)
        for name, child in sorted(node.below.items()):
            inner = sorted(below for below in child.below if split_kind(below))
            if inner:
                raise DataError(
                    f"{self._shown(base)} can be read in two ways: its folders {listed(node.below)} are classes or "
                    f"sets of their own, and {name} has the folder {inner[0]}, which looks like a split. Put splits "
                    f"above classes ({inner[0]}/{name}/), or name one of the folders as the data"
                )
        return inside(node, base)

    def _split_kinds(self, node: _Node, base: tuple[str, ...]) -> dict[str, str]:
        """Return the kinds of folders that are all splits; empty if none is."""
        certain = certain_splits(node.below)
        likely = certain | {n: kind for n in node.below if n not in certain and (kind := any_split_kind(n))}
        rest = [name for name in node.below if name not in likely]
        if certain and rest:
            raise DataError(
                f"{self._shown(base)} can be read in two ways: of its folders, {listed(likely)} can be "
                f"splits, but {listed(rest)} cannot. If they are splits, move the others elsewhere; if all of "
                "them are classes, put them into one folder named train"
            )
        kinds = set(likely.values())
        if rest or not likely:
            return {}
        if certain or ("train" in kinds and len(kinds) > 1):
            return likely
        if len(likely) == 1:
            return {}
        raise DataError(
            f"{self._shown(base)} can be read in two ways: its folders {listed(likely)} may be splits or classes. Name "
            "splits train and test; if they are classes, put them into one folder named train"
        )

    def _shown(self, base: tuple[str, ...]) -> Path:
        return self._where.joinpath(*base)


def inside(node: _Node, base: tuple[str, ...]) -> _Images:
    """Return the images of a split, or of data without splits, and their classes, below any single folders."""
    rest = node.total - node.own
    if len(node.below) == 1 and _few(node.own, rest):
        ((name, child),) = node.below.items()
        found = inside(child, (*base, name))
        return found if found.classes or not node.own else _Images(node, base, None)
    classes = tuple(sorted(node.below)) if len(node.below) > 1 and _few(node.own, rest) else None
    return _Images(node, base, classes)


def _several_splits(node: _Node) -> bool:
    return len(node.below) > 1 and all(map(split_kind, node.below))


def _few(loose: int, rest: int) -> bool:
    """Return whether images beside folders are few enough to be previews and not part of the data."""
    return rest > 0 and loose <= max(2, rest // 10)


# The images of a split


def _of_split(splits: _Splits, split: str, where: Path, examples: Examples) -> SplitSelection:
    def named(kind: str) -> list[str]:
        return [name for name, other in splits.kinds.items() if other == kind]

    wanted = split
    if split == "test" and not named("test") and named("val"):
        wanted = "val"
    for kind in sorted({wanted, "train"}):
        if len(named(kind)) > 1:
            raise DataError(
                f"{where.joinpath(*splits.base)} can be read in two ways: its folders {listed(named(kind))} both look "
                f"like the split {kind}. Join them, or move one elsewhere"
            )
    if not named(wanted):
        raise DataError(f"{where} has no images in {split}/; it has {listed(splits.kinds)}")
    (name,) = named(wanted)
    base = (*splits.base, name)
    found = inside(splits.node.below[name], base)
    classes = found.classes
    if _several_splits(found.node):
        raise DataError(
            f"{where.joinpath(*found.base)} can be read in two ways: it is a split, but its folders "
            f"{listed(found.node.below)} look like splits of their own. Name it as the data, or rename its folders"
        )
    notes = list(_beside(splits.node.own, splits.base, examples))
    if wanted != split:
        notes.append(Note(-1, f"there is no test split: the images of {name}/ serve as test"))
    others = [
        f"{other}/ ({splits.node.below[other].total:,} images)"
        for other, kind in sorted(splits.kinds.items())
        if other != name and kind != "train" and not (kind == "test" or (kind == "val" and not named("test")))
    ]
    if others:
        notes.append(Note(-1, f"other splits are left out: {', '.join(others)}"))
    if classes is not None and wanted != "train" and named("train"):
        trained = inside(splits.node.below[named("train")[0]], ()).classes
        extra = sorted(set(classes) - set(trained or ()))
        if extra:
            text = f"read without labels, because {name}/ has classes that the training split lacks: {listed(extra)}"
            notes.append(Note(_MAX_DEPTH, text))
            found = replace(found, classes=None)
        classes = None if extra else trained
    notes += _left_out(splits.node.below[name], found, examples, base)
    train_base = (*splits.base, named("train")[0]) if wanted != "train" and named("train") else None
    return SplitSelection(found.base, base, classes, found.count, tuple(notes), train_base=train_base)


def _left_out(top: _Node, found: _Images, examples: Examples, above: tuple[str, ...] = ()) -> tuple[Note, ...]:
    """Return notes about the images between `top` and the class folders, which are not taken."""
    notes: list[Note] = []
    node = top
    for name in found.base[len(above) :]:
        notes += _beside(node.own, above, examples)
        node, above = node.below[name], (*above, name)
    if found.classes:
        notes += _beside(found.node.own, found.base, examples)
    elif len(found.node.below) > 1 and found.node.own:
        text = f"{found.node.own:,} images lie beside the folders {listed(found.node.below)}, which thus are no classes"
        notes.append(Note(_MAX_DEPTH, text))
    return tuple(notes)


def _beside(count: int, base: tuple[str, ...], examples: Examples) -> Iterator[Note]:
    if count:
        names = [str(PurePosixPath(*base, name)) for name in examples.get(base, [])]
        shown = f": {listed(names, count)}" if names else ""
        yield Note(len(base), f"{count:,} image{'s' * (count > 1)} beside the folders left out{shown}")
