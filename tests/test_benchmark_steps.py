"""The table of steps: it times what it says, and refuses what has no steps to time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specstream.benchmark.command import main
from specstream.drafters import MaskedDraftModel
from specstream.structures import CanvasDraft

NETWORK = "{class_path: specstream.models.UntrainedMaskedLM, init_args: {vocab_size: 16, "
NETWORK += "hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2, mask_id: 1, "
NETWORK += "max_positions: 64"
BLOCKS = NETWORK + ", block_length: 8}}"
WHOLE = NETWORK + "}}"


def config(folder: Path, target: str, drafter: str, lengths: str = "[16, 64]") -> str:
    path = folder / "steps.yaml"
    path.write_text(
        "study:\n  class_path: specstream.benchmark.StepStudy\n  init_args:\n"
        f"    name: toys\n    lengths: {lengths}\n    dtype: float32\n    device: cpu\n"
        f"    target: {target}\n    drafter: {drafter}\n"
    )
    return str(path)


def test_each_length_has_a_row_with_both_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.json"
    propose, drafted = MaskedDraftModel.propose, []

    def timed(self: MaskedDraftModel, *arguments: Any) -> CanvasDraft:
        draft = propose(self, *arguments)
        drafted.append(draft.drafted.nonzero()[:, 1].tolist())
        return draft

    monkeypatch.setattr(MaskedDraftModel, "propose", timed)
    assert main(["--config", config(tmp_path, WHOLE, BLOCKS), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    rows = json.loads(shown.splitlines()[-1])
    assert rows == json.loads(output.read_text())
    assert [row["length"] for row in rows] == [16, 64]
    assert all(
        row["ratio"] == pytest.approx(row["target_seconds"] / row["drafter_seconds"], rel=1e-4)
        for row in rows
    )
    assert "cheaper" in shown
    assert drafted and all(places and min(places) >= 8 for places in drafted)  # the last block


@pytest.mark.parametrize(
    ("target", "drafter", "lengths", "line"),
    [
        (WHOLE, WHOLE, "[16]", "the drafter a block model"),
        (BLOCKS, BLOCKS, "[16]", "the target must be bidirectional"),
        (WHOLE, BLOCKS, "[128]", "has 64 positions, not 128"),
        (WHOLE, BLOCKS, "[]", "lengths and batch_size must be at least 1"),
    ],
)
def test_what_has_no_steps_to_time_is_one_line(
    target: str,
    drafter: str,
    lengths: str,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.json"
    assert (
        main(["--config", config(tmp_path, target, drafter, lengths), "--output", str(output)]) == 2
    )
    shown = capsys.readouterr().err
    assert line in shown and shown.count("\n") == 1
    assert not output.exists()
