"""Where things stand in the page's plots: numbers in, coordinates of an SVG out.

Coordinates are in units of the plot's viewBox, rounded to a tenth. Figures are {"mean", "low",
"high"} with an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scoring.evaluated import Figure

WIDTH, HEIGHT = 860, 480
FRAME = (64, 48, 832, 428)  # left, top, right, bottom; labels and titles of the axes stand outside
STEPS = (0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20)  # between lines of the grid
MAX_STEPS = 6
LETTER = 8.4  # mean width of a letter of a label
RADIUS = 9  # of a point and the room around it

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Point(NamedTuple):
    """A labelled point: x is a share (0..1), y is 0 or more."""

    label: str
    x: Figure
    y: Figure


class Label(NamedTuple):
    """A text's place, and the box that it covers; None where every place was taken."""

    x: float
    y: float
    anchor: str
    box: Box | None


class Mark(NamedTuple):
    """Where a point stands, the ends of its two intervals, and its label."""

    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    label: Label


class Scatter(NamedTuple):
    """Grid lines as (coordinate, text), a mark for every point, and the middles of the axes."""

    x_lines: list[tuple[float, str]]
    y_lines: list[tuple[float, str]]
    marks: list[Mark]
    x_middle: int
    y_middle: int
    level: float | None = None  # the y of the line across the plot


def scatter(points: Sequence[Point], level: float | None = None) -> Scatter:
    """Where points stand, with x from 0 to 100 % and y from 0 to a line above the highest end.

    level: a value of y that has no x, and is drawn as a line across the plot.
    """
    left, top, right, bottom = FRAME
    # Ends of intervals count, not only the points, or an interval would leave the frame.
    most = max([point.y["high"] for point in points] + [level or 0])
    step = next((step for step in STEPS if most / step <= MAX_STEPS), most)
    ceiling = step * -(-most // step) or 1  # rounded up to a step

    def at_x(value: float) -> float:
        return left + value * (right - left)

    def at_y(value: float) -> float:
        # The y axis of an SVG points down.
        return bottom - value / ceiling * (bottom - top)

    # no label may cover a point, so the points' boxes are taken before any label is placed
    centres = [(at_x(point.x["mean"]), at_y(point.y["mean"])) for point in points]
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in centres]
    marks = []
    for point, (x, y) in zip(points, centres, strict=True):
        label = place_label(x, y, LETTER * len(point.label), taken)
        taken += [label.box] if label.box else []
        marks.append(Mark(
            round(x, 1), round(y, 1),
            (round(at_x(point.x["low"]), 1), round(at_x(point.x["high"]), 1)),
            (round(at_y(point.y["low"]), 1), round(at_y(point.y["high"]), 1)), label))
    x_lines = [(round(at_x(i / 5), 1), f"{20 * i} %") for i in range(6)]
    y_lines = [(round(at_y(i * step), 1), f"{i * step:g}")
               for i in range(round(ceiling / step) + 1)]
    return Scatter(x_lines, y_lines, marks, round(at_x(0.5)), round(at_y(ceiling / 2)),
                   None if level is None else round(at_y(level), 1))


def place_label(x: float, y: float, length: float, taken: Sequence[Box]) -> Label:
    """A place for the label of the point (x, y) where it covers nothing that is taken.

    Right or left of the point, above or below it. Where all these places are taken, the first one.
    """
    for down in (-14, 26, -32, 44, -50, 62):  # near ones first: a far label could be another's
        # 12 is the point's radius and a little room.
        for left in (x + 12, x - 12 - length):
            # y is a text's base line: letters rise about 13 above it, and reach 4 below.
            box = (left, y + down - 13, left + length, y + down + 4)
            free = all(box[2] < other[0] or box[0] > other[2]
                       or box[3] < other[1] or box[1] > other[3] for other in taken)
            if free and left > FRAME[0] and box[2] < WIDTH - 8 and box[1] > 2:
                anchor, at = ("start", left) if left > x else ("end", x - 12)
                return Label(round(at, 1), round(y + down, 1), anchor, box)
    # Without a box, so that it does not drive away the labels that come after it.
    return Label(round(x + 12, 1), round(y - 14, 1), "start", None)


def bar(figure: Figure, low: float, high: float) -> Figure:
    """A figure and its interval in per cent of a line from low to high."""
    return {name: round(100 * (value - low) / (high - low), 1) for name, value in figure.items()}


class Heat(NamedTuple):
    """A square of `size` replies: (opacity, title, path) of each pair, and the diagonal's path."""

    size: int
    cells: list[tuple[str, str, str]]
    diagonal: str
    mean: float


def heat(similarity: Sequence[Sequence[float]]) -> Heat:
    """The cosines of a prompt's replies (at least two) as tinted cells, two a pair."""
    size, square = len(similarity), "h1v1h-1z"
    pairs = [(a, b, similarity[a][b]) for a in range(size) for b in range(a)]
    # Opacity cannot be negative; the title still gives the cosine itself.
    cells = [(f"{max(0, cosine):.2f}", f"{b + 1} and {a + 1}: {cosine:.2f}",
              f"M{a} {b}{square}M{b} {a}{square}") for a, b, cosine in pairs]
    diagonal = "".join(f"M{a} {a}{square}" for a in range(size))
    return Heat(size, cells, diagonal, sum(cosine for *_, cosine in pairs) / len(pairs))
