"""The draft length: what the costs and a row's own history say, 0 included."""

from __future__ import annotations

import itertools

import pytest

from specstream.drafters import Drafter, DraftModel, PromptLookup
from specstream.generation import (
    CostModelLength,
    DraftLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.generation.lengths import RowLength, best_length
from specstream.models import PretrainedLM
from specstream.sampling import Sampling
from tests.toys import ScriptedLM, letters, spell, toy_lm

CHEAP = StepCosts(1.0, (0.0, 1.0, 1.0, 1.0, 1.0), (0.0, 0.1, 0.2, 0.3, 0.4))
DEAR = StepCosts(1.0, (0.0, 2.0, 3.0, 4.0, 5.0), (0.0, 1.0, 2.0, 3.0, 4.0))


def drafted_rounds(row: RowLength, accept: float, num_rounds: int) -> list[int]:
    """Play rounds in which a share `accept` of each draft stands; return all chosen lengths."""
    chosen = []
    for _ in range(num_rounds):
        chosen.append(row.choose())
        accepted = int(accept * chosen[-1])
        row.record(min(accepted + 1, chosen[-1]), accepted)
    return chosen


def test_the_best_length_maximises_committed_tokens_a_second() -> None:
    assert best_length(0.0, CHEAP, range(1, 5)) == 0
    assert best_length(0.95, CHEAP, range(1, 5)) == 4
    assert best_length(0.99, DEAR, range(1, 5)) == 0
    expected = max(range(5), key=lambda k: sum(0.6**i for i in range(k + 1)) / (1 + 0.1 * k))
    assert best_length(0.6, CHEAP, range(1, 5)) == expected


def test_a_perfect_drafter_is_used_at_full_length() -> None:
    chosen = drafted_rounds(CostModelLength(4).for_row(CHEAP), 1.0, 20)
    assert chosen[-10:] == [4] * 10


def test_a_useless_drafter_is_retried_at_growing_intervals() -> None:
    chosen = drafted_rounds(CostModelLength(4, retry=4).for_row(DEAR), 0.0, 400)
    tries = [i for i, length in enumerate(chosen) if length]
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert len(gaps) >= 4 and all(b >= 2 * a - 1 for a, b in itertools.pairwise(gaps))
    assert {chosen[i] for i in tries} == {1}, "a retry is one token"


def test_a_drafter_that_turns_useless_is_dropped_and_one_that_recovers_comes_back() -> None:
    row = CostModelLength(4, retry=2).for_row(CHEAP)
    assert drafted_rounds(row, 1.0, 10)[-1] == 4
    assert drafted_rounds(row, 0.0, 60)[-20:].count(0) >= 15
    assert drafted_rounds(row, 1.0, 200)[-1] == 4


def test_after_a_drafter_came_back_its_next_failure_is_retried_as_soon_as_the_first() -> None:
    row = CostModelLength(4, retry=4).for_row(CHEAP)
    drafted_rounds(row, 0.0, 100)
    drafted_rounds(row, 1.0, 200)
    again = drafted_rounds(row, 0.0, 60)
    first = again.index(0)
    assert again[first : first + 5] == [0, 0, 0, 0, 1]


def test_a_policy_that_allows_nothing_never_drafts() -> None:
    assert drafted_rounds(CostModelLength(0).for_row(StepCosts(1, (0,), (0,))), 0, 40) == [0] * 40


def test_thinned_lengths_keep_the_longest_and_are_all_that_is_chosen() -> None:
    policy = CostModelLength(4, every=3, retry=2)
    assert list(policy.choices) == [1, 4]
    row = policy.for_row(CHEAP)
    chosen = drafted_rounds(row, 1.0, 5) + drafted_rounds(row, 0.0, 60)
    assert set(chosen) == {0, 1, 4}
    assert list(FixedLength(3).choices) == [3] and not FixedLength(0).choices


def test_rounds_without_a_draft_teach_nothing() -> None:
    row, other = (CostModelLength(4).for_row(CHEAP) for _ in range(2))
    for _ in range(50):
        row.record(0, 0)
    assert row.choose() == other.choose()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedLength(-1), "max_tokens must lie in 0..64, not -1"),
        (lambda: FixedLength(65), "max_tokens must lie in 0..64, not 65"),
        (lambda: CostModelLength(prior=1.0), "prior and decay"),
        (lambda: CostModelLength(every=0), "every must be at least 1, not 0"),
        (lambda: CostModelLength(retry=0), "retry must be at least 1 round, not 0"),
    ],
)
def test_policies_that_make_no_sense_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def run(drafter: Drafter, target: PretrainedLM, lengths: DraftLength, costs: StepCosts, num: int):
    pipeline = SpeculativePipeline(
        target, drafter, letters(), lengths=lengths, sampling=Sampling(temperature=0.0),
        limits=Limits(num), costs=costs,
    )  # fmt: skip
    pipeline.complete([[1, 2, 3]])
    return pipeline.stats


def test_at_length_0_the_drafter_is_not_run_at_all() -> None:
    target, draft = ScriptedLM(spell("abcdefghijkl")), ScriptedLM([])
    stats = run(DraftModel(target, lambda: draft), target, FixedLength(0), CHEAP, 8)
    assert draft.calls == [] and stats.draft_calls == 0
    assert stats.share_plain == 1 and stats.accepted_length == 1 and stats.acceptance is None


def test_a_useless_drafter_leaves_almost_plain_decoding() -> None:
    target, draft = ScriptedLM([1] * 300), ScriptedLM([2] * 300)
    policy = CostModelLength(4)
    stats = run(DraftModel(target, lambda: draft), target, policy, DEAR, 256)
    assert stats.share_plain is not None and stats.share_plain > 0.95
    assert 1 <= stats.draft_calls <= 5 and stats.accepted_length == 1
    assert stats.target_calls == 256


def test_a_good_drafter_ends_at_the_longest_draft() -> None:
    target = ScriptedLM([1] * 300)
    stats = run(DraftModel(target, lambda: target), target, CostModelLength(4), CHEAP, 256)
    assert stats.mean_length is not None and stats.mean_length > 3.9
    assert stats.accepted_length is not None and stats.accepted_length > 4.9


def test_a_lookup_that_finds_nothing_is_a_plain_pass() -> None:
    target = ScriptedLM(list(range(26)))
    stats = run(PromptLookup(target, 2, 3), target, FixedLength(4), CHEAP, 16)
    assert target.calls[1:] == [1] * 16 and stats.share_plain == 1


def test_each_row_has_a_history_of_its_own() -> None:
    """Half of the rows copy a loop, the others find nothing; both share every batch."""
    target = toy_lm(12)
    policy = CostModelLength(4)
    rows = [policy.for_row(CHEAP) for _ in range(2)]
    drafted_rounds(rows[0], 1.0, 8)
    drafted_rounds(rows[1], 0.0, 20)
    assert rows[0].choose() == 4 and rows[1].choose() <= 1
    assert run(PromptLookup(target, 1, 2), target, policy, CHEAP, 24).draft_calls > 0


def test_meeting_all_shapes_drafts_every_length_and_changes_no_policy() -> None:
    target = toy_lm(26)
    policy = CostModelLength(4, every=2)
    drafted: list[int] = []

    class Watched(DraftModel):
        def propose(self, context, cache, num_tokens, sampling, noise):  # type: ignore[no-untyped-def]
            drafted.append(num_tokens)
            return super().propose(context, cache, num_tokens, sampling, noise)

    pipeline = SpeculativePipeline(
        target, Watched(target, lambda: toy_lm(26, seed=2)), letters(), lengths=policy,
        limits=Limits(12, ignore_eos=True), costs=DEAR,
    )  # fmt: skip
    pipeline.meet_shapes([spell("abc")])
    assert set(drafted[:2]) == {2, 4}
    assert pipeline.lengths is policy
    drafted.clear()
    pipeline.complete([spell("abc")])
    assert not drafted, "these costs forbid drafting"
