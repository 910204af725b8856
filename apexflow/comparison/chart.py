"""Several lines in one chart as inline SVG, named at their right ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apexflow.reporting.curves import BOTTOM, LEFT, TOP, axis_text, value_axis
from apexflow.reporting.markup import tag, text

WIDTH, HEIGHT, RIGHT = 560, 236, 400
APART = 11  # pixels between two names


def lines_chart(
    title: str, ticks: Sequence[str], series: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]]
) -> str:
    """A <figure> with a line for each named series over evenly spaced ticks; hues go round the circle.

    A series that has `errors` gets a bar of one of them to either side of each value.
    """
    spans = {name: list(zip(series[name], errors[name], strict=True)) for name in errors}
    ends = [value + sign * error for span in spans.values() for value, error in span for sign in (-1, 1)]
    y = value_axis([*ends, *(value for values in series.values() for value in values)], may_be_log=False)
    places = [LEFT + (RIGHT - LEFT) * index / max(len(ticks) - 1, 1) for index in range(len(ticks))]
    rules = "".join(tag("path", d=f"M{LEFT} {y.at(value):.1f}H{RIGHT}", class_="rule") for value, _ in y.ticks)
    heights = "".join(axis_text(LEFT - 8, y.at(value) + 4, written, "end") for value, written in y.ticks)
    steps = "".join(axis_text(place, BOTTOM + 20, tick, "middle") for place, tick in zip(places, ticks, strict=True))
    names = _spread({name: y.at(values[-1]) for name, values in series.items()})
    colors = {name: f"hsl({360 * index // len(series)} 65% 45%)" for index, name in enumerate(series)}
    lines = "".join(
        _line(name, places, [y.at(value) for value in values], names[name], colors[name])
        for name, values in series.items()
    )
    lines += "".join(
        _bars(places, [(y.at(value - error), y.at(value + error)) for value, error in span], colors[name])
        for name, span in spans.items()
    )
    drawing = rules + heights + steps + lines
    picture = tag("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title, class_="curve")
    caption = tag("figcaption", tag("span", text(title), class_="name"))
    return tag("figure", caption + picture, class_="chart")


def _line(name: str, xs: Sequence[float], ys: Sequence[float], end: float, color: str) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))
    path += "h0" * (len(xs) == 1)
    leader = tag("path", d=f"M{xs[-1]:.1f} {ys[-1]:.1f}L{RIGHT + 12} {end:.1f}", style=f"stroke:{color};opacity:.5")
    written = tag("text", text(name), x=f"{RIGHT + 16}", y=f"{end + 4:.1f}", style=f"fill:{color}")
    return tag("path", d=path, style=f"stroke:{color};stroke-width:1.6") + leader + written


def _bars(xs: Sequence[float], spans: Sequence[tuple[float, float]], color: str) -> str:
    strokes = "".join(f"M{x:.1f} {low:.1f}V{high:.1f}" for x, (low, high) in zip(xs, spans, strict=True))
    return tag("path", d=strokes, class_="error", style=f"stroke:{color};opacity:.6")


def _spread(ends: Mapping[str, float]) -> dict[str, float]:
    """Where the names stand: near their lines, none upon another, the last no lower than the axis."""
    spread: dict[str, float] = {}
    order = sorted(ends, key=lambda name: ends[name])
    for index, name in enumerate(order):
        above = spread[order[index - 1]] + APART if index else TOP
        spread[name] = max(ends[name], above)
    over = max(spread[order[-1]] - BOTTOM, 0) if order else 0
    return {name: place - over for name, place in spread.items()}
