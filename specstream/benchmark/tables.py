"""Rows as tables: the same columns on the terminal and in docs/results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from specstream.benchmark.cells import JsonRow, Line, StudyTables, Table
from specstream.benchmark.masked_tables import FILLINGS, STEPS
from specstream.benchmark.media_tables import SAMPLERS, SOLVERS
from specstream.benchmark.text_tables import DISTILLATION, DRAFTERS, SPEED

STUDY_TABLES = {
    "speed": SPEED,
    "drafters": DRAFTERS,
    "masked": FILLINGS,
    "steps": STEPS,
    "media": SAMPLERS,
    "solvers": SOLVERS,
    "distillation": DISTILLATION,
}


def make_tables(rows: Sequence[JsonRow]) -> list[Table]:
    """Group rows into tables, in the order they were measured; empty columns are left out."""
    return [table for shown, group in _groups(rows) for table in shown.tables(group)]


def make_lines(rows: Sequence[JsonRow]) -> list[tuple[Table, list[Line]]]:
    """Return each table with the lines it contributes to the summary of its study."""
    return [(shown.tables(group)[0], shown.lines(group)) for shown, group in _groups(rows)]


def _groups(rows: Sequence[JsonRow]) -> Iterator[tuple[StudyTables, list[JsonRow]]]:
    """Divide rows by task, setting and law."""

    def key(row: JsonRow) -> tuple[str, ...]:
        return (row["study"], row["task"], row.get("setting", ""), row.get("sampling", ""))

    for (study, *_), members in groupby(rows, key):
        yield STUDY_TABLES[study], list(members)


def print_tables(rows: Sequence[JsonRow]) -> None:
    """Print the tables to stdout."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in make_tables(rows):
        shown = RichTable(title=table.title, title_justify="left", show_edge=False)
        for i, column in enumerate(table.columns):
            shown.add_column(column.heading, justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*(column.cell(row) for column in table.columns))
        console.print(shown)
