"""Nested steps: the static sampler's own output, in no more calls and usually fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specstream.generation import FreeDavePipeline, MaskedPipeline, Sampler
from specstream.generation.batch import Limits
from specstream.generation.free_dave import Drafted
from specstream.generation.lengths import CostModelLength, DraftLength, FixedLength, StepCosts
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.sampling import Sampling
from specstream.unmasking import StaticSchedule, Threshold
from tests.masked_toys import (
    EOS,
    MASK,
    ScriptedMasked,
    Told,
    characters,
    masked_lm,
    spelled,
    texts,
    texts_alone,
)

RAGGED: list[Any] = [
    "a",
    "abcde",
    [MASK, *spelled("abc"), MASK, MASK, *spelled("de")],
    "cc[MASK:3]a",
    "ea[MASK]",
]


class AcceptsAll(FreeDavePipeline):
    """The negative control: whatever was drafted stands."""

    def _agreed(self, drafts: list[Drafted], said: Tensor) -> Tensor:
        return torch.full_like(drafts[0].canvas.lengths, len(drafts) - 1)


def sampler(num_steps: int = 8, order: str = "confidence", blocks: int | None = None) -> Sampler:
    schedule = StaticSchedule(num_steps, order)  # type: ignore[arg-type]
    return Sampler(schedule, limits=Limits(12), block_tokens=blocks)


def nested(
    lm: PretrainedMaskedLM,
    lengths: int | DraftLength,
    options: Sampler,
    batch_size: int = 1,
    costs: StepCosts | None = None,
    kind: type[FreeDavePipeline] = FreeDavePipeline,
) -> FreeDavePipeline:
    lengths = FixedLength(lengths) if isinstance(lengths, int) else lengths
    return kind(lm, characters(), lengths, options, batch_size, costs=costs)


def compare(
    lm: PretrainedMaskedLM, drafted: int, options: Sampler, prompts: Sequence[Any], rows: int = 1
) -> tuple[FreeDavePipeline, MaskedPipeline]:
    """Hold nested steps against the static sampler; return both after their runs."""
    plain = MaskedPipeline(lm, characters(), options, rows)
    fast = nested(lm, drafted, options, rows)
    assert texts(fast, prompts) == texts(plain, prompts)
    assert fast.stats.target_calls <= plain.stats.target_calls
    assert fast.stats.elements == plain.stats.elements
    return fast, plain


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("blocks", [None, 4])
def test_the_output_is_that_of_the_static_sampler(order: str, blocks: int | None) -> None:
    for drafted in range(1, 7):
        for seed in (drafted % 3, 3):
            num_steps = 3 + (seed + drafted) % 6
            options = sampler(num_steps, order, blocks)
            compare(masked_lm(seed), drafted, options, RAGGED, rows=len(RAGGED))


def test_rows_do_not_see_their_neighbours() -> None:
    for seed in range(3):
        fast = nested(masked_lm(seed), 3, sampler(6), batch_size=3)
        assert texts(fast, RAGGED) == texts_alone(fast, RAGGED)


def test_guided_steps_are_nested_too() -> None:
    options = Sampler(StaticSchedule(6), limits=Limits(12), guidance=0.7)
    compare(masked_lm(1), 3, options, RAGGED, rows=len(RAGGED))


@pytest.mark.parametrize("blocks", [None, 4])
def test_an_easy_model_needs_fewer_calls(blocks: int | None) -> None:
    lm = ScriptedMasked([EOS, *spelled("abcdeabcdeabcde")])
    options = sampler(12 if blocks is None else 4, blocks=blocks)
    for drafted, calls in ((0, 12), (1, 7), (2, 5), (3, 4), (5, 3), (11, 2), (30, 2)):
        fast, plain = compare(lm, drafted, options, ["ab"])
        assert plain.stats.target_calls == 12
        # The first call, then one for each 1 + drafted steps; the last of all needs no look.
        assert fast.stats.target_calls == calls
        assert drafted == 0 or fast.stats.acceptance == 1.0


def test_without_drafts_it_is_the_static_sampler() -> None:
    fast, plain = compare(masked_lm(), 0, sampler(), ["abc"])
    assert fast.stats.target_calls == plain.stats.target_calls == 8
    assert fast.stats.target_rows == plain.stats.target_rows
    assert fast.stats.acceptance is None and fast.stats.share_plain == 1.0
    fast, _ = compare(masked_lm(), 1, sampler(), ["abc"])
    assert fast.stats.target_rows > fast.stats.target_calls * 16  # a second canvas


def test_accepting_every_draft_gives_another_text() -> None:
    differ = 0
    for seed in range(3):
        lm, options = masked_lm(seed), sampler(12)
        lossy = nested(lm, 4, options, len(RAGGED), kind=AcceptsAll)
        differ += texts(lossy, RAGGED) != texts(MaskedPipeline(lm, characters(), options), RAGGED)
    assert differ == 3


def test_no_canvas_is_looked_at_that_nothing_follows() -> None:
    lm = ScriptedMasked([EOS, *spelled("abcdeabcdeabcde")])
    texts(nested(lm, 30, sampler(12), batch_size=2), ["ab", "[MASK]"])
    assert [len(canvases) for canvases in lm.calls] == [2, 22]  # of 12 steps the last is not
    assert all((canvases == MASK).any() for canvases in lm.calls)


def test_the_counts_are_those_of_the_steps_yielded() -> None:
    fast = nested(masked_lm(1), 3, sampler(12), batch_size=len(RAGGED))
    steps = list(fast.generate(RAGGED))
    assert all(step.filled and not step.drafted for step in steps)
    stats = fast.stats
    assert stats.full_rounds == len(steps) and stats.elements == stats.full_committed
    assert stats.accepted_length == stats.elements / len(steps)
    # One position a step here: each round makes its own and those drafts that stood.
    assert sum(stats.accepted) == stats.elements - len(steps)
    assert stats.tested[0] >= stats.tested[1] >= stats.tested[2] >= 1
    assert stats.tested[1:] == stats.accepted[:2] or stats.tested[1] <= stats.accepted[0]
    assert 0 < stats.acceptance < 1  # type: ignore[operator]


def test_a_finished_row_is_no_longer_counted() -> None:
    lm = ScriptedMasked([EOS, *spelled("abcdeabcdeabcde")])
    fast = nested(lm, 3, sampler(12), batch_size=2)
    steps = [step for step in fast.generate(["ab", "[MASK]"]) if step.prompt == 1]
    assert len(steps) == 1
    assert (fast.stats.full_rounds, fast.stats.plain_rounds) == (4, 1)
    assert (fast.stats.tested, fast.stats.accepted) == ([3, 3, 3], [3, 3, 3])
    assert fast.stats.draft_lengths == 9


def test_a_row_is_told_of_the_drafts_that_it_had() -> None:
    told = Told(3)
    script = ScriptedMasked([EOS, *spelled("abcdeabcdeabcde")])
    texts(nested(script, told, sampler(12), batch_size=3), ["[MASK:2]", "[MASK]", "[MASK:7]"])
    assert sorted(told.outcomes) == [(1, 1), (2, 2), (3, 3)]  # and of none in the second row
    told = Told(3)
    fast = nested(masked_lm(1), told, sampler(12), batch_size=len(RAGGED))
    texts(fast, RAGGED)
    assert all(accepted <= tested <= accepted + 1 for tested, accepted in told.outcomes)
    assert sum(tested for tested, _ in told.outcomes) == sum(fast.stats.tested)
    assert sum(accepted for _, accepted in told.outcomes) == sum(fast.stats.accepted)


def test_a_cost_model_chooses_how_many_steps_are_drafted() -> None:
    lm = ScriptedMasked([EOS, *spelled("abcdeabcdeabcde")])
    free, dear = (StepCosts(1.0, (1.0, c, c, c), (0.0,) * 4) for c in (1.01, 9.0))
    calls = []
    for costs in (free, dear):
        fast = nested(lm, CostModelLength(3), sampler(12), costs=costs)
        texts(fast, ["ab"])
        calls.append(fast.stats.target_calls)
    assert calls == [4, 12]
    with pytest.raises(ValueError, match="end at 3 drafts"):
        nested(lm, CostModelLength(8), sampler(), costs=free)


@pytest.mark.parametrize(
    "options",
    [
        Sampler(StaticSchedule(4), Sampling(1.0)),
        Sampler(Threshold(0.9)),
        Sampler(StaticSchedule(4, "random")),
    ],
)
def test_what_has_no_greedy_schedule_is_refused_in_one_line(options: Sampler) -> None:
    with pytest.raises(ValueError, match="nested steps") as caught:
        nested(masked_lm(), 4, options)
    assert "\n" not in str(caught.value)
