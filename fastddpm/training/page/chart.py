"""Line charts as SVG, whose colours follow the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 26, 36  # margins around the panel
_LARGEST = 1e30  # greater values are damage
_MOST_POINTS = 800  # of a curve: twice the panel's width


@dataclass(frozen=True)
class Curve:
    """Points of a curve, float64 (N,) each; it is interrupted where y is not finite or beyond 1e30. `opacity`: 0..1."""

    x: np.ndarray
    y: np.ndarray
    opacity: float = 1.0


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    x_range: tuple[float, float],
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    level: tuple[float, str] | None = None,
) -> Markup | None:
    """Return a chart as SVG; None if no curve has a finite point.

    `x_range`: what the x axis shows at least. `log`: a logarithmic y axis, if all values are positive. `marks`: (x,
    text) of vertical lines. `level`: (y, text) of a horizontal line. Texts may be any strings. A screen reader is told
    the title, and the first and last value of the last curve.
    """
    curves = [replace(curve, y=np.where(np.abs(curve.y) < _LARGEST, curve.y, np.nan)) for curve in curves]
    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    if not values.size:
        return None
    log = log and bool((values > 1 / _LARGEST).all())
    places = [*x_range, *(x for curve in curves for x in (curve.x.min(), curve.x.max())), *(x for x, _ in marks)]
    across = _Axis.linear(min(places), max(places), _LEFT, WIDTH - _RIGHT)
    levels = [*values.tolist(), *([level[0]] if level is not None and _near(level[0], values) else [])]
    make = _Axis.logarithmic if log else _Axis.linear
    up = make(min(levels), max(levels), HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(across, up, x_label)]
    for number, (x, text) in enumerate(marks, 1):
        parts.append(
            Markup(
                '<g class="mark"><title>{}</title><path d="M{:.1f} {}V{}"/><text x="{:.1f}" y="{}">{}</text></g>'
            ).format(text, across(x), _TOP, HEIGHT - _BOTTOM, across(x), _TOP - 4, number)
        )
    if level is not None and _near(level[0], values):
        y = up(level[0])
        parts.append(
            Markup('<g class="level"><path d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}">{}</text></g>').format(
                _LEFT, y, WIDTH - _RIGHT, WIDTH - _RIGHT, y - 4, level[1]
            )
        )
    for curve in curves:
        data = _path(curve, across, up)
        parts.append(Markup('<path class="curve" style="opacity:{:g}" d="{}"/>').format(curve.opacity, data))
    last = curves[-1].y[np.isfinite(curves[-1].y)]
    told = f"{title}: {short(last[0])} at first, {short(last[-1])} at last" if last.size else title
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, told, Markup("").join(parts)
    )


@dataclass(frozen=True)
class _Axis:
    """An axis from `low` to `high`, drawn from pixel `start` to `end`, with its ticks; if `log`, both are log10."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool

    @staticmethod
    def linear(low: float, high: float, start: float, end: float) -> "_Axis":
        if high <= low:  # a single value
            low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        first = math.ceil(low / step - 1e-9)
        ticks = tuple(number * step for number in range(first, math.floor(high / step + 1e-9) + 1))
        return _Axis(low, high, start, end, ticks, log=False)

    @staticmethod
    def logarithmic(low: float, high: float, start: float, end: float) -> "_Axis":
        a, b = math.log10(low), math.log10(high)
        margin = max(0.02, 0.04 * (b - a))
        a, b = a - margin, b + margin
        decades = range(math.floor(a), math.ceil(b) + 1)
        for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
            ticks = tuple(digit * 10.0**n for n in decades for digit in digits if a <= math.log10(digit * 10.0**n) <= b)
            if len(ticks) <= 6:
                break
        ticks = ticks[:: math.ceil(len(ticks) / 6)] if ticks else ()
        return _Axis(a, b, start, end, ticks, log=True)

    def __call__(self, value: float) -> float:
        return float(self.along(np.asarray(value)))

    def along(self, values: np.ndarray) -> np.ndarray:
        """Return the pixels of values."""
        placed = np.log10(values) if self.log else values
        return self.start + (placed - self.low) / (self.high - self.low) * (self.end - self.start)


def short(value: float) -> str:
    """Return a number in few characters, as in 0.0312, 1.5, 20k and 3M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit and abs(value) < 1e12:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e4 else f"{value:.3g}"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return centred means of float64 (N,) over about N / 40 values, leaving out those that are not finite."""
    half = max(1, len(values) // 80)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def _near(level: float, values: np.ndarray) -> bool:
    """Return whether a level is close enough to the values to be drawn without flattening them."""
    return bool(values.min() / 2 <= level <= values.max() * 2)


def _grid(across: _Axis, up: _Axis, x_label: str) -> Markup:
    parts = []
    for value in up.ticks:
        y = up(value)
        parts.append(
            Markup('<path class="rule" d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}" class="end">{}</text>').format(
                _LEFT, y, WIDTH - _RIGHT, _LEFT - 7, y + 4, short(value)
            )
        )
    for value in across.ticks:
        x = across(value)
        parts.append(
            Markup('<path class="tick" d="M{:.1f} {}v4"/><text x="{:.1f}" y="{}" class="middle">{}</text>').format(
                x, HEIGHT - _BOTTOM, x, HEIGHT - _BOTTOM + 17, short(value)
            )
        )
    parts.append(
        Markup('<path class="axis" d="M{} {}H{}"/><text x="{}" y="{}" class="end label">{}</text>').format(
            _LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, WIDTH - _RIGHT, HEIGHT - 3, x_label
        )
    )
    return Markup("").join(parts)


def _path(curve: Curve, across: _Axis, up: _Axis) -> str:
    x, y = _thinned(curve.x, curve.y)
    known = np.isfinite(y)
    across_px, up_px = across.along(x), up.along(np.where(known, y, 1.0))
    data, pen = [], "M"
    for place, height, drawn in zip(across_px.tolist(), up_px.tolist(), known.tolist(), strict=True):
        if drawn:
            data.append(f"{pen}{place:.1f} {height:.1f}")
        pen = "L" if drawn else "M"
    return "".join(data) + ("h.01" if len(data) == 1 else "")  # a point alone is drawn as a dot


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `_MOST_POINTS` points: of longer curves the lowest and the highest of equally many parts."""
    if len(x) <= _MOST_POINTS:
        return x, y
    kept: list[int] = [0]
    for part in np.array_split(np.arange(len(x)), _MOST_POINTS // 2 - 1):
        known = part[np.isfinite(y[part])]
        if known.size:
            kept += sorted({int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])})
        else:
            kept.append(int(part[0]))
    kept = sorted({*kept, len(x) - 1})
    return x[kept], y[kept]
