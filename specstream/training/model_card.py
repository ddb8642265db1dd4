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
    commit = facts["git_commit"] or "unknown"
    changed = " (with changes)" if facts["git_dirty"] else ""
    hardware = ", ".join([f"{facts['cpu_cores']} core(s) of {facts['cpu']}", *facts["gpus"]])
    versions = "".join(f"- {name} {number}\n" for name, number in facts["versions"].items())
    card = exported / "README.md"
    card.write_text(
        f"# {run.name}\n\n"
        f"Trained {facts['started'][:10]} with `{facts['command']}`\n"
        f"at commit {commit}{changed}, on {hardware}.\n\n"
        f"{_results(rows)}\n"
        "![loss](loss.png)\n\n"
        f"## Model and training\n\n```yaml\n{_yaml({'model': config['model']})}```\n\n"
        f"## Data\n\n```yaml\n{_yaml({'data': config['data']})}```\n\n"
        f"## Versions\n\n{versions}"
    )
    return card


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False)


def _results(rows: list[dict[str, float]]) -> str:
    """A table of the last value of each loss."""
    last: dict[str, tuple[float, float]] = {}
    for row in rows:
        last |= {
            name: (value, row["step"]) for name, value in row.items() if name.endswith("/loss")
        }
    if not last:
        return "No loss was logged.\n"
    lines = [
        f"| {name} | {value:.4f} | {step:.0f} |" for name, (value, step) in sorted(last.items())
    ]
    return "| metric | last value | step |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"
