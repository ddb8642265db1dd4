"""Drafted canvases: what stands, what is masked again, who goes on, and that it always ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specstream.drafters import CanvasDrafter, MaskedDraftModel
from specstream.generation import DualDiffusionPipeline, MaskedPipeline, Sampler
from specstream.generation.batch import Limits
from specstream.generation.lengths import CostModelLength, DraftLength, FixedLength, StepCosts
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.sampling import Noise, Role, Sampling
from specstream.structures import CanvasStep, Origin
from specstream.unmasking import StaticSchedule, Threshold, Unmasking
from specstream.verification import (
    CanvasVerifier,
    ConfidenceThreshold,
    DisagreementWithConfidence,
    ExactMatch,
    KLThreshold,
    NoVerification,
    TrustVerifier,
)
from tests.masked_toys import (
    EOS,
    MASK,
    Guesser,
    Never,
    Recorded,
    ScriptedMasked,
    Told,
    characters,
    masked_lm,
    spelled,
    texts,
    texts_alone,
)

GREEDY, DRAWN = Sampling(temperature=0.0), Sampling()
JUDGES: list[CanvasVerifier] = [
    ExactMatch(),
    ConfidenceThreshold(0.6),
    DisagreementWithConfidence(0.8),
    KLThreshold(0.5),
]
RULES = [*JUDGES, TrustVerifier(), NoVerification()]
RAGGED: list[Any] = [
    "a",
    "abcde",
    [MASK, *spelled("abc"), MASK, MASK, *spelled("de")],
    "cc[MASK:3]a[MASK]",
    "ea[MASK]",
    "bd",
    "[MASK:9]a",
    [EOS, *spelled("dcbabcd")],
]
SCRIPT = [EOS, *spelled("abcdeabcdeabc")]


def drafter(
    seed: int = 5,
    block_length: int | None = 4,
    threshold: float = 0.6,
    max_positions: int = 128,
) -> MaskedDraftModel:
    model = masked_lm(seed, block_length=block_length, max_positions=max_positions)
    return MaskedDraftModel(torch.nn.Identity(), lambda: model, Threshold(threshold)).eval()


def dual(
    target: PretrainedMaskedLM,
    guesser: CanvasDrafter,
    rule: CanvasVerifier,
    lengths: int | DraftLength = 2,
    copies: int = 2,
    calls: int | None = None,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
    blocks: int | None = None,
    unmasking: Unmasking | None = None,
    costs: StepCosts | None = None,
) -> DualDiffusionPipeline:
    lengths = FixedLength(lengths) if isinstance(lengths, int) else lengths
    sampler = Sampler(unmasking or StaticSchedule(99), sampling, Limits(8), blocks)
    return DualDiffusionPipeline(
        target,
        guesser,
        characters(),
        rule,
        lengths,
        copies,
        calls,
        sampler,
        batch_size,
        costs=costs,
    )


def plain(target: PretrainedMaskedLM, pipeline: DualDiffusionPipeline) -> MaskedPipeline:
    return MaskedPipeline(target, characters(), pipeline.sampler, pipeline.batch_size)


def by_prompt(pipeline: MaskedPipeline, prompts: Sequence[Any], seed: int = 0) -> list[Any]:
    """Return each prompt's steps, after holding what every run must keep."""
    found: dict[int, list[CanvasStep]] = {i: [] for i in range(len(prompts))}
    for step in pipeline.generate(prompts, seed=seed):
        found[step.prompt].append(step)
    for i, prompt in enumerate(prompts):
        tokens = pipeline.encode(prompt).tokens
        for step in found[i]:
            changed = [k for k, pair in enumerate(zip(tokens, step.tokens, strict=True))
                       if pair[0] != pair[1]]  # fmt: skip
            assert changed == step.filled and all(tokens[k] == MASK for k in changed)
            assert all(step.tokens[k] == MASK for k in step.remasked)
            assert set(step.remasked) == set(step.drafted) - set(step.filled)
            tokens = step.tokens
        assert [step.finished for step in found[i]] == [False] * (len(found[i]) - 1) + [True]
        assert MASK not in tokens
        for before, after in zip(found[i], found[i][1:], strict=False):
            assert before.filled or (after.filled and not after.drafted)
    return list(found.values())


@pytest.mark.parametrize("seed", range(3))
def test_a_target_that_drafts_for_itself_is_always_right(seed: int) -> None:
    target = masked_lm(seed, sharpness=5.0)
    itself = MaskedDraftModel(target, lambda: target, Threshold(1.0))  # one position a step
    for rule in (ExactMatch(), KLThreshold(1e-4)):
        pipeline = dual(target, itself, rule, lengths=1)
        assert texts(pipeline, RAGGED) == texts(plain(target, pipeline), RAGGED)
        assert pipeline.stats.acceptance == 1.0
    assert pipeline.stats.accepted == [pipeline.stats.elements]


def test_a_wholly_right_draft_is_taken_whole() -> None:
    target = ScriptedMasked(SCRIPT)
    itself = MaskedDraftModel(target, lambda: ScriptedMasked(SCRIPT), Threshold(1.0))
    for rule in (*RULES[:5], ConfidenceThreshold(0.99)):
        for copies, rounds in ((1, 2), (2, 2), (3, 2)):
            pipeline = dual(target, itself, rule, lengths=4, copies=copies)
            (steps,) = by_prompt(pipeline, ["ab"])
            assert steps[-1].tokens == SCRIPT[:11] and pipeline.stats.acceptance == 1.0
            own = [len(step.filled) - len(step.drafted) for step in steps]
            # Shown whole, the draft lets the target make its own step in the same pass.
            assert own == ([1, 0] if copies == 1 else [0, 0])
            assert pipeline.stats.target_calls == rounds


@pytest.mark.parametrize("rule", [Never(), *JUDGES], ids=str)
def test_a_draft_that_always_falls_hands_over_to_the_target(rule: CanvasVerifier) -> None:
    target = masked_lm(1) if rule == Never() else ScriptedMasked(SCRIPT)
    wrong = Guesser(lambda prompt, place: 3 + (SCRIPT[place] - 1) % 5)
    for unmasking in (StaticSchedule(3), StaticSchedule(99, "margin"), Threshold(0.6)):
        for copies, blocks in ((1, None), (2, None), (2, 4)):
            pipeline = dual(target, wrong, rule, 3, copies, unmasking=unmasking, blocks=blocks)
            alone = plain(target, pipeline)
            assert texts(pipeline, ["a", "ab[MASK:3]c[MASK]"]) == texts(
                alone, ["a", "ab[MASK:3]c[MASK]"]
            )
            needed, drafts, free = alone.stats.target_calls, 0, 0
            while free < needed:  # after the n-th draft that falls, 2^n rounds are the target's
                free, drafts = free + 2**drafts, drafts + 1
            assert pipeline.stats.target_calls == needed + drafts
            assert pipeline.stats.acceptance == 0.0


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("rule", [*RULES, Never()], ids=str)
def test_every_rule_ends_and_rows_do_not_see_their_neighbours(
    rule: CanvasVerifier, sampling: Sampling
) -> None:
    cases = [(drafter(block_length=None), 1, 4), (drafter(), 2, None), (drafter(6), 1, None)]
    remasks = set()
    for seed, (guesser, copies, blocks) in enumerate(cases[:2] if sampling.greedy else cases[1:]):
        target = masked_lm(seed)
        pipeline = dual(target, guesser, rule, 3, copies, None, sampling, blocks=blocks)
        together = by_prompt(pipeline, RAGGED, seed=seed)
        for i, prompt in enumerate(RAGGED):
            alone = pipeline.generate([prompt], seed=seed, indices=[i])
            assert list(alone) == together[i]
        remasks |= {tuple(place for step in steps for place in step.remasked) for steps in together}
    assert rule in RULES[4:] or len(remasks) > 1  # the rows' differ


def test_rows_that_the_drafter_cannot_draft_leave_the_others_alone() -> None:
    guesser = drafter(max_positions=12)
    for rule in (NoVerification(), TrustVerifier(), ExactMatch()):
        for copies, calls in ((1, 3), (2, None)):
            pipeline = dual(masked_lm(), guesser, rule, 3, copies, calls, DRAWN)
            assert texts(pipeline, RAGGED) == texts_alone(pipeline, RAGGED)


def test_without_verification_the_target_is_never_asked() -> None:
    target, guesser = masked_lm(), drafter()
    for copies in (1, 2):
        pipeline = dual(target, guesser, NoVerification(), 3, copies)
        steps = by_prompt(pipeline, RAGGED)
        assert pipeline.stats.target_calls == pipeline.stats.target_rows == 0
        assert pipeline.stats.acceptance == 1.0
        assert all(step.filled == step.drafted for row in steps for step in row)
    handed = dual(target, Guesser(lambda prompt, place: 3), NoVerification(), FixedLength(0))
    assert texts(handed, ["ab"]) == texts(plain(target, handed), ["ab"])
    assert handed.stats.target_calls == 8


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_trusted_verifier_puts_its_own_tokens_in(copies: int) -> None:
    target = masked_lm(2)
    pipeline = dual(
        target, Guesser(lambda prompt, place: 3 + place % 5), TrustVerifier(), 8, copies
    )
    (filled,) = texts(pipeline, ["ab"])
    draft = torch.tensor([[EOS, *spelled("ab"), *[3 + place % 5 for place in range(3, 11)]]])
    expected = draft[0].tolist()
    for turn in range(copies):
        places = [i for i in range(3, 11) if (i - 3) % copies == turn]
        shown = draft.clone()
        if copies > 1:
            shown[0, places] = MASK
        for i in places:
            expected[i] = int(target(shown)[0, i].argmax())
    assert filled == expected and filled != draft[0].tolist()
    assert pipeline.stats.target_calls == 1 and pipeline.stats.target_rows == copies * 11


def test_what_is_filled_to_the_right_of_a_fallen_position_stays() -> None:
    target = ScriptedMasked(SCRIPT)
    right = Guesser(lambda prompt, place: SCRIPT[place] if place > 6 else 3, choose=max)
    pipeline = dual(target, right, ExactMatch(), lengths=6)
    (steps,) = by_prompt(pipeline, ["ab"])
    assert steps[0].filled == [6, 7, 8, 9, 10] or steps[0].filled == [7, 8, 9, 10]
    assert steps[0].remasked and max(steps[0].remasked) < min(steps[0].filled)
    for step in steps:
        assert step.tokens[7:] == SCRIPT[7:11]
    shown = target.calls[1]  # the target's next look has them for context
    assert (shown[:, 7:11] == torch.tensor(SCRIPT[7:11])).all()


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("rule", [*RULES, Never()], ids=str)
def test_a_limit_of_target_calls_ends_it(rule: CanvasVerifier, calls: int) -> None:
    sampling = DRAWN if calls == 2 else GREEDY
    pipeline = dual(masked_lm(1), drafter(), rule, 2, 2, calls, sampling)
    steps = by_prompt(pipeline, RAGGED)
    assert pipeline.stats.target_calls <= calls
    assert pipeline.stats.elements == sum(len(step.filled) for row in steps for step in row)
    alone = texts_alone(pipeline, RAGGED[:3])
    assert alone == [steps[i][-1].tokens for i in range(3)]


def test_the_last_call_fills_what_it_has_remasked_by_its_own_law() -> None:
    target = masked_lm(1)
    pipeline = dual(target, Guesser(lambda prompt, place: 3), Never(), 8, 1, 1)
    first, last = by_prompt(pipeline, ["ab"])[0]
    assert first.remasked == last.filled == list(range(3, 11)) and not last.drafted
    shown = torch.tensor([[EOS, *spelled("ab"), *[3] * 8]])
    assert last.tokens[3:] == target(shown)[0, 3:].argmax(-1).tolist()
    assert pipeline.complete(["ab"])[0].origins == [Origin.PLAIN] * 8


def test_a_position_in_a_copy_of_its_own_does_not_see_its_own_draft() -> None:
    target = masked_lm(3)
    laws = {}
    for copies in (1, 2):
        for token in (3, 4):
            seen = Recorded(TrustVerifier())
            guesser = Guesser(lambda prompt, place, t=token: t if place == 6 else 5)  # type: ignore[misc]
            texts(dual(target, guesser, seen, 8, copies), ["ab"])
            laws[copies, token] = seen.laws[0][0]
    assert torch.equal(laws[2, 3][6], laws[2, 4][6])
    assert not torch.allclose(laws[1, 3][6], laws[1, 4][6])
    assert not torch.allclose(laws[2, 3][5], laws[2, 4][5])  # of the other copy: it sees it


def test_copies_show_all_but_their_own_share_of_the_draft() -> None:
    target = ScriptedMasked(SCRIPT)
    pipeline = dual(target, Guesser(lambda prompt, place: SCRIPT[place]), ExactMatch(), 5, 3)
    texts(pipeline, ["ab", "a[MASK]b[MASK]"])
    shown = target.calls[0].view(3, 2, 11)  # the second row is shorter: 5 positions
    for row, drafted in enumerate(([3, 4, 5, 6, 7], [2, 4])):
        for rank, place in enumerate(drafted):
            hidden = [bool(shown[copy, row, place] == MASK) for copy in range(3)]
            assert hidden == [copy == rank % 3 for copy in range(3)]
    assert (shown[:, 0, 8:] == MASK).all() and (shown[:, 0, :3] != MASK).all()
    whole = dual(target, Guesser(lambda prompt, place: SCRIPT[place]), ExactMatch(), 5, 1)
    target.calls.clear()
    texts(whole, ["ab"])
    assert target.calls[0][0].tolist() == [*SCRIPT[:8], MASK, MASK, MASK]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.3, top_k=2), DRAWN], ids=str)
def test_the_rules_read_how_sure_the_target_is_itself(sampling: Sampling) -> None:
    target, seen = masked_lm(sharpness=5.0), Recorded(ConfidenceThreshold(0.6))
    guess = Guesser(lambda prompt, place: 3 + place % 5)
    texts(dual(target, guess, seen, 3, 1, None, sampling), ["ab"])
    law = target(seen.drafts[0].tokens).softmax(-1)
    torch.testing.assert_close(seen.laws[0], law)
    assert (law.amax(-1) < 0.99).any()


def test_drafts_keep_to_the_current_block() -> None:
    pipeline = dual(
        masked_lm(1), drafter(block_length=None, threshold=0.1), ExactMatch(), 4, blocks=4
    )
    for start, steps in zip((3, 6), by_prompt(pipeline, ["ab", "abcde"]), strict=True):
        tokens = pipeline.encode("ab" if start == 3 else "abcde").tokens
        for step in steps:
            current = (tokens.index(MASK) - start) // 4
            assert all((place - start) // 4 == current for place in step.drafted + step.filled)
            tokens = step.tokens


def test_the_counts_are_those_of_the_steps_yielded() -> None:
    for i, rule in enumerate((*RULES, Never())):
        pipeline = dual(masked_lm(1), drafter(), rule, 3, 1 + i % 2, None, DRAWN)
        steps = [step for row in by_prompt(pipeline, RAGGED) for step in row]
        stats = pipeline.stats
        drafted = sum(len(step.drafted) for step in steps)
        fallen = sum(len(step.remasked) for step in steps)
        assert sum(stats.tested) == stats.draft_lengths == drafted
        replaced = sum(len(step.replaced) for step in steps)
        assert bool(replaced) == isinstance(rule, TrustVerifier)
        assert sum(stats.accepted) == drafted - fallen - replaced
        assert stats.acceptance == (drafted - fallen - replaced) / drafted
        assert stats.full_rounds == len(steps)
        assert stats.plain_rounds == sum(not step.drafted for step in steps)
        assert stats.elements == stats.full_committed == sum(len(s.filled) for s in steps)
        assert stats.draft_calls >= 1 and stats.prompts == len(RAGGED)


def test_a_row_is_told_how_many_of_its_steps_stood_whole() -> None:
    told = Told(3)
    guess = Guesser(lambda prompt, place: SCRIPT[place] if place != 4 else 3)
    texts(dual(ScriptedMasked(SCRIPT), guess, ExactMatch(), told), ["ab[MASK:3]", "a[MASK]"])
    assert told.outcomes == [(2, 1), (1, 1), (1, 0)]  # places 3 4 5, 2, and 4 once more


@pytest.mark.parametrize("rule", [Never(), ConfidenceThreshold(0.6)], ids=str)
def test_no_coin_is_tossed_twice(rule: CanvasVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    tossed: list[tuple[Role, int]] = []
    uniform = Noise.uniform

    def toss(self: Noise, prompts: Tensor, elements: Tensor, role: Role) -> Tensor:
        tossed.extend((role, element) for element in elements.flatten().tolist())
        return uniform(self, prompts, elements, role)

    monkeypatch.setattr(Noise, "uniform", toss)
    for steps, copies in ((3, 1), (3, 2), (0, 1)):
        tossed.clear()
        texts(dual(masked_lm(), drafter(), rule, steps, copies, None, DRAWN), ["ab"])
        assert len(set(tossed)) == len(tossed) > 3 * 11


def test_completions_say_which_tokens_were_drafted() -> None:
    target = ScriptedMasked(SCRIPT)
    guess = Guesser(lambda prompt, place: SCRIPT[place] if place != 5 else 3)
    pipeline = dual(target, guess, ExactMatch(), 4)
    (found,) = pipeline.complete(["ab"])
    assert found.text == "cdeabcde" and found.tokens == SCRIPT[3:11]
    origins = [Origin.ACCEPTED] * 8
    origins[2] = Origin.PLAIN
    assert found.origins == origins


def test_a_cost_model_chooses_the_steps_of_each_row() -> None:
    target = ScriptedMasked(SCRIPT)
    guess = Guesser(lambda prompt, place: SCRIPT[place])
    free, dear = (StepCosts(1.0, (1.0, c, c, c), (0.0, c, c, c)) for c in (0.6, 9.0))
    for costs, drafts in ((free, True), (dear, False)):
        pipeline = dual(target, guess, ExactMatch(), CostModelLength(3), 1, costs=costs)
        assert texts(pipeline, ["ab", "a[MASK]"]) == [SCRIPT[:11], SCRIPT[:3]]
        assert bool(pipeline.stats.draft_calls) == drafts
        assert pipeline.stats.target_calls == (2 if drafts else 8)
        assert drafts or pipeline.stats.share_plain == 1.0
    with pytest.raises(ValueError, match="end at 3 drafts"):
        dual(target, guess, ExactMatch(), CostModelLength(4), 1, costs=free)


def test_what_does_not_fit_together_is_refused_in_one_line() -> None:
    for target, options, reason in (
        (masked_lm(corruption=0.0), {"copies": 1}, "it was not trained with corruption"),
        (masked_lm(mask_id=2), {}, "mask token"),
        (masked_lm(vocab_size=9), {}, "vocabulary"),
        (masked_lm(), {"copies": 0}, "copies"),
        (masked_lm(), {"calls": 0}, "max_target_calls"),
        (masked_lm(block_length=4), {}, "bidirectional"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            dual(target, drafter(), ExactMatch(), **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
