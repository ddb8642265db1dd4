"""The page of all results, docs/results/README.md: every table and plot of the files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specstream.benchmark.cells import JsonRow, Table, markdown
from specstream.benchmark.rows import read_rows
from specstream.benchmark.tables import make_tables

PAGE = "README.md"  # what is shown of a folder


@dataclass(frozen=True, slots=True)
class ResultsFile:
    """A results file and its rows."""

    path: Path
    rows: list[JsonRow]

    @property
    def name(self) -> str:
        """Its heading on the page, which is also the anchor there."""
        return self.path.stem

    @property
    def commands(self) -> list[list[str]]:
        """The words of the commands that measured it."""
        return [str(row["command"]).split() for row in self.rows]

    def plots(self) -> list[Path]:
        """Return its plots; those of files whose names go on from its own are theirs."""
        others = tuple(f"{o.stem}-" for o in self.path.parent.glob(f"{self.name}-*.json"))
        plots = sorted(self.path.parent.glob(f"{self.name}-*.png"))
        return [plot for plot in plots if not plot.name.startswith(others)]


def read_results(results: Path) -> list[ResultsFile]:
    """Return every results file of a folder."""
    return [ResultsFile(path, read_rows(path)) for path in sorted(results.glob("*.json"))]


def render_page(files: Sequence[ResultsFile], home: str) -> str:
    """Return the page: what it holds, then each file with its tables and plots.

    `home` is where the summary is, as a link from the page.
    """
    contents = []
    sections = []
    for file in files:
        tables = make_tables(file.rows)
        titles = dict.fromkeys(short_title(table) for table in tables)
        contents.append(f"- [{file.name}](#{file.name}): {'; '.join(titles)}")
        sections.append(_render_file(file, tables))
    head = (
        "# Results\n\n"
        "All tables and pictures, written by `python -m specstream.benchmark --report` from the "
        "files of this folder and from nothing else. The head of the config that a command names "
        "says what the columns of its tables are. What stands out is in the summary of the "
        f"[README]({home}#results)."
    )
    return "\n\n".join([head, "\n".join(contents), *sections]) + "\n"


def short_title(table: Table) -> str:
    """Return a table's title without what it says in brackets of its size."""
    return table.title.split(" (")[0]


def _render_file(file: ResultsFile, tables: Sequence[Table]) -> str:
    first = file.rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commit = str(first["git_commit"] or "unknown")[:7]
    parts = [
        f"## {file.name}",
        f"{first['hardware']}, {first['threads']} threads, {first['dtype']}; {versions}; commit "
        f"{commit}. Command: `{first['command']}`. All numbers: [{file.path.name}]"
        f"({file.path.name}).",
    ]
    for table in tables:
        parts += [f"**{table.title}**", markdown(table)]
    parts += [f"![{plot.stem}]({plot.name})" for plot in file.plots()]
    return "\n\n".join(parts)
