"""A full disk and a damaged file cost one line, not a run."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.cli import train
from specstream.training.checkpoints import AtomicCheckpointIO


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every save write something and then fail as a full disk does."""

    def save(checkpoint: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


def test_a_failed_write_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    checkpoint = {"step": 1, "pytorch-lightning_version": "2"}
    writer.save_checkpoint(checkpoint, path)
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        writer.save_checkpoint({"step": 2}, path)
    assert writer.failure == "No space left on device"
    assert writer.load_checkpoint(path, weights_only=False) == checkpoint
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_write_that_torch_itself_sees_fail_is_noted(tmp_path: Path) -> None:
    writer = AtomicCheckpointIO()
    (tmp_path / "last.ckpt.part").symlink_to("/dev/full")
    writer.save_checkpoint({"weights": torch.zeros(100_000)}, tmp_path / "last.ckpt")
    assert "No space left on device" in writer.failure


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_a_truncated_checkpoint_is_named_with_another_one(tmp_path: Path, kept: int) -> None:
    writer = AtomicCheckpointIO()
    for name in ("best.ckpt", "last.ckpt"):
        writer.save_checkpoint({"weights": torch.zeros(1000)}, tmp_path / name)
    path = tmp_path / "last.ckpt"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*resume from .*best\.ckpt") as e:
        writer.load_checkpoint(path, weights_only=False)
    assert "\n" not in str(e.value)


def test_a_full_disk_ends_a_run_with_a_line_and_the_checkpoint_before(
    tmp_path: Path,
    write_config: Callable[..., str],
    language_model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config("run", language_model)
    assert train(["--config", config, "--trainer.max_steps", "2"]) == 0
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    fill_the_disk(monkeypatch)
    capsys.readouterr()
    more = ["--ckpt_path", "last", "--checkpoint.every_steps", "1"]
    assert train(["--config", config, *more]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("training goes on" in line for line in lines)
    assert lines[-1].endswith("No space left on device; the last.ckpt before it is kept")
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("content", [[1, 2], {"weights": torch.zeros(2)}, torch.zeros(2)])
def test_a_file_that_is_no_checkpoint_is_not_resumed_from(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is not the checkpoint of a training run$"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "other.ckpt", weights_only=False)


def test_a_checkpoint_of_another_size_is_not_resumed_from(
    tmp_path: Path,
    write_config: Callable[..., str],
    language_model: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config("run", language_model, max_steps=1)
    assert train(["--config", config]) == 0
    capsys.readouterr()
    wider = "--model.init_args.model.init_args.intermediate_size=24"
    assert train(["--config", config, "--ckpt_path=last", "--trainer.max_steps=2", wider]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error.startswith("error: the checkpoint is of another model: ") and "(24, " in error
