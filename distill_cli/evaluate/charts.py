"""Charts of measures against what a picture costs, as positions in pixels; the page's template draws them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distill_cli.watch import number, ticks

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 340, 240, 48, 328, 12, 194
"""Size of a chart, and the edges of its plane, in pixels."""
RATIO_ACROSS, RATIO_UP = 4, 20
"""Ratios of the largest to the smallest value above which axes are logarithmic."""
TICKS = 6
"""Most ticks of a logarithmic axis."""


def time_of(row: dict[str, Any]) -> float | None:
    """Seconds an image."""
    rate = number(row.get("images_per_second"))
    return 1 / rate if rate and rate > 0 else None


AXES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "network evaluations": lambda row: number(row.get("network_evaluations")),
    "seconds an image": time_of,
}
"""What measures are drawn against: the axis' title, and its value in a row of the table, None where it is not known."""


def curve_of(spec: str) -> str:
    """The curve that a model lies on: NAME for NAME@2."""
    return re.sub(r"@\d+$", "", spec)


class Axis:
    """Places values between two pixels, with some room at both ends; logarithmic if positive values have more than a `ratio`."""

    def __init__(self, values: Sequence[float], start: float, end: float, ratio: float) -> None:
        low, high = min(values), max(values)
        self.start, self.end, self.only = start, end, low if low == high else None
        self.logarithmic = low > 0 and high > ratio * low
        low, high = self.scaled(low), self.scaled(high)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - room, high + room

    def scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (self.end - self.start) * (self.scaled(value) - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers on the axis: their pixels, and how they are written."""
        if self.only is not None:
            values = [self.only]
        elif self.logarithmic:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            every = [[digit * 10.0**power for power in powers for digit in digits] for digits in ((1, 2, 5), (1,))]
            fine, coarse = ([value for value in values if self.low <= math.log10(value) <= self.high] for values in every)
            values = fine if len(fine) <= TICKS else coarse[:: math.ceil(len(coarse) / TICKS)]
        else:
            values = ticks(self.low, self.high)
        return [(self.at(value), f"{value:,g}") for value in values]


@dataclass(frozen=True)
class Mark:
    """A row of the table in a chart; `x` is None if what it costs is not known: it is a level then."""

    curve: int
    x: float | None
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A measure against a cost, in pixels. A line joins the marks of a model at several numbers of steps."""

    axis: str
    logarithmic: tuple[bool, bool]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    marks: list[Mark]
    lines: list[tuple[int, list[tuple[float, float]]]]


def chart(title: str, key: str, form: str, axis: str, rows: Iterable[dict[str, Any]], curves: Sequence[str]) -> Chart | None:
    """The column `key` of the table against the axis of that title; None if no row has both."""
    known = [(row, AXES[axis](row), value) for row in rows if (value := number(row.get(key))) is not None]
    costs = [cost for _, cost, _ in known if cost is not None]
    if not costs:
        return None
    across, up = Axis(costs, LEFT, RIGHT, RATIO_ACROSS), Axis([value for *_, value in known], BOTTOM, TOP, RATIO_UP)
    marks = [
        Mark(
            curves.index(curve_of(row["model"])),
            None if cost is None else across.at(cost),
            up.at(value),
            f"{row['model']}: {title} {value:{form}}" + ("" if cost is None else f", {cost:,.3g} {axis}"),
        )
        for row, cost, value in known
    ]
    placed = [(k, sorted((mark.x, mark.y) for mark in marks if mark.curve == k and mark.x is not None)) for k in range(len(curves))]
    lines = [(k, points) for k, points in placed if len(points) > 1]
    return Chart(axis, (across.logarithmic, up.logarithmic), across.ticks, up.ticks, marks, lines)
