"""Samples that validation decoded: a file in the run folder, and a table in W&B."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger


def write_samples(module: L.LightningModule, rows: Sequence[dict[str, object]]) -> None:
    """Append `rows`, which have the same keys, to samples.jsonl, and log them to W&B loggers."""
    folder = Path(module.trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for logger in module.trainer.loggers:
        if isinstance(logger, WandbLogger) and rows:
            data = [list(row.values()) for row in rows]
            logger.log_table("val/samples", columns=list(rows[0]), data=data)
