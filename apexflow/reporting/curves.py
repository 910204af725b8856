"""Training curves as inline SVG: raw values faint, a running mean over them, a log axis where the values ask for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from apexflow.reporting.markup import NOTHING, minus, number, scientific, tag, text

WIDTH, HEIGHT = 440, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 426, 12, 206  # the plotting area
MOST_POINTS = 600  # a line
MOST_MARKS = 120
DECADES_FOR_LOG = 2.0
HUGEST = 1e100  # beyond this a value is as good as infinite, and axis arithmetic would overflow
SMOOTHING = 40  # the running mean spans this share of the points to either side: 1/40
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One named series: `points` (step, value) in order of steps, non-finite values included.

    Without `smooth` it is a schedule, not a measurement: drawn as it is, on a linear axis.
    """

    name: str
    points: Points
    smooth: bool = True

    @property
    def finite(self) -> Points:
        return [(step, value) for step, value in self.points if is_plottable(value)]


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels with its ticks (value, what to write). `at` maps a value to its place."""

    at: Callable[[float], float]
    ticks: list[tuple[float, str]]
    log: bool = False


def is_plottable(value: float) -> bool:
    """Whether a value has a place on an axis: finite, and not so large that the arithmetic of axes would overflow."""
    return math.isfinite(value) and abs(value) < HUGEST


def figure(curve: Curve, steps: tuple[float, float]) -> str:
    """A curve over `steps` (first, last) as a <figure>; only its caption where no value is finite."""
    finite = curve.finite
    if not finite:
        return tag("figure", _caption(curve.name, NOTHING, False, len(curve.points)), class_="chart")
    x = linear_axis(*steps, (LEFT, RIGHT), 5, step_label, least=1.0)
    y = value_axis([value for _, value in finite], curve.smooth)
    main = smoothed(finite, y.log) if curve.smooth else []
    shown = main or thinned(finite)
    raw = _path(thinned(curve.points), x, y, "raw" if main else "line")
    lines = raw + (_path(main, x, y, "line") if main else "")
    missing = [step for step, value in curve.points if not is_plottable(value)]
    drawing = _grid(x, y) + lines + _end_dot(shown[-1], x, y) + _marks(missing, x)
    spoken = _spoken(curve.name, [value for _, value in finite])
    picture = tag("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=spoken, class_="curve")
    return tag("figure", _caption(curve.name, number(shown[-1][1]), y.log, len(missing)) + picture, class_="chart")


def _caption(name: str, last: str, log: bool, missing: int) -> str:
    notes = ["log scale"] * log + [f"{missing:,} not finite"] * bool(missing)
    note = tag("span", text(" · ".join(notes)), class_="warn" if missing else "aside") if notes else ""
    return tag("figcaption", tag("span", text(name), class_="name") + note + tag("span", last, class_="value"))


def _spoken(name: str, values: Sequence[float]) -> str:
    first, last, low, high = (number(value) for value in (values[0], values[-1], min(values), max(values)))
    return f"{name} over steps: from {first} to {last}, lowest {low}, highest {high}"


def thinned(points: Points) -> Points:
    """At most MOST_POINTS points: the lowest and highest of each of half as many stretches, in order.

    A stretch without a finite value leaves one non-finite point, where the line breaks.
    """
    if len(points) <= MOST_POINTS:
        return points
    kept: Points = []
    for stretch in _stretches(points, MOST_POINTS // 2):
        inside = [point for point in stretch if is_plottable(point[1])]
        if not inside:
            kept.append((stretch[0][0], math.nan))
            continue
        low, high = min(inside, key=lambda p: p[1]), max(inside, key=lambda p: p[1])
        kept += [low] if low is high else sorted((low, high))
    return kept


def _stretches(points: Points, count: int) -> list[Points]:
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    return [points[a:b] for a, b in pairwise(edges) if b > a]


def smoothed(finite: Points, log: bool) -> Points:
    """A centred running mean (geometric on a log axis) of finite points, at half of MOST_POINTS; [] where too short."""
    reach = len(finite) // SMOOTHING
    if reach < 1:
        return []
    values = [math.log(value) if log else value for _, value in finite]
    count = min(MOST_POINTS // 2, len(finite))
    places = [round(i * (len(finite) - 1) / (count - 1)) for i in range(count)]
    means = [_window_mean(values, place, reach) for place in places]
    return [(finite[place][0], math.exp(mean) if log else mean) for place, mean in zip(places, means, strict=True)]


def _window_mean(values: Sequence[float], place: int, reach: int) -> float:
    window = values[max(place - reach, 0) : place + reach + 1]
    return math.fsum(window) / len(window)


def value_axis(values: Sequence[float], may_be_log: bool = True) -> Axis:
    """The vertical axis of finite values: log where they are positive and span more than two decades."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and math.log10(high) - math.log10(low) > DECADES_FOR_LOG:
        return _log_axis(math.log10(low), math.log10(high))
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = 0.0 if low >= 0 and low < 0.35 * high else low - room  # zero is worth showing when it is near
    return linear_axis(bottom, high + room, (BOTTOM, TOP), 5, value_label)


def linear_axis(
    low: float, high: float, pixels: tuple[int, int], about: int, write: Callable[[float], str], least: float = 0.0
) -> Axis:
    """An axis from `low` to `high` over `pixels` (of low, of high): some `about` round ticks, `least` or more apart."""
    span = high - low or 1.0
    start, stop = pixels
    step = max(_round_step(span / about), least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(-math.floor(math.log10(step)), 0) + 1
    ticks = [round(i * step, digits) for i in range(first, last + 1)]
    return Axis(lambda value: start + (value - low) / span * (stop - start), [(value, write(value)) for value in ticks])


def _round_step(rough: float) -> float:
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)


def _log_axis(low: float, high: float) -> Axis:
    room = 0.04 * (high - low)
    low, high = low - room, high + room
    every = max(1, math.ceil((high - low) / 6))
    powers = range(math.ceil(low), math.floor(high) + 1, every)
    return Axis(
        lambda value: BOTTOM + (math.log10(value) - low) / (high - low) * (TOP - BOTTOM),
        [(10.0**power, value_label(10.0**power)) for power in powers],
        log=True,
    )


def value_label(value: float) -> str:
    """A tick's value: 0.25, 40k, 2×10⁻⁴."""
    return scientific(value) if 0 < abs(value) < 1e-3 or abs(value) >= 1e7 else step_label(value)


def step_label(step: float) -> str:
    """1500 as `1.5k`, 2000000 as `2M`."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= size:
            return minus(f"{step / size:g}{unit}")
    return minus(f"{step:g}")


def _path(points: Points, x: Axis, y: Axis, kind: str) -> str:
    """A line through the finite points, broken at the others."""
    runs = [list(run) for plottable, run in groupby(points, key=lambda point: is_plottable(point[1])) if plottable]
    return tag("path", d="".join(_stroke(run, x, y) for run in runs), class_=kind)


def _stroke(run: Points, x: Axis, y: Axis) -> str:
    places = [f"{x.at(step):.1f} {y.at(value):.1f}" for step, value in run]
    return "M" + ("L".join(places) if len(places) > 1 else places[0] + "h0")  # a lone point is a dot by its round cap


def _grid(x: Axis, y: Axis) -> str:
    lines = [tag("path", d=f"M{LEFT} {y.at(value):.1f}H{RIGHT}", class_="rule") for value, _ in y.ticks]
    heights = [axis_text(LEFT - 8, y.at(value) + 4, written, "end") for value, written in y.ticks]
    steps = [axis_text(x.at(value), BOTTOM + 20, written, "middle") for value, written in x.ticks]
    stubs = "".join(f"M{x.at(value):.1f} {BOTTOM}v4" for value, _ in x.ticks)
    return "".join(lines + heights + steps) + tag("path", d=f"M{LEFT} {BOTTOM}H{RIGHT}{stubs}", class_="axis")


def axis_text(x: float, y: float, written: str, anchor: str) -> str:
    """What is written at a place beside an axis, which is its "start", "middle" or "end"."""
    return tag("text", text(written), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _end_dot(last: tuple[float, float], x: Axis, y: Axis) -> str:
    return tag("circle", cx=f"{x.at(last[0]):.1f}", cy=f"{y.at(last[1]):.1f}", r=3, class_="end")


def _marks(steps: Sequence[float], x: Axis) -> str:
    """A short stroke on the step axis for each step without a finite value, thinned to what can be told apart."""
    places = sorted({round(x.at(step) * MOST_MARKS / (RIGHT - LEFT)) for step in steps})
    strokes = "".join(f"M{place * (RIGHT - LEFT) / MOST_MARKS:.1f} {BOTTOM - 9}v9" for place in places)
    return tag("path", d=strokes, class_="missing") if strokes else ""
