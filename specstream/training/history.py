"""The metrics of a run as JSON lines in its folder, and their plot."""

import json
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from specstream.training.run_folder import say


class HistoryLogger(Logger):
    """Appends one JSON object to `metrics.jsonl` each time metrics are logged.

    Each object has `step` (the optimizer step, from 0), `seconds` since the process began, and
    metrics.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run / "metrics.jsonl"
        self.start = time.monotonic()
        self.unwritten: list[str] = []

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, "seconds": round(time.monotonic() - self.start, 2)}
        row |= {name: float(f"{value:.6g}") for name, value in metrics.items()}
        self.unwritten.append(json.dumps(row) + "\n")
        size = self.path.stat().st_size if self.path.exists() else None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(self.unwritten)
            self.unwritten = []
        except OSError as error:  # a full disk: keep the rows, and the training, going
            if size is not None:
                os.truncate(self.path, size)  # a part of them may have been written
            if len(self.unwritten) == 1:
                say(f"could not write {self.path}: {error.strerror}; will try again")

    @rank_zero_only
    def forget_from(self, step: int) -> None:
        """Drop the rows from `step` on: a resumed run does those steps again."""
        if not self.path.exists():
            return
        rows = [row for row in read_history(self.path) if row["step"] < step]
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        os.replace(part, self.path)


def read_history(path: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.jsonl`, in the order they were written; none where nothing was logged.

    A last line that a crash left half written is dropped.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    if not _is_json(lines[-1]):  # empty where the last line was ended
        lines.pop()
    return [json.loads(line) for line in lines]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def plot_losses(history: Path, picture: Path) -> None:
    """Draw train and validation loss over optimizer steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = read_history(history)
    figure, axes = plt.subplots(figsize=(6, 3.5), dpi=100, layout="constrained")
    for name, style in (("train/loss", "-"), ("val/loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=3, linewidth=1)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture)
    plt.close(figure)
