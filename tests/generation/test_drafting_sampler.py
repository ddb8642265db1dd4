"""Denoising steps drafted by measured costs: as many as pay, none where none pays, the same law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from specstream.drafters import FrozenEstimate, IndependentDenoiser, StateDrafter
from specstream.generation.accept_by_error import AcceptByErrorPipeline
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.drafting_sampler import DraftingSampler
from specstream.generation.lengths import (
    CostModelLength,
    FixedLength,
    StepCosts,
    predicted_ratio,
)
from specstream.metrics import energy_test
from specstream.verification.gaussian import ReflectionCoupling
from tests.denoising_toys import KeepsAll, gaussian_model

STEPS = 12
MOST = 5
LINEAR = StepCosts(1.0, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5))
FLAT = StepCosts(1.0, (1.0,) * 6, (0.0,) * 6)
BETWEEN = StepCosts(1.0, (1.0, 1.2, 1.4, 1.6, 1.8, 2.0), (0.0,) * 6)


def sampler(
    costs: StepCosts | None,
    drafter: StateDrafter | None = None,
    batch_size: int = 8,
    rule: ReflectionCoupling | None = None,
    num_steps: int = STEPS,
) -> DenoisingPipeline:
    return DenoisingPipeline(
        gaussian_model(), num_steps, 1.0, 1.0, drafter or FrozenEstimate(),
        CostModelLength(MOST, retry=2), rule, batch_size, costs,
    )  # fmt: skip


def by_error(costs: StepCosts | None) -> AcceptByErrorPipeline:
    lengths = CostModelLength(MOST)
    return AcceptByErrorPipeline(gaussian_model(), STEPS, 0.1, lengths=lengths, costs=costs)


@pytest.mark.parametrize("build", [sampler, by_error])
def test_where_rows_cost_more_than_rounds_save_nothing_is_drafted(
    build: Callable[[StepCosts], DraftingSampler],
) -> None:
    pipeline = build(LINEAR)
    assert not any(step.drafted for step in pipeline.generate(4, seed=0))
    stats = pipeline.stats
    assert stats.draft_calls == 0 and stats.target_calls == STEPS
    assert stats.predicted_at == 1.0 and stats.predicted_ratio == pytest.approx(2.1 / 2)
    assert stats.as_dict()["predicted_ratio"] == stats.predicted_ratio


@pytest.mark.parametrize("build", [sampler, by_error])
def test_where_a_call_costs_the_same_for_any_rows_the_largest_window_is_drafted(
    build: Callable[[StepCosts], DraftingSampler],
) -> None:
    pipeline = build(FLAT)
    for step in pipeline.generate(4, seed=0):
        before = step.done - step.accepted - 1
        assert step.drafted == (min(MOST, STEPS - 1 - before) if before else 0)
    stats = pipeline.stats
    assert stats.predicted_at == stats.acceptance and stats.target_calls < STEPS
    assert stats.predicted_ratio is not None and stats.predicted_ratio < 1


def test_the_prediction_is_that_of_the_best_length() -> None:
    assert predicted_ratio(1.0, BETWEEN, range(1, 6)) == pytest.approx(2.0 / 6)
    assert predicted_ratio(0.0, BETWEEN, range(1, 6)) == pytest.approx(1.2)
    assert predicted_ratio(0.5, BETWEEN, [2]) == pytest.approx(1.4 / 1.75)


@pytest.mark.parametrize("rule, exact", [(ReflectionCoupling(), True), (KeepsAll(), False)])
def test_lengths_that_follow_the_history_keep_the_law_and_a_biased_rule_does_not(
    rule: ReflectionCoupling, exact: bool
) -> None:
    rows = 600
    poor = IndependentDenoiser(gaussian_model(0.4, 0.7))
    plain = DenoisingPipeline(gaussian_model(), STEPS, batch_size=rows).complete(rows, seed=1)
    pipeline = sampler(BETWEEN, poor, rows, rule)
    lengths = {step.drafted for step in pipeline.generate(rows, seed=2)}
    assert (len(lengths) >= 4) or not exact, "rows choose by what stood"
    found = energy_test(pipeline.samples, plain, num_permutations=199)
    assert (found.p_value > 0.01) == exact


def test_with_one_table_a_sample_does_not_depend_on_its_batch() -> None:
    poor = IndependentDenoiser(gaussian_model(0.4, 0.7))
    together = sampler(BETWEEN, poor).complete(8, seed=3)
    alone = sampler(BETWEEN, poor, 1).complete(1, seed=3, indices=[5])
    assert torch.allclose(together[5], alone[0], atol=1e-6)


@pytest.fixture
def clocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Keep tables in a folder of their own; a pass takes as many seconds as its rows."""
    measurements: list[int] = []

    def seconds(passes: Sequence[Callable[[], object]]) -> list[float]:
        for run in passes:
            run()
        measurements.append(len(passes) // 2)  # of each length, none included, two passes
        return [cost for k in range(len(passes) // 2) for cost in (1.0 + k, k / 10)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("specstream.generation.drafting_sampler.fastest", seconds)
    return measurements


def test_costs_are_measured_once_of_the_rows_that_are_drawn_together(
    clocked: list[int], tmp_path: Path
) -> None:
    pipeline = sampler(None)
    pipeline.complete(20, seed=0)  # batches of 8, 8 and 4
    assert pipeline.costs == LINEAR and clocked == [1 + MOST]
    network = pipeline.target.network
    seen = network.rows
    assert seen > 20 * STEPS, "a measurement shows the target every length"
    pipeline.complete(20, seed=0)
    assert network.rows == seen + 20 * STEPS
    sampler(None).complete(8)  # the same table, from its file
    by_error(None).complete(8)
    sampler(None).complete(1)
    sampler(None, IndependentDenoiser(gaussian_model())).complete(8)
    assert len(clocked) == 4 == len(list((tmp_path / "specstream" / "costs").iterdir()))


def test_measuring_leaves_no_trace_in_the_counts_and_the_samples(clocked: list[int]) -> None:
    measured, given = sampler(None), sampler(LINEAR)
    assert torch.equal(measured.complete(3, seed=4), given.complete(3, seed=4))
    assert len(clocked) == 1
    before = measured.stats
    assert before.target_rows == given.stats.target_rows == 3 * STEPS
    measured.complete(2, seed=4)
    assert len(clocked) == 2, "of two samples together"
    assert before.target_rows == 3 * STEPS, "of the run before"


def test_no_more_is_measured_than_a_sample_has_steps_to_draft(clocked: list[int]) -> None:
    sampler(None, num_steps=3).complete(2)
    sampler(None, num_steps=1).complete(2)
    assert clocked == [3, 1]


def test_lengths_without_a_drafter_are_refused() -> None:
    for lengths in (CostModelLength(MOST), FixedLength(3)):
        with pytest.raises(ValueError, match="there is no drafter: lengths have no use"):
            DenoisingPipeline(gaussian_model(), STEPS, lengths=lengths)


def test_a_table_that_ends_before_the_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="`costs` end at 1 drafts, `lengths` at 5"):
        sampler(StepCosts(1.0, (1.0, 1.0), (0.0, 0.0)))
