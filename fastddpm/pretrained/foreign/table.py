"""The formats that are read and refused, as tables in Markdown, for docs/import.md."""

from collections.abc import Iterable, Sequence

from .catalogue import FORMATS, TENSORFLOW
from .format import Format
from .refused import REFUSED

_DIFFUSERS = (
    "diffusers",
    "[diffusers](https://github.com/huggingface/diffusers)",
    "a pipeline directory with `unet/` and `scheduler/`, or one with their files in it",
    "`fastddpm.load`; pickled weights: `convert`",
    "the directory's",
    "`image_size` if sample_size is null, the process without a scheduler",
)


def formats() -> str:
    """Return the table of formats: what is read, by what, which weights, and what has to be given."""
    header = ("format", "implementation", "files", "read by", "weights", "has to be given")
    return _table(header, [_DIFFUSERS, *map(_row, FORMATS.values())])


def published() -> str:
    """Return the table of the names that --like knows, by format, and of published files that are no such model."""
    rows = []
    for each in FORMATS.values():
        names = ", ".join(f"`{name}`" for name in each.published)
        refused = ", ".join(f"`{name}`" for name in each.refused)
        if names:
            rows.append((each.name, names, refused))
    return _table(("format", "names", "refused: classifiers and upsampling models"), rows)


def refused() -> str:
    """Return the table of formats that are refused."""
    return _table(
        ("format", "why not", "instead"),
        [(name, each.reason, each.way_round) for name, each in REFUSED.items()],
    )


def _row(each: Format) -> tuple[str, ...]:
    both = {"average", "raw"} <= each.sets.keys()
    needed = [" or ".join(f"`{name}`" for name in names.split("|")) for names in each.needed]
    return (
        each.name,
        f"[{each.repository.removeprefix('https://github.com/')}]({each.repository})",
        each.files,
        "`fastddpm.load`, `convert`" if each.name == TENSORFLOW else "`convert`",
        "averaged, or raw by `--weights raw`" if both else "the file's",
        ", ".join(needed) or "nothing for its published configurations",
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
