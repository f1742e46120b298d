"""Tables and plots of what `pytest benchmarks/ --benchmark-only --benchmark-json FILE` stored; a check for regressions.

    python -m benchmarks.report FILE [FILE ...]                           Markdown on stdout
    python -m benchmarks.report FILE --plots DIR                          and throughput, split and scaling as PNG
    python -m benchmarks.report FILE --store SMALLER.json                 the same without every single round
    python -m benchmarks.report --compare OLD NEW [--tolerance 1.15]      exit code 1 where NEW is slower by more

--relative compares shares of the limit that each run measured rather than times: on a machine that was slower as a
whole, the share stays.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PANEL = (6.4, 4.0)  # inches


@dataclass(frozen=True)
class Timed:
    """One benchmark of a file: `median` seconds of a call, `info` as harness.record stored it."""

    name: str
    group: str
    median: float
    info: dict[str, Any]
    file: str


class UnreadableError(Exception):
    """A file that is not what pytest-benchmark writes."""


def read(path: Path) -> list[Timed]:
    """The benchmarks of a file, in order; `UnreadableError` says what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [
            Timed(
                found["fullname"], found["group"] or "", found["stats"]["median"] / found["extra_info"].get("calls", 1),
                found["extra_info"], path.name,
            )
            for found in document["benchmarks"]
        ]  # fmt: skip
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableError(f"{path} is no file of pytest-benchmark ({type(error).__name__}: {error})") from None


def markdown(benchmarks: Sequence[Timed]) -> str:
    """A table for each group: the fastest first, ratios to ours; below them the machine, versions, date and file."""
    groups: dict[str, list[Timed]] = {}
    for timed in benchmarks:
        groups.setdefault(timed.group, []).append(timed)
    parts = [_table(group, sorted(found, key=lambda timed: timed.median)) for group, found in groups.items()]
    return "\n\n".join([*parts, *sorted({source(timed) for timed in benchmarks})]) + "\n"


def _table(group: str, found: Sequence[Timed]) -> str:
    ours = next((timed.median for timed in found if timed.info.get("peer") == "fastddpm"), None)
    lines = [f"### {group}", "", "| | median | images/s | share of the limit | time / ours |", "|---|---|---|---|---|"]
    for timed in found:
        info = timed.info
        rate = info.get("chain_images_per_s", info.get("images_per_s"))
        share = info.get("share_of_limit")
        name = info.get("peer", timed.name.rpartition("::")[2])
        if "scaling" in info:
            name = f"{info['scaling']} {info['value']}"
        lines.append(
            f"| {name} | {duration(timed.median)} | {'' if rate is None else f'{rate:.4g}'} "
            f"| {'' if share is None else f'{share:.0%}'} | "
            f"{'' if ours is None or 'scaling' in info else f'{timed.median / ours:.2f}'} |"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def source(timed: Timed) -> str:
    """What a figure was measured on."""
    info = timed.info
    versions = [f"{name} {info[name]}" for name in ("torch", "triton", "diffusers", "cuda") if info.get(name)]
    limits = ""
    if "limit_tflop_per_s" in info:
        limits = f"; limits {info['limit_tflop_per_s']:.3g} TFLOP/s, {info['limit_gb_per_s']:.3g} GB/s"
    where = f"{info.get('processor', '?')}, {info.get('threads', '?')} threads"
    return f"{where}, {', '.join(versions)}, {info.get('date', '?')}{limits} ({timed.file})"


def compare(old: Sequence[Timed], new: Sequence[Timed], tolerance: float, relative: bool) -> list[str]:
    """What of `new` is slower than `old` by more than `tolerance`, as a ratio of times or of shares of the limit."""
    before = {timed.name: timed for timed in old}
    slower = []
    for timed in new:
        earlier = before.get(timed.name)
        if earlier is None:
            continue
        ratio = timed.median / earlier.median
        if relative:
            if not {"share_of_limit"} <= timed.info.keys() & earlier.info.keys():
                continue
            ratio = earlier.info["share_of_limit"] / timed.info["share_of_limit"]
        if ratio > tolerance:
            slower.append(f"{timed.name}: {ratio:.2f} times ({duration(earlier.median)} -> {duration(timed.median)})")
    return slower


def plots(benchmarks: Sequence[Timed], folder: Path) -> list[Path]:
    """PNGs of what the files hold: throughput-*.png, split.png, scaling.png; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = [_throughput(benchmarks, kind, preset, folder) for kind, preset in _curves(benchmarks)]
    made += [draw(benchmarks, folder) for draw in (_split, _scaling)]
    return [path for path in made if path is not None]


def _curves(benchmarks: Sequence[Timed]) -> list[tuple[str, str]]:
    kinds = [(timed.group.split(" ")[0], timed.info.get("preset", "")) for timed in benchmarks]
    return [pair for pair in dict.fromkeys(kinds) if pair[0] in ("forward", "chain")]


def _throughput(benchmarks: Sequence[Timed], kind: str, preset: str, folder: Path) -> Path | None:
    """Images/s against the batch size, one line a peer, and what the matrix unit alone would allow."""
    from matplotlib import pyplot as plt

    batches = [timed for timed in benchmarks if timed.group.startswith(f"{kind} {preset} batch")]
    chosen = [timed for timed in batches if "images_per_s" in timed.info and "whole" not in timed.group]
    if len({timed.info["batch"] for timed in chosen}) < 2:
        return None
    figure, axes = plt.subplots(figsize=PANEL, layout="constrained")
    for peer in dict.fromkeys(timed.info["peer"] for timed in chosen):
        points = sorted(
            (timed.info["batch"], timed.info["images_per_s"]) for timed in chosen if timed.info["peer"] == peer
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=peer, linewidth=2.5 if peer == "fastddpm" else 1.2)
    info = chosen[0].info
    images = info["images_per_s"] * chosen[0].median
    limit = info["limit_tflop_per_s"] * 1e3 / (info["gflop"] / images)
    axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="limit: these FLOPs\nat a product's rate")
    axes.set(xlabel="batch", ylabel="images/s",
             title=f"{'1000-step chain' if kind == 'chain' else 'one evaluation'}, {preset}")  # fmt: skip
    _logarithmic(axes, sorted({timed.info["batch"] for timed in chosen}))
    figure.legend(fontsize="x-small", loc="outside right center")
    return _save(figure, folder / f"throughput-{kind}-{preset}.png", chosen[0])


def _split(benchmarks: Sequence[Timed], folder: Path) -> Path | None:
    """Where the time of a sampling step goes, one bar a batch size."""
    from matplotlib import pyplot as plt

    chosen = [timed for timed in benchmarks if "split_ms" in timed.info]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(1.3 * PANEL[0], 1.2 + 0.6 * len(chosen)), layout="constrained")
    kinds = dict.fromkeys(kind for timed in chosen for kind in timed.info["split_ms"])
    for row, timed in enumerate(chosen):
        total, left = sum(timed.info["split_ms"].values()), 0.0
        for color, kind in enumerate(kinds):
            share = timed.info["split_ms"].get(kind, 0.0) / total
            axes.barh(row, share, left=left, color=f"C{color}", label=kind if row == 0 else None)
            if share > 0.04:
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", fontsize="x-small")
            left += share
    labels = [f"batch {timed.info['batch']}\n{sum(timed.info['split_ms'].values()):.1f} ms" for timed in chosen]
    axes.set_yticks(range(len(chosen)), labels)
    axes.set(xlim=(0, 1), xlabel="share of the time of an evaluation", title=chosen[0].info["preset"])
    figure.legend(fontsize="x-small", loc="outside right center")
    return _save(figure, folder / "split.png", chosen[0])


def _scaling(benchmarks: Sequence[Timed], folder: Path) -> Path | None:
    """Seconds against batch, image size and steps, with what growth in proportion to the FLOPs would be."""
    from matplotlib import pyplot as plt

    chosen = [timed for timed in benchmarks if "scaling" in timed.info]
    if not chosen:
        return None
    kinds = list(dict.fromkeys(timed.info["scaling"] for timed in chosen))
    figure, panels = plt.subplots(1, len(kinds), figsize=(3.4 * len(kinds), 3.2), layout="constrained", squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        points = sorted((timed.info["value"], timed.median, timed.info["gflop"]) for timed in chosen
                        if timed.info["scaling"] == kind)  # fmt: skip
        values, seconds, flop = zip(*points, strict=True)
        axes.plot(values, [1e3 * time for time in seconds], marker="o", label="measured")
        axes.plot(values, [1e3 * seconds[-1] * f / flop[-1] for f in flop], "--", color="black", linewidth=1,
                  label="in proportion to the FLOPs")  # fmt: skip
        axes.set(xlabel=kind, ylabel="ms")
        _logarithmic(axes, values)
        axes.legend(fontsize="x-small")
    figure.suptitle(f"{chosen[0].info['preset']}, sampling", fontsize="medium")
    return _save(figure, folder / "scaling.png", chosen[0])


def _logarithmic(axes: Any, values: Sequence[int]) -> None:
    """Both axes, `values` marked on the horizontal one, plain numbers on the vertical one."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(values, [str(value) for value in values], fontsize="x-small")
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def store(files: Sequence[Path], target: Path) -> None:
    """One file of pytest-benchmark's kind with the benchmarks of `files`, their statistics and no single rounds."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    benchmarks = [found for document in documents for found in document["benchmarks"]]
    for found in benchmarks:
        found["stats"].pop("data", None)
    kept = {"datetime": documents[0].get("datetime"), "version": documents[0].get("version"), "benchmarks": benchmarks}
    target.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _save(figure: Any, path: Path, timed: Timed) -> Path:
    """With its machine, date and file below, as every figure has."""
    from matplotlib import pyplot as plt

    figure.supxlabel(source(timed), fontsize=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for PNGs")
    parser.add_argument("--store", type=Path, help="write the files, without every single round, as one")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--tolerance", type=float, default=1.15)
    parser.add_argument("--relative", action="store_true")
    options = parser.parse_args(arguments)
    if bool(options.files) == bool(options.compare):
        parser.error("name files to report, or --compare OLD NEW")
    try:
        if options.compare:
            slower = compare(*map(read, options.compare), options.tolerance, options.relative)
            print("\n".join([*slower, f"{len(slower)} slower than {options.tolerance} times"]))
            return 1 if slower else 0
        benchmarks = [timed for path in options.files for timed in read(path)]
        print(markdown(benchmarks), end="")
        if options.store:
            store(options.files, options.store)
        if options.plots:
            for path in plots(benchmarks, options.plots):
                print(path, file=sys.stderr)
    except (UnreadableError, ModuleNotFoundError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        print(f"plots need matplotlib: pip install -e '.[report]' ({error})" if missing else error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
