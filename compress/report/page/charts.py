"""The geometry of the page's charts: axes, positions, label places. The template draws them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LABEL_HEIGHT = 14.0
CHARACTER_WIDTH = 7.6  # a little more than needed on a phone, where text is larger, so that labels never touch


@dataclass(frozen=True)
class ChartAxis:
    """A linear or logarithmic scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Return a value's pixel."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 2)


def linear_axis(values: Sequence[float], start: float, end: float) -> ChartAxis:
    """Return an axis over the values with about four round ticks."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) * 0.02 or 1.0
    step = _round_step(spread / 3)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    digits = max(10, 2 - math.floor(math.log10(step)))  # a rate can be tiny
    ticks = tuple(round(index * step, digits) for index in range(first, last + 1))
    return ChartAxis(ticks[0], ticks[-1], start, end, ticks)


def log_axis(values: Sequence[float], start: float, end: float) -> ChartAxis:
    """Return a logarithmic axis a little wider than the values, with the coarsest round ticks that suffice."""
    low, high = min(values) / 1.2, max(values) * 1.2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: tuple[float, ...] = ()
    for mantissas, enough in (((1,), 3), ((1, 2, 5), 2), ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), 1)):
        every = (round(mantissa * 10.0**decade, 10) for decade in decades for mantissa in mantissas)
        ticks = tuple(tick for tick in every if low <= tick <= high)
        if len(ticks) >= enough:
            break
    return ChartAxis(low, high, start, end, ticks, log=True)


class Point(NamedTuple):
    """A labelled point of a scatter, in pixels."""

    name: str
    x: float
    y: float
    label: str
    label_x: float
    label_y: float
    anchor: str


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Tell whether two rectangles share area."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def place_labels(points: Sequence[tuple[str, str, float, float]], frame: Box) -> list[Point]:
    """Place the label of each (name, label, x, y) clear of other labels, points and the frame's edges.

    Right and left of the point are tried first, then above and below; if nothing is free, the place with the fewest overlaps wins.
    """
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for _, _, x, y in points]
    placed = []
    for name, label, x, y in points:
        box, anchor, at = min(_places(label, x, y), key=lambda place: _conflicts(place[0], taken, frame))
        taken.append(box)
        placed.append(Point(name, x, y, label, round(at, 1), round(box.bottom - 3, 1), anchor))
    return placed


def _places(label: str, x: float, y: float) -> Iterator[tuple[Box, str, float]]:
    """Yield each place of a label, how its text is anchored there, and at which x."""
    width = CHARACTER_WIDTH * len(label)
    for rise in (0, -12, 12, -24, 24, -36, 36):
        top, gap = y - LABEL_HEIGHT / 2 + rise, 4 if rise else 9
        sides = {"start": (x + gap, x + gap), "end": (x - gap - width, x - gap), "middle": (x - width / 2, x)}
        for anchor, (left, at) in sides.items():
            if rise or anchor != "middle":
                yield Box(left, top, left + width, top + LABEL_HEIGHT), anchor, at


def _conflicts(box: Box, taken: Sequence[Box], frame: Box) -> int:
    outside = box.left < frame.left or box.right > frame.right or box.top < frame.top or box.bottom > frame.bottom
    return sum(box.overlaps(other) for other in taken) + 10 * outside


def track(values: Sequence[float], *, from_zero: bool) -> ChartAxis:
    """Return a bar's axis in percent of its width: from zero, or from a little below the smallest value."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) * 0.05 or 1.0
    return (
        ChartAxis(0, high or 1.0, 0, 100, ())
        if from_zero
        else ChartAxis(low - spread / 5, high + spread / 10, 0, 100, ())
    )


def polylines(epochs: Sequence[int], values: Sequence[float | None], x: ChartAxis, y: ChartAxis) -> list[str]:
    """Return SVG point lists, split where a value is missing."""
    runs: list[list[str]] = [[]]
    for epoch, value in zip(epochs, values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{x.at(epoch)},{y.at(value)}")
    return [" ".join(run) for run in runs if run]


def _round_step(step: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
