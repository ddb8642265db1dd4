"""Greedy speculative text is the target's own greedy text, in float32, token for token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig

from specstream.drafters import Drafter, DraftModel, LookupFirst, PromptLookup
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.models import PretrainedLM
from specstream.sampling import Sampling
from specstream.verification import BlockRejection, TokenRejection, TokenVerifier
from tests.toys import letters, nearby, toy_lm

VOCABULARY = 24
NEW = 10
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7], [0, 1, 0, 1, 0, 1, 0])
GREEDY = Sampling(temperature=0.0)
LENGTHS = (0, 1, 3, NEW + 3)  # the last drafts more than a row may still grow

DRAFTERS: dict[str, Callable[[PretrainedLM], Drafter]] = {
    "near": lambda target: DraftModel(target, lambda: nearby(target, 0.3)),
    "useless": lambda target: DraftModel(target, lambda: toy_lm(VOCABULARY, seed=9)),
    "itself": lambda target: DraftModel(target, lambda: target),
    "lookup": lambda target: PromptLookup(target, 1, 3),
    "lookup first": lambda target: LookupFirst(
        target, lambda t: DraftModel(t, lambda: nearby(t, 0.3)), 2, 3
    ),
}


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(VOCABULARY, num_layers=2)


@pytest.fixture(scope="module")
def plain(target: PretrainedLM) -> list[list[int]]:
    pipeline = AutoregressivePipeline(target, letters(), GREEDY, Limits(NEW))
    return [completion.tokens for completion in pipeline.complete(PROMPTS)]


def transformers_text(lm: PretrainedLM, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the greedy continuation by the library's own generate."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, eos_token_id=lm.vocab_size, pad_token_id=0
    )
    tokens = torch.tensor([prompt], device=lm.device)
    output = lm.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=config
    )
    return output[0, len(prompt) :].tolist()


def test_plain_text_is_that_of_transformers_generate(
    target: PretrainedLM, plain: list[list[int]]
) -> None:
    assert plain == [transformers_text(target, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("rule", "batch_size"),
    [(TokenRejection(), 1), (BlockRejection(), 3)],
    ids=["token, alone", "block, together"],
)
@pytest.mark.parametrize("name", DRAFTERS)
def test_speculative_text_is_plain_text_for_every_draft_length(
    target: PretrainedLM,
    plain: list[list[int]],
    name: str,
    rule: TokenVerifier,
    batch_size: int,
) -> None:
    drafter = DRAFTERS[name](target)
    for num_tokens in LENGTHS:
        pipeline = SpeculativePipeline(
            target, drafter, letters(), rule, FixedLength(num_tokens), GREEDY, Limits(NEW),
            batch_size,
        )  # fmt: skip
        found = [completion.tokens for completion in pipeline.complete(PROMPTS)]
        assert found == plain, f"draft length {num_tokens}"
    if name == "itself":
        assert pipeline.stats.acceptance in (None, 1)  # None: the limit cut every draft short


@pytest.mark.parametrize("name", ["near", "lookup first"])
def test_lengths_by_the_cost_model_change_nothing(
    target: PretrainedLM, plain: list[list[int]], name: str
) -> None:
    costs = StepCosts(1.0, (0.0, 1.1, 1.2, 1.3), (0.0, 0.1, 0.2, 0.3))
    pipeline = SpeculativePipeline(
        target, DRAFTERS[name](target), letters(), lengths=CostModelLength(3), sampling=GREEDY,
        limits=Limits(NEW), batch_size=3, costs=costs,
    )  # fmt: skip
    assert [completion.tokens for completion in pipeline.complete(PROMPTS)] == plain


def test_greedy_with_a_repetition_penalty_is_identical_too(target: PretrainedLM) -> None:
    penalised = Sampling(temperature=0.0, repetition_penalty=1.4)
    plain = AutoregressivePipeline(target, letters(), penalised, Limits(NEW), 4).complete(PROMPTS)
    for name in ("near", "lookup"):
        pipeline = SpeculativePipeline(
            target, DRAFTERS[name](target), letters(), None, FixedLength(4), penalised,
            Limits(NEW), 4,
        )  # fmt: skip
        assert [c.tokens for c in pipeline.complete(PROMPTS)] == [c.tokens for c in plain]


def test_a_long_row_beside_a_short_one_crosses_the_edge_of_a_view(target: PretrainedLM) -> None:
    prompts = [[i * 7 % VOCABULARY for i in range(121)], [5, 6]]
    drafter = DRAFTERS["near"](target)
    pipeline = SpeculativePipeline(
        target, drafter, letters(), None, FixedLength(5), GREEDY, Limits(20), 2
    )
    expected = [transformers_text(target, prompt, 20) for prompt in prompts]
    assert [completion.tokens for completion in pipeline.complete(prompts)] == expected


def test_a_drafter_with_a_shorter_context_drafts_up_to_its_end(target: PretrainedLM) -> None:
    short = toy_lm(VOCABULARY, max_positions=12)
    prompts = [[5, 6, 7, 8, 9], [i % 5 for i in range(13)]]
    pipeline = SpeculativePipeline(
        target, DraftModel(target, lambda: short), letters(), None, FixedLength(4), GREEDY,
        Limits(20), 2,
    )  # fmt: skip
    expected = [transformers_text(target, prompt, 20) for prompt in prompts]
    found = list(pipeline.generate(prompts))
    text = {n: [t for step in found if step.prompt == n for t in step.tokens] for n in (0, 1)}
    assert [text[0], text[1]] == expected
    assert all(step.origins[0].value == "plain" for step in found if step.prompt == 1)
    assert pipeline.stats.tested[0] > 0
