"""metrics.jsonl: what is read of it after a crash, and when nothing was logged."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specstream.cli import train
from specstream.training.history import HistoryLogger, read_history


@pytest.mark.parametrize("half", ['{"step": 2, "lo', '{"step": 2}', ""])
def test_a_half_written_last_line_is_dropped_and_the_rest_resumed(
    half: str, tmp_path: Path
) -> None:
    logger = HistoryLogger(tmp_path)
    for step in (0, 1):
        logger.log_metrics({"loss": 1.5}, step)
    with logger.path.open("a") as file:
        file.write(half)
    assert [row["step"] for row in read_history(logger.path)][:2] == [0, 1]
    logger.forget_from(1)
    logger.log_metrics({"loss": 2.5}, 1)
    assert [row["loss"] for row in read_history(logger.path)] == [1.5, 2.5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_that_a_full_disk_cut_are_written_once_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = HistoryLogger(tmp_path)
    logger.log_metrics({"loss": 1.5}, 0)
    opened = Path.open

    class Full:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = opened(path, mode)

        def __enter__(self) -> Full:
            return self

        def writelines(self, lines: list[str]) -> None:
            self.file.write(lines[0][:9])
            self.file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *error: object) -> None:
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: Full(path, mode))
        logger.log_metrics({"loss": 2.5}, 1)
    logger.log_metrics({"loss": 3.5}, 2)
    assert [row["loss"] for row in read_history(logger.path)] == [1.5, 2.5, 3.5]


def test_a_run_too_short_to_log_anything_is_exported(
    tmp_path: Path, write_config: Callable[..., str], language_model: dict[str, Any]
) -> None:
    config = write_config(
        "run", language_model, max_steps=2, log_every_n_steps=10, limit_val_batches=0
    )
    assert train(["--config", config]) == 0
    exported = tmp_path / "run" / "model"
    assert (exported / "loss.png").exists()
    assert "No loss was logged" in (exported / "README.md").read_text()
