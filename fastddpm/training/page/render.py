"""A summary as HTML, by the template page.html. Every text from a run is escaped by Jinja."""

import functools
import json
import re
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from fastddpm import __version__
from fastddpm.data.image import BadImageError
from fastddpm.training.length import too_short
from fastddpm.training.run_log import Record

from .chart import Curve, line_chart, short, smoothed
from .pictures import Embedded, embedded_animation, embedded_grid, embedded_previews
from .summary import Summary

_TABLE_ROWS = 12  # of the log, as numbers
_PARTS = 4  # parts of a run, each with its own curve of the loss by timestep
_FOLDER = Path(__file__).parent
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # a terminal would obey them, UTF-8 lacks the last


def render(summary: Summary) -> str:
    """Return the page of a run."""
    problems = list(summary.problems)
    run = summary.run

    def shown(embed: Callable[[], Embedded | None], what: str) -> Embedded | None:
        try:
            return embed()
        except BadImageError as error:
            problems.append(f"{what} cannot be shown: {error}.")
            return None

    grid = shown(lambda: embedded_grid(run / "samples.png"), "The grid samples.png")
    animation = shown(lambda: embedded_animation(run), "The animation")
    previews, preview_count, unreadable = embedded_previews(run)
    problems += unreadable
    page = _template().render(
        summary=summary,
        facts=summary.facts,
        preset=None if summary.facts is None else summary.facts.preset,
        name=run.resolve().name,
        tiles=_tiles(summary),
        charts=_charts(summary),
        table=_table(summary.records),
        grid=grid,
        undrawn=not (run / "samples.png").exists(),
        animation=animation,
        previews=previews,
        preview_count=preview_count,
        commands=_commands(summary),
        note=_note(summary),
        problems=problems,
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], page)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """Return the numbers at the top: (name, value, what it is of)."""
    config, loss, rate = summary.config, summary.latest("loss"), summary.latest("images_per_s")
    of = "" if config is None else f"of {config.steps:,}"
    tiles = [("step", f"{summary.step:,}", of)]
    if loss is not None:
        tiles.append(("loss", f"{loss:.4f}", "median of the last lines of the log"))
    left, spent = summary.time_left(), summary.time_spent()
    if left is not None:
        tiles.append(("time left", left, "without previews and saving"))
    if spent is not None:
        tiles.append(("time spent", spent, "without previews and saving"))
    if rate is not None:
        wait = summary.latest("data_wait")
        tiles.append(("speed", f"{short(rate)} images/s", "" if wait is None else f"{wait:.0%} waiting for data"))
    memory = summary.latest("memory_mib")
    if memory is not None:
        tiles.append(("memory", f"{memory / 1024:.2f} GiB", "of the main process"))
    return tiles


def _column(records: Sequence[Record], name: str) -> np.ndarray:
    return np.array([np.nan if record.get(name) is None else record[name] for record in records], dtype=np.float64)


def _charts(summary: Summary) -> list[dict[str, Any]]:
    """Return the charts that the log has numbers for: title, SVG, and the entries of a legend."""
    records, charts = summary.records, []
    steps = _column(records, "step")
    marks = [(float(step), text) for step, text in summary.changes]
    config = summary.config

    def against_steps(title: str, name: str, *, log: bool, level: tuple[float, str] | None = None) -> None:
        values = _column(records, name)
        raw = Curve(steps, values, opacity=0.28)
        curves = [raw, Curve(steps, smoothed(values))] if len(records) > 40 and name != "lr" else [Curve(steps, values)]
        svg = line_chart(
            curves, title=title, x_label="step", x_range=(0, summary.step), log=log, marks=marks, level=level
        )
        legend = [("each line of the log", 0.28), ("mean of about 1/40 of them", 1.0)] if len(curves) > 1 else []
        if svg is not None:
            charts.append({"title": title, "svg": svg, "legend": legend})

    against_steps("Loss", "loss", log=True)
    by_t = _by_timestep(summary)
    if by_t is not None:
        charts.append(by_t)
    clip = None if config is None else (config.clip_gradient, f"clipped to {config.clip_gradient:g}")
    against_steps("Gradient norm", "gradient_norm", log=True, level=clip)
    against_steps("Learning rate", "lr", log=False)
    return charts


def _by_timestep(summary: Summary) -> dict[str, Any] | None:
    """Return the chart of the loss by timestep, a curve for each quarter of the log; None if the log has no such."""
    if summary.facts is None:
        return None
    known = [record for record in summary.records if isinstance(record.get("loss_by_t"), list) and record["loss_by_t"]]
    if not known:
        return None
    bins = len(known[-1]["loss_by_t"])
    known = [record for record in known if len(record["loss_by_t"]) == bins]
    timesteps = summary.facts.preset.diffusion.timesteps
    t = (np.arange(bins) + 0.5) * timesteps / bins
    parts = [part for part in np.array_split(np.arange(len(known)), _PARTS) if len(part)]
    curves, legend = [], []
    for i, part in enumerate(parts):
        rows = np.array([known[j]["loss_by_t"] for j in part.tolist()], dtype=np.float64)
        finite = np.isfinite(rows)
        counts = finite.sum(0)
        means = np.where(counts > 0, np.where(finite, rows, 0.0).sum(0) / np.maximum(counts, 1), np.nan)
        opacity = (i + 1) / len(parts)
        curves.append(Curve(t, means, opacity=opacity))
        legend.append((f"to step {known[part[-1]]['step']:,}", opacity))
    title = "Loss by timestep"
    svg = line_chart(curves, title=title, x_label="t", x_range=(0, timesteps), log=True)
    return None if svg is None else {"title": title, "svg": svg, "legend": legend}


def _table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return rows of the log as text, evenly chosen: step, loss, gradient norm, learning rate, images/s."""
    places = np.linspace(0, len(records) - 1, min(len(records), _TABLE_ROWS)).round().astype(int).tolist()
    rows = []
    for record in (records[place] for place in places):
        numbers = [record.get(name) for name in ("loss", "gradient_norm", "lr", "images_per_s")]
        rows.append((f"{record['step']:,}", *("" if number is None else f"{number:.4g}" for number in numbers)))
    return rows


def _note(summary: Summary) -> str | None:
    """Return why the steps taken, or those asked for while it trains, give no images; None if they do."""
    config = summary.config
    if config is None or not summary.step:
        return None
    return too_short(config, config.steps if summary.training else summary.step)


def _commands(summary: Summary) -> list[tuple[str, str]]:
    """Return (purpose, command line) of what can be done with the run."""
    run, facts = shlex.quote(str(summary.run)), summary.facts
    if facts is None:
        return []
    steps = facts.preset.train.steps
    go_on = ("continue the training", f"python -m fastddpm.train --resume --out {run}")
    longer = ("train longer", f"python -m fastddpm.train --resume --out {run} --steps {2 * steps}")
    again = ("write this page again", f"python -m fastddpm.page {run}")
    if not summary.step:
        return [go_on, again]
    source = "" if facts.data is None or facts.data.source is None else f" --data {shlex.quote(facts.data.source)}"
    able = [
        ("draw other images", f"python -m fastddpm.sample {run} --seeds 64-127"),
        ("measure it", f"python -m fastddpm.evaluate {run}{source}"),
        ("compare it with other runs", f"python -m fastddpm.curves {run} RUN2"),
        again,
    ]
    # Double quotes, so that the shell's single ones stay legible; JSON's strings are Python's, too.
    program = f'import fastddpm; fastddpm.load({json.dumps(str(summary.run))}).save_pretrained("pipeline")'
    publish = ("write it for diffusers and the hub, with a model card", f"python -c {shlex.quote(program)}")
    first = {"stopped": [go_on], "finished": [longer, publish]}.get(summary.state, [])
    return [*first, *able]
