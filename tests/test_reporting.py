"""The report's parts: lines that break, running means, axes, numbers."""

from __future__ import annotations

import math
import re

import pytest

from apexflow.reporting import curves
from apexflow.reporting.markup import duration, number


def test_lines_break_where_values_are_not_finite() -> None:
    points = [(step, math.nan if step in (3, 5) else 1.0 + step) for step in range(1, 8)]
    raw = re.search(r'd="([^"]*)" class="line"', curves.figure(curves.Curve("loss", points), (1, 7)))
    assert raw and raw[1].count("M") == 3 and raw[1].count("h0") == 1


def test_running_mean() -> None:
    line = [(float(step), 2.0 * step) for step in range(1, 401)]
    middle = [(step, value) for step, value in curves.smoothed(line, log=False) if 20 < step < 380]
    assert all(value == pytest.approx(2 * step) for step, value in middle)
    powers = [(float(step), 10.0 ** (step % 2)) for step in range(1, 2001)]
    assert all(value == pytest.approx(math.sqrt(10), rel=0.05) for _, value in curves.smoothed(powers, log=True))
    assert curves.smoothed(line[:30], log=False) == []


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, 4.0], [1e-30, 1e30], [1e-9, 1.1e-9], [-1e30, 1e30]])
def test_axes_hold_their_values(values: list[float]) -> None:
    axis = curves.value_axis(values)
    assert 1 <= len(axis.ticks) <= 10
    for value in values + [tick for tick, _ in axis.ticks]:
        assert curves.TOP - 0.01 <= axis.at(value) <= curves.BOTTOM + 0.01
    assert axis.log == (values == [1e-30, 1e30])


@pytest.mark.parametrize(
    "value, written",
    [
        (0.12345, "0.123"),
        (12345.6, "12,346"),
        (3e-4, "3×10⁻⁴"),
        (-0.5, "−0.500"),
        (7, "7"),
        (math.nan, "–"),
        (0.0, "0"),
    ],
)
def test_numbers(value: float, written: str) -> None:
    assert number(value) == written


def test_durations() -> None:
    assert [duration(s) for s in (12.4, 59.7, 245, 3599.6, 29520)] == [
        "12 s",
        "1 min 0 s",
        "4 min 5 s",
        "1 h 0 min",
        "8 h 12 min",
    ]
