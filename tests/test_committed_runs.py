"""The runs in `checkpoints/` decode from a clone, each for the very target that it was made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from specstream.data.planning import solved
from specstream.generation import AutoregressivePipeline, FixedLength, Limits, Sampler
from specstream.generation.loading import load_run
from specstream.generation.masked_loading import load_masked_run
from specstream.sampling import Sampling
from specstream.unmasking import StaticSchedule

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


SUDOKU = "sudoku 3010000003210104\n"


@pytest.mark.parametrize(
    "name", ["masked-planning", "masked-planning-drafter", "masked-planning-self"]
)
def test_a_committed_masked_run_solves_a_puzzle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sampler = Sampler(limits=Limits(16))
    pipeline = load_masked_run(Path("checkpoints") / name, dtype="float32", sampler=sampler)
    (found,) = pipeline.complete([SUDOKU])
    assert solved(SUDOKU, found.text)
    assert pipeline.stats.target_calls <= 16


def test_nested_steps_of_the_committed_target_say_the_same_in_fewer_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    sampler = Sampler(StaticSchedule(16), limits=Limits(16))
    plain, nested = (
        load_masked_run("checkpoints/masked-planning", dtype="float32", sampler=sampler, **options)
        for options in ({}, {"nested_steps": 4})
    )
    prompts = [SUDOKU, "countdown 50 98 54 = 6\n"]
    assert plain.complete(prompts) == nested.complete(prompts)
    assert nested.stats.target_calls < plain.stats.target_calls
