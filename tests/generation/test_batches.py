"""A row's text is its own: neighbours, batch size and the order of prompts change nothing."""

from __future__ import annotations

import pytest

from specstream.drafters import Drafter, DraftModel, LookupFirst, PromptLookup
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.models import PretrainedLM
from specstream.sampling import Sampling
from specstream.structures import Completion
from specstream.verification import BlockRejection
from tests.toys import letters, nearby, toy_lm

VOCABULARY = 12
PROMPTS = [
    [1, 2, 3, 1, 2, 3, 1, 2],
    [7],
    [i * 5 % VOCABULARY for i in range(30)],
    [4, 4],
    [9, 8, 9, 8, 9],
]
NUMBERS = [3, 11, 0, 700, 42]  # the prompts' own
COSTS = StepCosts(1.0, (0.0, 1.1, 1.2, 1.3, 1.4), (0.0, 0.15, 0.3, 0.45, 0.6))


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(VOCABULARY)


def drafter_named(name: str, target: PretrainedLM) -> Drafter:
    model = DraftModel(target, lambda: nearby(target, 0.3))
    if name == "draft model":
        return model
    return (
        PromptLookup(target, 1, 3) if name == "lookup" else LookupFirst(target, lambda _: model, 1)
    )


def texts(completions: list[Completion]) -> dict[int, tuple[list[int], list[str]]]:
    return {c.prompt: (c.tokens, [origin.value for origin in c.origins]) for c in completions}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lengths", [FixedLength(3), CostModelLength(4)], ids=["fixed", "cost"])
@pytest.mark.parametrize("name", ["draft model", "lookup", "lookup first"])
def test_a_row_decodes_as_if_it_were_alone(
    target: PretrainedLM, name: str, lengths: DraftLength, temperature: float
) -> None:
    def run(prompts: list[list[int]], numbers: list[int], batch_size: int):
        pipeline = SpeculativePipeline(
            target, drafter_named(name, target), letters(eos=5), BlockRejection(), lengths,
            Sampling(temperature, repetition_penalty=1.1), Limits(16), batch_size, costs=COSTS,
        )  # fmt: skip
        return texts(pipeline.complete(prompts, seed=4, indices=numbers))

    alone = run(PROMPTS, NUMBERS, 1)
    assert run(PROMPTS, NUMBERS, 5) == alone
    assert run(PROMPTS[::-1], NUMBERS[::-1], 2) == alone
    assert run(PROMPTS[2:4], NUMBERS[2:4], 2).items() <= alone.items()


def test_plain_rows_decode_as_if_they_were_alone(target: PretrainedLM) -> None:
    def run(batch_size: int):
        pipeline = AutoregressivePipeline(
            target, letters(eos=5), Sampling(), Limits(16), batch_size
        )
        return texts(pipeline.complete(PROMPTS, seed=4, indices=NUMBERS))

    assert run(5) == run(2) == run(1)


def test_the_seed_and_the_index_decide_the_text(target: PretrainedLM) -> None:
    pipeline = AutoregressivePipeline(target, letters(), limits=Limits(16), batch_size=4)
    first = [c.tokens for c in pipeline.complete([[1, 2]] * 4, seed=0)]
    assert len({tuple(tokens) for tokens in first}) == 4
    assert [c.tokens for c in pipeline.complete([[1, 2]] * 4)] == first  # the default seed is 0
    assert [c.tokens for c in pipeline.complete([[1, 2]] * 4, seed=1)] != first


def test_completions_come_in_the_order_of_the_prompts(target: PretrainedLM) -> None:
    pipeline = AutoregressivePipeline(target, letters(), limits=Limits(2), batch_size=2)
    found = pipeline.complete(PROMPTS, indices=NUMBERS)
    assert [completion.prompt for completion in found] == NUMBERS


def test_two_prompts_with_one_index_are_refused(target: PretrainedLM) -> None:
    pipeline = AutoregressivePipeline(target, letters(), limits=Limits(2))
    with pytest.raises(ValueError, match="2 prompts need as many different indices"):
        pipeline.complete([[1], [2]], indices=[3, 3])
