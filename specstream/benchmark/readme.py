"""The README's results, made from docs/results/*.json and from nothing else."""

from __future__ import annotations

from pathlib import Path

from specstream.benchmark.rows import read_rows
from specstream.benchmark.tables import JsonRow, make_tables, markdown
from specstream.files import write_whole

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def render(results: Path, configs: Path, root: Path) -> str:
    """Return the section: every results file, then the configs that were not measured."""
    files = [(path, read_rows(path)) for path in sorted(results.glob("*.json"))]
    parts = [_render_file(path, rows, root) for path, rows in files]
    commands = [str(row["command"]).split() for _, rows in files for row in rows]
    names = [path.relative_to(root).as_posix() for path in sorted(configs.glob("*.yaml"))]
    missing = [name for name in names if not any(name in words for words in commands)]
    if missing:
        lines = [f"| `{name}` | not measured |" for name in missing]
        parts.append("\n".join(["| benchmark | result |", "| --- | --- |", *lines]))
    return "\n\n".join(parts)


def _render_file(path: Path, rows: list[JsonRow], root: Path) -> str:
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commit = str(first["git_commit"] or "unknown")[:7]
    parts = [
        f"### {path.stem}",
        f"{first['hardware']}, {first['threads']} threads, {first['dtype']}; {versions}; commit "
        f"{commit}. Command: `{first['command']}`. All numbers: "
        f"[{path.name}]({path.relative_to(root).as_posix()}).",
    ]
    for table in make_tables(rows):
        parts += [f"**{table.title}**", markdown(table)]
    parts += [f"![{p.stem}]({p.relative_to(root).as_posix()})" for p in _plots_of(path)]
    return "\n\n".join(parts)


def _plots_of(path: Path) -> list[Path]:
    """Return a results file's plots; those of files whose names go on from its own are theirs."""
    others = tuple(f"{other.stem}-" for other in path.parent.glob(f"{path.stem}-*.json"))
    plots = sorted(path.parent.glob(f"{path.stem}-*.png"))
    return [plot for plot in plots if not plot.name.startswith(others)]


def with_section(text: str, section: str) -> str:
    """Return the README's text with its results replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README needs one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    body = f"\n{section}\n" if section else "\n"
    return f"{before}{BEGIN}{body}{END}{after}"


def update(readme: Path, results: Path, configs: Path) -> bool:
    """Write the README's results; returns whether they were out of date."""
    old = readme.read_text()
    new = with_section(old, render(results, configs, readme.parent))
    if new != old:
        write_whole(readme, new)
    return new != old
