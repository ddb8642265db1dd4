"""What a person reads while a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specstream.cli import train
from specstream.training.progress import summary


def test_a_validation_is_one_line_of_what_matters() -> None:
    values = {"val/loss": 1.25, "val/tau": 2.5, "val/alpha_2": 0.5, "val/speedup": 1.1}
    line = summary({name: torch.tensor(value) for name, value in values.items()})
    assert line == "val/loss 1.25, val/tau 2.5, val/speedup 1.1 (rough)"


def test_a_screen_that_is_no_terminal_gets_a_line_for_each_validation_and_no_noise(
    write_config: Callable[..., str],
    language_model: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(["--config", write_config("run", language_model, enable_progress_bar=True)]) == 0
    screen = capsys.readouterr()
    lines = screen.out.splitlines()
    assert [line.split(":")[0] for line in lines[-3:-1]] == ["step 2", "step 4"]
    assert lines[-1].startswith("trained 4 steps; wrote ")
    assert screen.err == ""
