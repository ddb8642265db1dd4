"""What tables are made of: columns, the cells that several studies share, lines of a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from specstream.structures import Guarantee

JsonRow = dict[str, Any]
EXACT = (Guarantee.EXACT_LAW.value, Guarantee.EXACT_GREEDY.value)


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and what stands below it."""

    heading: str
    cell: Callable[[JsonRow], str]
    is_text: bool = False  # and begins at the left


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that belong together, under their title."""

    title: str
    columns: list[Column]
    rows: list[JsonRow]
    is_plotted: bool = True


@dataclass(frozen=True, slots=True)
class Summary:
    """A table of the README, with lines from the tables of one study or several.

    `rule` says in words which rows the lines are; `picture` ends the name of the plot that shows
    more than they do, None where the summary has none.
    """

    title: str
    columns: tuple[Column, ...]
    rule: str
    picture: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a summary: a row that its rule has chosen, and the rows that it is held against."""

    row: JsonRow
    beside: dict[str, Any] = field(default_factory=dict)

    def with_link(self, link: str) -> JsonRow:
        """Return it for the columns of a summary, with a link to all rows."""
        return {**self.row, "beside": self.beside, "link": link}


def no_lines(rows: Sequence[JsonRow]) -> list[Line]:
    """Return nothing: the summary of a study that has no single number to tell is a link."""
    return []


@dataclass(frozen=True, slots=True)
class StudyTables:
    """How the rows of a study are shown.

    `tables` and `lines` are given the rows of one task under one setting and one law, in the order
    they were measured: the first shows all of them, the second those that `summary` names.
    """

    tables: Callable[[list[JsonRow]], list[Table]]
    lines: Callable[[Sequence[JsonRow]], list[Line]] = no_lines
    summary: Summary | None = None


def with_content(title: str, columns: Sequence[Column], rows: list[JsonRow]) -> Table:
    """Return a table without its empty columns."""
    return Table(title, [c for c in columns if any(c.cell(row) for row in rows)], rows)


def markdown(table: Table) -> str:
    """Return a table in Markdown, numbers at the right."""
    others = table.columns[1:]
    lines = [
        "| " + " | ".join(column.heading for column in table.columns) + " |",
        "| --- " + "".join("| --- " if c.is_text else "| ---: " for c in others) + "|",
    ]
    lines += ["| " + " | ".join(c.cell(row) for c in table.columns) + " |" for row in table.rows]
    return "\n".join(lines)


def number(key: str, form: str) -> Callable[[JsonRow], str]:
    """Return a cell that formats a number, empty where there is none."""
    return lambda row: "" if row.get(key) is None else format(row[key], form)


def seconds_as_ms(key: str) -> Callable[[JsonRow], str]:
    """Return a cell of seconds, in milliseconds."""
    return lambda row: f"{1000 * row[key]:.2f}"


def times(key: str) -> Callable[[JsonRow], str]:
    """Return a cell such as 1.85x."""
    return lambda row: "" if row.get(key) is None else f"{row[key]:.2f}x"


def speedup(row: JsonRow) -> str:
    """Return the speedup over plain decoding with its interval."""
    if row["speedup_interval"] is None:
        return times("speedup_vs_plain")(row)
    low, high = row["speedup_interval"]
    return f"{row['speedup_vs_plain']:.2f}x [{low:.2f}, {high:.2f}]"


def versus(key: str) -> Callable[[JsonRow], str]:
    """Return a speedup over a plain sampler with its interval."""

    def cell(row: JsonRow) -> str:
        low, high = row[f"{key}_interval"]
        return f"{row[key]:.2f}x [{low:.2f}, {high:.2f}]"

    return cell


def qualities(rows: Sequence[JsonRow]) -> list[Column]:
    """Return a column for each score of the task metric, in percent."""

    def cell(name: str) -> Callable[[JsonRow], str]:
        return lambda row: f"{100 * row['quality'][name]:.2f}"

    return [Column(name.replace("_", " "), cell(name)) for name in rows[0]["quality"]]


def weaker_guarantee(row: JsonRow) -> str:
    """Return what a method promises where that is less than the target's law."""
    return "" if row["guarantee"] == "exact law" else str(row["guarantee"])


def joined(parts: Iterable[str]) -> str:
    """Join what tells a table from others, each of it once."""
    return ", ".join(dict.fromkeys(part for part in parts if part))


def model_name(folder: str) -> str:
    """Return the run of a model's folder: target-pycode of checkpoints/target-pycode/model."""
    path = PurePosixPath(folder)
    return path.parent.name if path.name in ("model", "target") else path.name
