"""W&B without an account and without a network: nothing fails, nothing is lost."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specstream.cli import train
from specstream.training.wandb_run import WandbRun, noted_run_id


def test_an_offline_run_is_continued_under_its_id(
    tmp_path: Path, write_config: Callable[..., str], distillation: dict[str, Any]
) -> None:
    distillation["init_args"]["decoding"] = {"num_prompts": 1, "max_new_tokens": 4}
    config = write_config("run", distillation)
    run = tmp_path / "run"
    options = ["--config", config, "--wandb.project", "tests"]
    assert train([*options, "--trainer.max_steps", "2"]) == 0
    first = noted_run_id(run)
    assert train([*options, "--ckpt_path", "last"]) == 0
    assert first is not None and noted_run_id(run) == first
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(first) for folder in folders)
    assert list(run.glob("wandb/offline-run-*/files/media/table/val/samples*.json"))


@pytest.mark.parametrize("account", [False, True])
def test_no_account_or_no_network_means_offline_with_a_line(
    account: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no route")

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(socket, "create_connection", refuse)
    import wandb

    monkeypatch.setattr(wandb, "api", type("Api", (), {"api_key": "x" * 40 if account else None}))
    assert not WandbRun()._can_send()
    said = capsys.readouterr().out
    assert "send it later with `wandb sync`" in said
    assert ("cannot be reached" if account else "no W&B account") in said
