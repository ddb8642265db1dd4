"""The gradient of a step is that of the whole global batch, however it was cut up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from specstream.cli import train


def test_accumulated_micro_batches_equal_one_batch(
    tmp_path: Path, write_config: Callable[..., str], language_model: dict[str, Any]
) -> None:
    """Rows hold unequal numbers of scored tokens, so a mean of means would differ."""
    for name, size, parts in (("one", 4, 1), ("four", 1, 4)):
        config = Path(write_config(name, language_model, accumulate_grad_batches=parts))
        values = yaml.safe_load(config.read_text())
        values["data"]["init_args"]["batch_size"] = size
        values["trainer"] |= {"limit_val_batches": 0}
        config.write_text(yaml.safe_dump(values))
        assert train(["--config", str(config)]) == 0
    states, losses = [], []
    for name in ("one", "four"):
        run = tmp_path / name
        states.append(torch.load(run / "last.ckpt", weights_only=False)["state_dict"])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=1e-6)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
