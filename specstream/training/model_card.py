"""The README.md of an exported model: what it is, what it was trained on, and by which commit."""

import json
from pathlib import Path

import yaml

from specstream.training.history import read_history


def write_model_card(run: Path, exported: Path) -> Path:
    """Write `exported/README.md` from the run's config, provenance and metrics."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    facts = json.loads((run / "provenance.json").read_text())
    rows = read_history(run / "metrics.jsonl")
    card = exported / "README.md"
    card.write_text(
        f"# {run.name}\n\n"
        f"Trained with `{facts['command']}`\n"
        f"at commit {facts['git_commit'] or 'unknown'}{' (with changes)' if facts['git_dirty'] else ''}, "
        f"{facts['started'][:10]}, on {facts['cpu_cores']} core(s) of {facts['cpu']}"
        f"{', ' + ', '.join(facts['gpus']) if facts['gpus'] else ''}.\n\n"
        f"{_results(rows)}\n"
        "![loss](loss.png)\n\n"
        "## Model and training\n\n"
        f"```yaml\n{yaml.safe_dump({'model': config['model']}, sort_keys=False)}```\n\n"
        "## Data\n\n"
        f"```yaml\n{yaml.safe_dump({'data': config['data']}, sort_keys=False)}```\n\n"
        "## Versions\n\n" + "".join(f"- {name} {number}\n" for name, number in facts["versions"].items())
    )
    return card


def _results(rows: list[dict[str, float]]) -> str:
    """A table of the last value of each loss."""
    last: dict[str, tuple[float, float]] = {}
    for row in rows:
        last |= {name: (value, row["step"]) for name, value in row.items() if name.endswith("/loss")}
    lines = [f"| {name} | {value:.4f} | {step:.0f} |" for name, (value, step) in sorted(last.items())]
    return "| metric | last value | step |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"
