"""Plots beside a results file: speedups with their bounds, acceptance by position, divergences.

Those of masked diffusion, quality against cost, are in `masked_plots`, and those of media in
`media_plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specstream.benchmark.cells import JsonRow, Table
from specstream.benchmark.masked_plots import draw_pareto
from specstream.benchmark.media_plots import draw_distances, draw_fidelity
from specstream.benchmark.tables import make_tables
from specstream.benchmark.text_tables import method


def write_plots(results: Path, rows: Sequence[JsonRow]) -> list[Path]:
    """Draw what the rows of `results` have to show; returns the files written."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    every = make_tables(rows)
    first = {
        "speed": ("speedup", draw_speedups),
        "drafters": ("speedup", draw_call_reductions),
        "distillation": ("tau", draw_taus),
    }
    tables = [table for table in every if table.rows[0]["study"] in first]
    fillings = [t for t in every if t.rows[0]["study"] == "masked" and t.is_plotted]
    drawn = [(table, *first[table.rows[0]["study"]]) for table in tables]
    drawn += [(t, "alpha", draw_alphas) for t in every if any(r.get("alphas") for r in t.rows)]
    written = []
    for kind in ("speedup", "tau", "alpha"):
        panels = [(table, draw) for table, name, draw in drawn if name == kind]
        if panels:
            written.append(results.with_name(f"{results.stem}-{kind}.png"))
            _write_panels(written[-1], panels)
    if fillings:
        written.append(results.with_name(f"{results.stem}-pareto.png"))
        _write_figure(written[-1], draw_pareto(fillings))
    media = {"media": ("rounds", draw_distances), "solvers": ("psnr", draw_fidelity)}
    for study, (name, draw) in media.items():
        own = [table for table in every if table.rows[0]["study"] == study]
        if own:
            written.append(results.with_name(f"{results.stem}-{name}.png"))
            _write_figure(written[-1], draw(own))
    return written


def _write_panels(path: Path, panels: Sequence[tuple[Table, Any]]) -> None:
    from matplotlib import pyplot

    heights = [0.32 * len(table.rows) + 1.2 for table, _ in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(8, sum(heights)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axis, (table, draw) in zip(axes[:, 0], panels, strict=True):
        draw(axis, table)
        axis.set_title(table.title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    _write_figure(path, figure)


def _write_figure(path: Path, figure: Any) -> None:
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)
    temporary.replace(path)


def draw_speedups(axis: Any, table: Table) -> None:
    """Bars of the speedup over plain decoding, its interval, and the bound as a tick."""
    rows = list(reversed(table.rows))
    places = range(len(rows))
    values = [row["speedup_vs_plain"] for row in rows]
    axis.barh(places, values, color=["#4c72b0" if r["role"] == "ours" else "#999999" for r in rows])
    for place, row in zip(places, rows, strict=True):
        if row["speedup_interval"]:
            axis.plot(row["speedup_interval"], [place, place], color="black", linewidth=1)
        if row["bound"]:
            axis.plot(row["bound"], place, marker="|", markersize=12, color="#c44e52")
    axis.axvline(1, color="black", linewidth=0.5)
    axis.set_yticks(places, [method(row) for row in rows])
    axis.set_xlabel("speedup over plain decoding (red: bound, black: 95 %)", fontsize=8)


def draw_call_reductions(axis: Any, table: Table) -> None:
    """Two bars for each drafter: the speedup with its interval, and the call reduction."""
    rows = [row for row in reversed(table.rows) if row["role"] != "plain"]
    for shift, key, name, colour in (
        (0.2, "speedup_vs_plain", "speedup", "#4c72b0"),
        (-0.2, "call_reduction", "call reduction", "#ccb974"),
    ):
        places = [number + shift for number in range(len(rows))]
        axis.barh(places, [row[key] for row in rows], height=0.4, color=colour, label=name)
    for place, row in enumerate(rows):
        if row["speedup_interval"]:
            axis.plot(row["speedup_interval"], [place + 0.2] * 2, color="black", linewidth=1)
    axis.axvline(1, color="black", linewidth=0.5)
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axis.set_xlabel("over plain decoding (black: 95 %)", fontsize=8)
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_taus(axis: Any, table: Table) -> None:
    """One dot for each seed's tau, the mean as a tick."""
    rows = list(reversed(table.rows))
    for place, row in enumerate(rows):
        axis.plot(row["taus"], [place] * len(row["taus"]), "o", color="#4c72b0", markersize=4)
        axis.plot(row["tau"], place, marker="|", markersize=12, color="black")
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axis.set_xlabel("tau (dots: seeds)", fontsize=8)


def draw_alphas(axis: Any, table: Table) -> None:
    """Acceptance of each drafted position, given that all before it stood."""
    for row in table.rows:
        if row["alphas"]:
            positions = range(1, len(row["alphas"]) + 1)
            axis.plot(positions, row["alphas"], marker=".", label=row["method"])
    axis.set_ylim(0, 1)
    axis.set_xlabel("drafted position", fontsize=8)
    axis.set_ylabel("alpha", fontsize=8)
    axis.legend(fontsize=6, loc="lower left", ncols=2)
