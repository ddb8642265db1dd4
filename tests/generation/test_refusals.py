"""What a pipeline cannot do is said in one line, when it is built or when a prompt arrives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from specstream.drafters import DraftModel, LookupFirst, PromptLookup
from specstream.generation import AutoregressivePipeline, FixedLength, Limits, SpeculativePipeline
from specstream.models import PretrainedLM
from specstream.structures import Law
from specstream.verification import TokenRejection
from tests.toys import letters, nearby, toy_lm


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(8, max_positions=32)


def test_a_drafter_of_another_vocabulary_is_refused(target: PretrainedLM) -> None:
    with pytest.raises(ValueError, match="drafter has a vocabulary of 9, target one of 8"):
        DraftModel(target, lambda: toy_lm(9))
    drafter = DraftModel(toy_lm(9), lambda: toy_lm(9))
    for wrapped in (drafter, LookupFirst(target, lambda _: drafter)):
        with pytest.raises(ValueError, match="they must share a tokenizer"):
            SpeculativePipeline(target, wrapped, letters())


def test_a_verifier_that_cannot_judge_the_drafters_law_is_refused(target: PretrainedLM) -> None:
    @dataclass(frozen=True)
    class DrawnOnly(TokenRejection):
        needs = frozenset({Law.DRAWN})

    with pytest.raises(
        ValueError, match="DrawnOnly judges drafts that are drawn; PromptLookup's are deterministic"
    ):
        SpeculativePipeline(target, PromptLookup(target), letters(), DrawnOnly())


def test_a_lookup_around_a_drafter_that_does_not_draw_is_refused(target: PretrainedLM) -> None:
    with pytest.raises(ValueError, match="PromptLookup does not draw"):
        LookupFirst(target, PromptLookup)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "a prompt is empty"),
        ("", "a prompt is empty"),
        ([1, 8], "a prompt holds token 8, outside the target's vocabulary of 8"),
        ([-1], "a prompt holds token -1, outside"),
        ([1] * 29, "a prompt of 29 tokens and 4 new ones exceed the target's context of 32"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(
    target: PretrainedLM, prompt: list[int] | str, message: str
) -> None:
    pipeline = AutoregressivePipeline(target, letters(), limits=Limits(4))
    with pytest.raises(ValueError, match=message):
        pipeline.complete([[1], prompt])


def test_a_prompt_may_fill_the_context_to_the_last_token(target: PretrainedLM) -> None:
    drafter = DraftModel(target, lambda: nearby(target))
    pipeline = SpeculativePipeline(
        target, drafter, letters(), lengths=FixedLength(6), limits=Limits(4), batch_size=2
    )
    found = pipeline.complete([[1] * 28, [2]])
    assert [len(completion.tokens) for completion in found] == [4, 4]


def test_chat_needs_a_template(target: PretrainedLM) -> None:
    pipeline = AutoregressivePipeline(target, letters(), limits=Limits(4), chat=True)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        pipeline.complete(["ab"])
