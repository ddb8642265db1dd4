"""The Pareto plot of masked diffusion: quality against target calls and against seconds.

Plain samplers are joined by the curve that the others have to rise above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specstream.benchmark.cells import JsonRow, Table
from specstream.benchmark.masked_tables import score, score_name
from specstream.benchmark.pareto import Point, front


@dataclass(frozen=True, slots=True)
class Mark:
    """A method's number and where its point lies."""

    number: int
    cost: float
    score: float
    colour: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Axes, and what is drawn on them."""

    axis: Any
    marks: list[Mark]


KINDS = {
    "nested steps": ("s", "#55a868"),
    "draft and verify": ("o", "#c44e52"),
    "drafter alone": ("X", "#8172b2"),
    "self-speculative": ("D", "#a67c00"),
}
PLAIN = "#4c72b0"
NUMBER_SIZE = 6
WAYS = [math.pi * turn / 6 for turn in (3, 1, 5, 9, 11, 7, 0, 6, 2, 4, 8, 10)]
RADII = (1.5, 2.25, 3.0, 4.0, 5.0, 6.5, 8.0)


def draw_pareto(tables: Sequence[Table]) -> Any:
    """Return a figure with two panels for each table, and its methods by number beside them."""
    from matplotlib import pyplot

    heights = [max(2.6, 0.15 * len(table.rows) + 0.7) for table in tables]
    figure, axes = pyplot.subplots(
        len(tables),
        3,
        figsize=(11, sum(heights)),
        gridspec_kw={"height_ratios": heights, "width_ratios": [1, 1, 0.6]},
        squeeze=False,
        layout="constrained",
    )
    panels = []
    for (calls, seconds, names), table in zip(axes, tables, strict=True):
        panels.append(_draw_panel(calls, table.rows, "target_calls", 1.0, "target calls"))
        panels.append(_draw_panel(seconds, table.rows, "seconds", 1000.0, "milliseconds"))
        calls.set_title(table.title, fontsize=9, loc="left")
        calls.set_ylabel(score_name(table.rows[0]), fontsize=8)
        _draw_names(names, table.rows)
    figure.canvas.draw()  # where points are on the page is known only now
    for panel in panels:
        _label(panel)
    return figure


def _style(row: JsonRow) -> tuple[str, str]:
    return KINDS.get(row["kind"], (".", PLAIN))


def _draw_panel(axis: Any, rows: Sequence[JsonRow], key: str, scale: float, label: str) -> Panel:
    """Draw the points of all methods that cost something; one without calls has no place here."""
    shown = [(number, row) for number, row in enumerate(rows, 1) if row[key] > 0]
    plain = [Point(scale * r[key], score(r)) for _, r in shown if r["kind"] == "plain"]
    curve = front(plain)
    axis.plot([p.cost for p in curve], [p.quality for p in curve], color=PLAIN, linewidth=1)
    axis.set_xscale("log")
    marks = []
    for number, row in shown:
        marker, colour = _style(row)
        marks.append(Mark(number, scale * row[key], score(row), colour))
        axis.plot(marks[-1].cost, marks[-1].score, marker, color=colour, markersize=5, alpha=0.8)
        if row["best_plain"]:
            axis.plot(marks[-1].cost, marks[-1].score, "o", mfc="none", mec=PLAIN, markersize=9)
    axis.margins(0.1, 0.15)
    axis.set_xlabel(f"{label} of a prompt", fontsize=8)
    axis.tick_params(labelsize=8)
    _plain_numbers(axis)
    return Panel(axis, marks)


def _plain_numbers(axis: Any) -> None:
    """Write ticks as 2 and 16, not as powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _label(panel: Panel) -> None:
    """Write each number beside its point, where the fewest numbers and points are in its way."""
    axis, size = panel.axis, NUMBER_SIZE * panel.axis.figure.dpi / 72
    dots = [axis.transData.transform((mark.cost, mark.score)) for mark in panel.marks]
    taken: list[Any] = []
    for mark, dot in zip(panel.marks, dots, strict=True):
        boxes = [_box(dot, way, radius, size) for radius in RADII for way in WAYS]
        free = min(boxes, key=lambda box: _hits(box, taken, dots))  # of equals the nearest
        taken.append(free)
        centre = ((free.x0 + free.x1) / 2, (free.y0 + free.y1) / 2)
        axis.annotate(
            str(mark.number), (mark.cost, mark.score),
            xytext=axis.transData.inverted().transform(centre),
            fontsize=NUMBER_SIZE, color=mark.colour, ha="center", va="center",
            bbox={"boxstyle": "square,pad=0.05", "color": "white", "alpha": 0.7, "linewidth": 0},
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": mark.colour},
        )  # fmt: skip


def _box(dot: Any, way: float, radius: float, size: float) -> Any:
    """Return the place of two digits in a direction and so many heights of them away."""
    from matplotlib.transforms import Bbox

    width, height = 1.5 * size, 1.2 * size
    x, y = dot[0] + radius * size * math.cos(way), dot[1] + radius * size * math.sin(way)
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _hits(box: Any, taken: Sequence[Any], dots: Sequence[Any]) -> int:
    around = box.padded(3)  # a point is no dot on the page
    covered = sum(box.overlaps(other) for other in taken)
    return 3 * covered + sum(around.contains(*dot) for dot in dots)


def _draw_names(axis: Any, rows: Sequence[JsonRow]) -> None:
    """List the methods by their numbers, in their colours."""
    axis.axis("off")
    step = 1 / max(len(rows), 12)
    for number, row in enumerate(rows, 1):
        name = f"{row['method']} (best plain)" if row["best_plain"] else row["method"]
        axis.text(
            0, 1 - number * step, f"{number}  {name}", fontsize=NUMBER_SIZE,
            color=_style(row)[1], transform=axis.transAxes,
        )  # fmt: skip
