"""The table of costs: measured once for a pair, kept on disk, measured again when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import specstream.generation.costs as costs_module
from specstream.drafters import DraftModel, PromptLookup
from specstream.generation import CostModelLength, FixedLength, SpeculativePipeline, StepCosts
from specstream.generation.costs import fastest, measure_costs, stored_costs
from specstream.models import PretrainedLM
from specstream.sampling import Sampling
from tests.toys import letters, toy_lm


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(100)


def pipeline(target: PretrainedLM, max_tokens: int = 2, batch_size: int = 1) -> SpeculativePipeline:
    drafter = DraftModel(target, lambda: target)
    return SpeculativePipeline(
        target, drafter, letters(), lengths=CostModelLength(max_tokens), batch_size=batch_size
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[StepCosts]:
    """Count measurements; each gives other numbers, so that a re-read one is told apart."""
    made: list[StepCosts] = []

    def measure(pipe: SpeculativePipeline) -> StepCosts:
        size = pipe.lengths.max_tokens
        cost = 1.0 + len(made)
        made.append(StepCosts(cost, (0.0, *[cost] * size), (0.0, *[cost] * size)))
        return made[-1]

    monkeypatch.setattr(costs_module, "measure_costs", measure)
    return made


def test_a_measured_table_has_a_time_for_every_length(target: PretrainedLM) -> None:
    costs = measure_costs(pipeline(target))
    assert len(costs.verify) == len(costs.draft) == 3
    assert all(0 < costs.round_seconds(k) < 60 for k in range(3))
    assert costs.draft[2] > costs.draft[1] > 0


def test_verification_is_measured_at_its_width_even_if_nothing_is_found(
    target: PretrainedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = set()
    extend = target.extend

    def watched(tokens, *arguments, **options):
        widths.add(tokens.shape[1])
        return extend(tokens, *arguments, **options)

    monkeypatch.setattr(target, "extend", watched)
    drafter = PromptLookup(target)
    measure_costs(SpeculativePipeline(target, drafter, letters(), lengths=CostModelLength(2)))
    assert widths == {1, 2, 3}


def test_a_table_is_measured_once_and_read_again(
    target: PretrainedLM, tmp_path: Path, measured: list[StepCosts]
) -> None:
    first = stored_costs(pipeline(target), tmp_path / "new")
    assert stored_costs(pipeline(target), tmp_path / "new") == first
    assert len(measured) == 1


def test_another_pair_batch_or_length_is_measured_for_itself(
    target: PretrainedLM, tmp_path: Path, measured: list[StepCosts]
) -> None:
    stored_costs(pipeline(target), tmp_path)
    stored_costs(pipeline(target, max_tokens=3), tmp_path)
    stored_costs(pipeline(target, batch_size=2), tmp_path)
    stored_costs(pipeline(toy_lm(100, num_layers=2)), tmp_path)
    assert len(measured) == 4 and len(list(tmp_path.iterdir())) == 4


def test_another_law_or_dtype_of_the_drafter_is_measured_for_itself(
    target: PretrainedLM, tmp_path: Path, measured: list[StepCosts]
) -> None:
    def build(sampling: Sampling, dtype: torch.dtype) -> SpeculativePipeline:
        drafter = DraftModel(target, lambda: toy_lm(100).to(dtype))
        return SpeculativePipeline(
            target, drafter, letters(), lengths=CostModelLength(2), sampling=sampling
        )

    for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.0), Sampling()):
        stored_costs(build(sampling, torch.float32), tmp_path)
    assert len(measured) == 3
    stored_costs(build(Sampling(), torch.bfloat16), tmp_path)
    assert len(measured) == 4


DAMAGED = {
    "cut off": '{"plain": 1.0, "verify": [0.0, 1',
    "empty": "",
    "another record": "[]",
    "a number missing": json.dumps({"plain": None, "verify": [0, 1, 1], "draft": [0, 1, 1]}),
    "too short": json.dumps({"plain": 1, "verify": [0, 1], "draft": [0, 1]}),
    "not a time": json.dumps({"plain": 1, "verify": [0, -9, 1], "draft": [0, 1, 1]}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_measured_again_and_replaced(
    target: PretrainedLM, tmp_path: Path, measured: list[StepCosts], name: str
) -> None:
    stored_costs(pipeline(target), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(DAMAGED[name])
    assert stored_costs(pipeline(target), tmp_path) == measured[1]
    assert stored_costs(pipeline(target), tmp_path) == measured[1]
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_costs_a_measurement_only(
    target: PretrainedLM, tmp_path: Path, measured: list[StepCosts]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert stored_costs(pipeline(target), tmp_path / "file" / "costs") == measured[0]


def test_measuring_is_not_on_the_clock(
    target: PretrainedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def measure(pipe: SpeculativePipeline) -> StepCosts:
        now[0] += 1000.0
        return StepCosts(1.0, (0.0, 1.0, 1.0), (0.0, 1.0, 1.0))

    monkeypatch.setattr("specstream.generation.speculative.stored_costs", measure)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pipe = pipeline(target)
    pipe.complete([[1, 2, 3]])
    assert now == [1000.0] and pipe.stats.seconds == 0


def test_a_fixed_length_needs_no_costs(target: PretrainedLM, measured: list[StepCosts]) -> None:
    pipe = SpeculativePipeline(
        target, DraftModel(target, lambda: target), letters(), lengths=FixedLength(1)
    )
    next(pipe.generate([[1, 2]]))
    assert not measured


@pytest.mark.parametrize(("seconds", "runs"), [(0.11, 2 + 8), (0.4, 2 + 3), (3.0, 1 + 1)])
def test_passes_are_timed_in_turns_and_very_slow_ones_in_one(
    seconds: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0, 0.0]

    def work(share: float) -> None:
        now[0] += share * seconds
        now[1] += 1

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    found = fastest([lambda: work(1.0), lambda: work(1.5)])
    assert found == pytest.approx([seconds, 1.5 * seconds]) and now[1] == 2 * runs
