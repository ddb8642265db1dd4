"""The README's results, a summary of docs/results/*.json, and the page of all of them there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os.path import relpath
from pathlib import Path

from specstream.benchmark.cells import Column, JsonRow, Summary, markdown, with_content
from specstream.benchmark.results_page import (
    PAGE,
    ResultsFile,
    read_results,
    render_page,
    short_title,
)
from specstream.benchmark.tables import STUDY_TABLES, make_lines
from specstream.files import write_whole

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def render(files: Sequence[ResultsFile], configs: Path, root: Path) -> str:
    """Return the section: what stands out in every results file, and what was not measured."""
    parts = [_where_measured(files)] if files else []
    for summary in dict.fromkeys(shown.summary for shown in STUDY_TABLES.values()):
        parts += [] if summary is None else _render_summary(summary, files, root)
    parts += _other_tables(files, root)
    names = [path.relative_to(root).as_posix() for path in sorted(configs.glob("*.yaml"))]
    commands = [words for file in files for words in file.commands]
    missing = [f"`{name}`" for name in names if not any(name in words for words in commands)]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _where_measured(files: Sequence[ResultsFile]) -> str:
    machines = sorted({row["hardware"] for file in files for row in file.rows})
    return (
        f"Measured on {'; '.join(machines)}. In brackets behind a speedup is its 95 % interval; "
        "below 1.00x drafting is slower than plain."
    )


def _render_summary(summary: Summary, files: Sequence[ResultsFile], root: Path) -> list[str]:
    """Return a title, the lines of all studies that the summary is of, its rule and a plot."""
    found: list[JsonRow] = []
    sizes: dict[Path, int] = {}
    for file in files:
        for table, lines in make_lines(file.rows):
            if lines and STUDY_TABLES[table.rows[0]["study"]].summary is summary:
                found += [line.with_link(_link(file, root)) for line in lines]
                for plot in filter(partial(_shows, summary), file.plots()):
                    sizes[plot] = max(len(table.rows), sizes.get(plot, 0))
    if not found:
        return []
    columns = [Column("results", lambda row: str(row["link"])), *summary.columns]
    parts = [f"**{summary.title}**", markdown(with_content("", columns, found)), summary.rule]
    if sizes:
        plot = max(sizes, key=lambda path: sizes[path])  # the one that compares most methods
        parts.append(f"![{plot.stem}]({plot.relative_to(root).as_posix()})")
    return parts


def _shows(summary: Summary, plot: Path) -> bool:
    return summary.picture is not None and plot.stem.endswith(f"-{summary.picture}")


def _other_tables(files: Sequence[ResultsFile], root: Path) -> list[str]:
    """Name the page of everything, and its tables without a line here."""
    if not files:
        return []
    page = files[0].path.with_name(PAGE).relative_to(root).as_posix()
    others = []
    for file in files:
        names = [short_title(table) for table, lines in make_lines(file.rows) if not lines]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        others += [f"{_link(file, root)} ({'; '.join(names[:2])}{more})"] if names else []
    there = f" Only there: {', '.join(others)}." if others else ""
    return [f"**[All tables and pictures]({page})**, with the commands that measured them.{there}"]


def _link(file: ResultsFile, root: Path) -> str:
    """Return a link to a file's tables on the page."""
    page = file.path.with_name(PAGE).relative_to(root).as_posix()
    return f"[{file.name}]({page}#{file.name})"


def with_section(text: str, section: str) -> str:
    """Return the README's text with its results replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README needs one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    body = f"\n{section}\n" if section else "\n"
    return f"{before}{BEGIN}{body}{END}{after}"


def update(readme: Path, results: Path, configs: Path) -> bool:
    """Write the README's results and the page of all; returns whether either was out of date."""
    files = read_results(results)
    section = render(files, configs, readme.parent)
    wanted = {readme: with_section(readme.read_text(), section)}
    home = Path(relpath(readme, results)).as_posix()
    wanted[results / PAGE] = render_page(files, home)
    old = {path: path.read_text() if path.exists() else None for path in wanted}
    for path, text in wanted.items():
        if text != old[path]:
            write_whole(path, text)
    return wanted != old
