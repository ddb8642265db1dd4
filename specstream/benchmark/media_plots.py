"""The plots of media: what a number of rounds gives, in law and beside the solution.

Plain samplers are joined by lines: drafts have to come below them, solvers above Euler's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specstream.benchmark.cells import JsonRow, Table
from specstream.benchmark.media_tables import PLAIN

KINDS = {
    "plain": ("o", "#4c72b0"),
    "equal rounds": ("s", "#8172b2"),
    "equal seconds": ("s", "#ccb974"),
    "refined": ("P", "#dd8452"),
    "student": ("*", "#937860"),
    "free draft": ("^", "#55a868"),
    "trained draft": ("D", "#c44e52"),
}
OTHER = ("X", "#a67c00")


def draw_distances(tables: Sequence[Table]) -> Any:
    """Return a figure with a panel for each table: energy distance to data against rounds."""
    return _panels(tables, _draw_distances)


def draw_fidelity(tables: Sequence[Table]) -> Any:
    """Return a figure with a panel for each table: decibels to the solution against rounds."""
    return _panels(tables, _draw_fidelity)


def _panels(tables: Sequence[Table], draw: Callable[[Any, Sequence[JsonRow]], None]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(tables), 1, figsize=(9, 3.2 * len(tables)), squeeze=False, layout="constrained"
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        draw(axis, table.rows)
        axis.set_title(table.title, fontsize=9, loc="left")
        axis.set_xlabel("rounds of a sample (of a student, its own calls)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw_distances(axis: Any, rows: Sequence[JsonRow]) -> None:
    """Draw a point for each method, its noise as a bar, and a line for each plain sampler's eta."""
    steps = [row for row in rows if row["kind"] in PLAIN]
    for eta in sorted({row["eta"] for row in steps}):
        own = sorted((r for r in steps if r["eta"] == eta), key=lambda r: float(r["rounds"]))
        places = [row["rounds"] for row in own], [row["data_distance"] for row in own]
        axis.plot(*places, color="#999999", linewidth=0.7, zorder=0)
    for row in rows:
        marker, colour = KINDS.get(row["kind"], OTHER)
        calls = row["rounds"] or row["draft_passes"]  # a student's own
        axis.errorbar(
            calls, row["data_distance"], yerr=row["data_noise"], fmt=marker, color=colour,
            markersize=5, linewidth=0.5, alpha=0.8, label=f"{row['method']} (eta {row['eta']:g})",
        )  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_ylabel("energy distance to data", fontsize=8)


def _draw_fidelity(axis: Any, rows: Sequence[JsonRow]) -> None:
    """Draw a line for each solver; a sample that is the solution itself has no decibels."""
    for curve in dict.fromkeys(row["curve"] for row in rows):  # points may be added at the end
        members = (r for r in rows if r["curve"] == curve and r["psnr"] is not None)
        own = sorted(members, key=lambda r: float(r["rounds"]))
        axis.plot([r["rounds"] for r in own], [r["psnr"] for r in own], marker=".", label=curve)
    axis.set_ylabel("PSNR to the solution, dB", fontsize=8)
