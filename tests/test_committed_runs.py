"""The runs in `checkpoints/` decode from a clone, each for the very target that it was made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from specstream.generation import AutoregressivePipeline, FixedLength, Limits
from specstream.generation.loading import load_run
from specstream.sampling import Sampling

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "block-sequential", "draft", "eagle3", "streaming-lossless", "streaming-shared",
)  # fmt: skip
PROMPT = "name[The Punter], food[Indian], area[riverside]\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_run_says_what_its_target_says_in_fewer_calls(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    greedy, limits = Sampling(temperature=0.0), Limits(48)
    pipeline = load_run(
        Path("checkpoints") / f"{name}-e2e-wikisql",
        dtype="float32",
        sampling=greedy,
        limits=limits,
        lengths=FixedLength(4),
    )
    (found,) = pipeline.complete([PROMPT])
    plain = AutoregressivePipeline(pipeline.target, pipeline.processor, greedy, limits)
    assert [found.tokens] == [completion.tokens for completion in plain.complete([PROMPT])]
    assert pipeline.stats.target_calls < plain.stats.target_calls
    assert "The Punter" in found.text
