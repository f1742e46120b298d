"""Recognise splits by the names of folders and files."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastddpm.errors import DataError, UsageError

_PREFIX, _SUFFIX = r"(?:(?:images?|imgs?|data)[-_ .])?", r"(?:[-_ .]?(?:set|data|images?|imgs?|split|\d+(?:x\d+)?))*"
_CERTAIN = re.compile(
    rf"{_PREFIX}(?:(?P<train>train(?:ing|val)?)|(?P<test>test(?:ing)?)|(?P<val>val(?:id(?:ation)?)?)){_SUFFIX}"
)
_LIKELY = re.compile(
    r"(?P<train>tr|trn)|(?P<test>te|ts|tst)|(?P<val>dev|eval|evaluation|hold[-_]?out)"
    rf"|(?P<extra>extra{_SUFFIX})|(?P<unlabeled>(?:unlabell?ed|unsupervised){_SUFFIX})"
)
SHOWN = 5  # names that a message gives


def require_split(split: str, where: Path, found: str, *, shard: bool = False) -> None:
    """Raise UsageError if the split is "test" and the name of `where`, which has no splits, does not say so.

    `shard`: the name is that of a shard and may begin with the split, as test-00000-of-00001.parquet.
    """
    said = {split_in_name(where.name), split_of_shard(where.name) if shard else None}
    if split == "test" and not said & {"test", "val"}:
        raise UsageError(
            f"{where} has no splits, so none of it is known to be test data: found {found}. Name a source with train "
            "and test, or use --split train for all of it"
        )


class SplitFiles(NamedTuple):
    """Files of a split, notes about what is left out, and whether the files' names say the split."""

    files: list[Path]
    notes: tuple[str, ...]
    named: bool


def split_files(files: list[Path], split: str, folder: Path, ending: str) -> SplitFiles:
    """Return the files of the split if any file is named by a split (train-00000.tar, Test.parquet), else all files.

    Files may also lie in folders named by splits. Raises DataError if only other splits are there, if some files are
    named by a split and others not, or if the files lie in several other folders.
    """
    folders = sorted({path.parent for path in files})
    kinds = [any_split_kind(parent.name) for parent in folders]
    by_folder = folder not in folders and None not in kinds and len(set(kinds)) == len(folders)
    if len(folders) > 1 and not by_folder:
        below = ", ".join(str(parent.relative_to(folder)) for parent in folders)
        raise DataError(f"{folder} has {ending} files in several folders; name one of {below}")
    names = [path.parent.name if by_folder else re.split(r"[-_.]", path.name, maxsplit=1)[0] for path in files]
    kinds = list(map(any_split_kind, names))
    found = set(kinds) - {None}
    if not any(map(split_kind, names)):
        return SplitFiles(files, (), False)
    if None in kinds:
        rest = listed(path.name for path, kind in zip(files, kinds, strict=True) if kind is None)
        raise DataError(
            f"{folder} can be read in two ways: some {ending} files are named like splits, but {rest} are not. Name "
            "all of them by their split, or move the others elsewhere"
        )
    wanted = "val" if split == "test" and "test" not in found and "val" in found else split
    if wanted not in found:
        shown = ", ".join(str(path.relative_to(folder)) if by_folder else path.name for path in files[:10])
        raise DataError(f"{folder} has no {split}-*.{ending}; it has {shown}")
    notes = [] if wanted == split else [f"there is no test split: the {ending} files of validation serve as test"]
    others = sorted(str(kind) for kind in found - {"train", "test", wanted} if kind != "val" or "test" in found)
    if others:
        notes.append(f"other splits are left out: {', '.join(others)}")
    chosen = [path for path, kind in zip(files, kinds, strict=True) if kind == wanted]
    return SplitFiles(chosen, tuple(notes), True)


def split_of_shard(name: str) -> str | None:
    """Return the split in a shard's name, before its number (test-00000-of-00001.parquet: "test"), None without one."""
    match = re.match(r"([a-z]+)[-_.]\d", name.lower())
    return split_kind(match[1]) if match else None


def split_kind(name: str) -> str | None:
    """Return the split ("train", "test", "val") that a folder's name certainly means, in any case; None if none."""
    return _kind(_CERTAIN, name)


def certain_splits(names: Iterable[str]) -> dict[str, str]:
    """Return the folders that certainly are splits, with their kinds.

    These are names like train, and names that differ in that word only (seg_train, seg_test).
    """
    names = list(names)
    found = {name: kind for name in names if (kind := split_kind(name))}
    alike: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = re.split(r"[-_. ]+", name.lower())
        kinds = [(i, kind) for i, word in enumerate(words) if (kind := split_kind(word))]
        if name not in found and len(kinds) == 1:
            ((place, kind),) = kinds
            alike.setdefault((*words[:place], *words[place + 1 :]), {})[name] = kind
    for group in alike.values():
        if "train" in group.values() and len(set(group.values())) > 1:
            found |= group
    return found


def any_split_kind(name: str) -> str | None:
    """Return the split that a folder's name may mean, "extra" and "unlabeled" included; None if none."""
    return split_kind(name) or _kind(_LIKELY, name)


def split_in_name(name: str) -> str | None:
    """Return the split that the name of a file or folder says: all of it, or its last word; None if it says none.

    File extensions are left out, as is LSUN's _lmdb: church_val_lmdb and faces-test.zip say one, test_of_faces does
    not.
    """
    stem = re.sub(r"(_lmdb|\.[a-z]+)+$", "", name, flags=re.IGNORECASE)
    return split_kind(stem) or split_kind(re.split(r"[-_. ]+", stem)[-1])


def _kind(pattern: re.Pattern[str], name: str) -> str | None:
    match = pattern.fullmatch(name.lower())
    return next((kind for kind, text in match.groupdict().items() if text), None) if match else None


def listed(names: Iterable[str], count: int | None = None) -> str:
    """Return up to five names, sorted and escaped if they are unprintable, and how many more there are."""
    shown: Sequence[str] = [name if name.isprintable() else repr(name) for name in sorted(names)]
    more = (len(shown) if count is None else count) - len(shown[:SHOWN])
    return ", ".join(shown[:SHOWN]) + (f" and {more:,} more" if more else "")
