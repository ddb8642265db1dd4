"""A run that is interrupted and resumed equals one that is not, bit for bit on a CPU."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.cli import train
from specstream.training.base import SummedLossModule

Config = dict[str, Any]
Write = Callable[..., str]
AVERAGING = {
    "class_path": "specstream.training.WeightAveraging",
    "init_args": {"decay": 0.9},
}


def interrupt_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process signal itself while it computes that step."""

    def on_train_batch_start(self: SummedLossModule, batch: object, batch_idx: int) -> None:
        if self.global_step == step and batch_idx % 2 == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(
        SummedLossModule, "on_train_batch_start", on_train_batch_start, raising=False
    )


def contents(run: Path) -> dict[str, Any]:
    return torch.load(run / "last.ckpt", weights_only=False)


def assert_equal(one: Any, other: Any) -> None:
    """Compare nested containers of tensors exactly."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds", "val/speedup", "train/tokens_per_second"}
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("averaged", [False, True])
def test_an_interrupted_run_resumes_to_the_same_bits(
    number: int,
    averaged: bool,
    tmp_path: Path,
    write_config: Write,
    distillation: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    distillation["init_args"] |= {"on_policy_fraction": 0.5, "on_policy_tokens": 4}
    distillation["init_args"]["decoding"] = {"num_prompts": 1, "max_new_tokens": 4}
    more: dict[str, Any] = {"callbacks": [AVERAGING]} if averaged else {}
    more |= {"max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": 4}
    whole = write_config("whole", distillation, **more)
    assert train(["--config", whole]) == 0
    parts = write_config("parts", distillation, **more)
    with monkeypatch.context() as patch:
        interrupt_at(2, number, patch)
        assert train(["--config", parts]) == 128 + number
    assert "resume with --ckpt_path last" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "draft").exists()
    assert train(["--config", parts, "--ckpt_path", "last"]) == 0
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(one[key], other[key])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    exported = [tmp_path / name / "draft" / "model.safetensors" for name in ("whole", "parts")]
    assert exported[0].read_bytes() == exported[1].read_bytes()
