"""A corpus, a target and configs so small that a training takes a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

VOCABULARY = 300
WORDS = [
    "the",
    "draft",
    "is",
    "short",
    "and",
    "the",
    "target",
    "checks",
    "it",
    "in",
    "one",
    "pass",
    "then",
    "both",
    "go",
    "on",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of prompt and completion."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    with path.open("w") as file:
        for number in range(60):
            text = " ".join(rng.choices(WORDS, k=12))
            row = {"question": f"{number} {text}", "answer": " ".join(rng.choices(WORDS, k=15))}
            file.write(json.dumps(row) + "\n")
    return path


def small_model(layers: int, hidden: int = 16, **options: Any) -> dict[str, Any]:
    """Return the config block of an untrained model."""
    sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_layers": layers, "num_heads": 2}
    return {
        "class_path": "specstream.models.UntrainedLM",
        "init_args": {"vocab_size": VOCABULARY, "max_positions": 256, **sizes, **options},
    }


def data_block(corpus: Path, folder: Path) -> dict[str, Any]:
    source = {
        "class_path": "specstream.data.PromptCompletion",
        "init_args": {"path": str(corpus), "prompt": "{question}\n", "completion": "{answer}"},
    }
    return {
        "class_path": "specstream.data.TextDataModule",
        "init_args": {
            "sources": [source],
            "vocab_size": VOCABULARY,
            "sequence_length": 64,
            "batch_size": 4,
            "validation_fraction": 0.2,
            "cache_dir": str(folder / "cache"),
            "show_sample": False,
        },
    }


TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 4,
    "log_every_n_steps": 1,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "limit_val_batches": 2,
    "gradient_clip_val": 1.0,
    "enable_progress_bar": False,
}
OPTIMIZER = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1},
}


@pytest.fixture
def write_config(tmp_path: Path, corpus: Path) -> Callable[..., str]:
    """Write a config for a tiny run under tmp_path and return its path."""

    def write(name: str, model: dict[str, Any], **trainer: Any) -> str:
        path = tmp_path / f"{name}.yaml"
        config = {
            "run": str(tmp_path / name),
            "model": model,
            "data": data_block(corpus, tmp_path.parent),
            "trainer": TRAINER | trainer,
        }
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


@pytest.fixture
def language_model() -> dict[str, Any]:
    return {
        "class_path": "specstream.training.LanguageModelingModule",
        "init_args": {
            "model": small_model(2),
            "optimizer": OPTIMIZER,
            "schedule": {
                "class_path": "specstream.training.WarmupCosine",
                "init_args": {"warmup_steps": 1},
            },
            "chunk_tokens": 16,
        },
    }


@pytest.fixture
def distillation() -> dict[str, Any]:
    drafter = {
        "class_path": "specstream.drafters.DraftModel",
        "init_args": {"model": small_model(1, seed=1)},
    }
    return {
        "class_path": "specstream.training.DistillationModule",
        "init_args": {
            "target": small_model(2),
            "drafter": drafter,
            "divergence": {"class_path": "specstream.divergences.ForwardKL"},
            "optimizer": OPTIMIZER,
            "schedule": {"class_path": "specstream.training.ConstantRate"},
            "chunk_tokens": 16,
        },
    }
