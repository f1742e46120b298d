"""The formats that are read, and what --like may name."""

import difflib
import re
from collections.abc import Collection

from fastddpm.errors import DataError, UsageError

from . import hojonathanho, openai, pesser, tqch, w86763777
from .format import Format, Published
from .refused import REFUSED

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        hojonathanho.FORMAT,
        pesser.FORMAT,
        tqch.FORMAT,
        w86763777.FORMAT,
        openai.IMPROVED,
        openai.GUIDED,
    )
}
TENSORFLOW = hojonathanho.FORMAT.name


def named(like: str | None) -> tuple[Format | None, Published | None]:
    """Return the format, and the published configuration if it is one, that --like names; neither for None.

    Raises `UsageError`, with similar names, if there is none, and with the reason for a file that is no such model.
    """
    if like is None:
        return None, None
    for each in FORMATS.values():
        if like == each.name:
            return each, None
        if like in each.published:
            return each, each.published[like]
        if like in each.refused:
            raise UsageError(f"{like} cannot be converted: {each.refused[like]}")
    for name, refused in REFUSED.items():
        if like.lower() == name.lower():
            raise UsageError(f"{name} cannot be converted: {refused.reason}; {refused.way_round}")
    names = [*FORMATS, *(name for each in FORMATS.values() for name in each.published)]
    close = difflib.get_close_matches(like, names, 3, 0.4) or list(FORMATS)
    raise UsageError(f"--like knows no {like!r:.100}; it knows {', '.join(close)} (all: docs/import.md)")


def recognised(names: Collection[str], where: str, like: Format | None) -> Format:
    """Return the format of tensors by their names: `like` if that fits, otherwise the one whose signature they hold.

    `names` are without prefixes. Raises `DataError`, naming a tensor, if they fit none, or another one than `like`.
    """
    fitting = [each for each in FORMATS.values() if _fits(each, names)]
    if like is not None and like in fitting:
        return like
    if like is not None:
        lacking = next(tensor for tensor in like.signature if not _holds(names, tensor))
        other = f"; its tensors are named as {fitting[0].name}'s" if fitting else ""
        raise DataError(f"{where} is no checkpoint of {like.name}: it lacks {lacking}{other}")
    if not fitting:
        for name, refused in REFUSED.items():
            if any(re.fullmatch(refused.pattern, each) for each in names):
                raise DataError(f"{where} is of {name} and cannot be converted: {refused.reason}; {refused.way_round}")
        some = ", ".join(list(names)[:3]) or "none"
        raise DataError(
            f"{where}: its tensors ({some:.200}, ..) are named as in none of {', '.join(FORMATS)}; see docs/import.md"
        )
    if len(fitting) > 1:
        choices = " or ".join(f"--like {each.name}" for each in fitting)
        raise UsageError(
            f"{where} may be of {' or '.join(each.name for each in fitting)}, whose tensors have the same names; say "
            f"{choices}, or name the published file, as in --like {next(iter(fitting[-1].published))}"
        )
    return fitting[0]


def _fits(each: Format, names: Collection[str]) -> bool:
    return all(_holds(names, tensor) for tensor in each.signature)


def _holds(names: Collection[str], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in names)
