"""train.py end to end on tiny models: run folders, exports, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specstream.cli import train

Config = dict[str, Any]
Write = Callable[..., str]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)["state_dict"]


def test_a_language_model_is_trained_and_exported(
    tmp_path: Path, write_config: Write, language_model: Config
) -> None:
    assert train(["--config", write_config("lm", language_model)]) == 0
    run = tmp_path / "lm"
    files = {path.name for path in run.iterdir()}
    assert files >= {"config.yaml", "provenance.json", "metrics.jsonl", "last.ckpt", "best.ckpt"}
    assert {path.name for path in (run / "model").iterdir()} >= {
        "README.md",
        "config.json",
        "loss.png",
        "model.safetensors",
        "tokenizer.json",
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_drafter_is_distilled_and_stands_alone(
    tmp_path: Path, write_config: Write, language_model: Config, distillation: Config
) -> None:
    assert train(["--config", write_config("lm", language_model)]) == 0
    distillation["init_args"]["target"] = {
        "class_path": "specstream.models.PretrainedLM",
        "init_args": {"path": str(tmp_path / "lm" / "model")},
    }
    distillation["init_args"]["decoding"] = {"num_prompts": 2, "max_new_tokens": 8}
    assert train(["--config", write_config("draft", distillation)]) == 0
    from specstream.generation.loading import load_run

    run = tmp_path / "draft"
    (completion,) = load_run(run).complete(["the draft"], seed=1)
    assert completion.tokens
    names = set(weights(run / "last.ckpt"))
    assert names and all(name.startswith("drafter.") for name in names)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/tau" in row and "val/alpha_1" in row for row in rows)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and set(samples[0]) >= {"prompt", "speculative", "plain"}
