"""Rows of a batch whose drafts are trees: each as it would be alone, to its very end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from specstream.drafters import BlockDrafter, Drafter, Eagle3, Medusa, SpeculativeStreaming
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.generation.costs import _key
from specstream.generation.target_pass import _tested
from specstream.models import PretrainedLM
from specstream.sampling import Sampling
from specstream.structures import Origin, TokenDraft
from tests.toys import TreeOfLM, letters, toy_lm

WORDS = 12
COSTS = StepCosts(1.0, (0.0, 1.1, 1.35, 1.7), (0.0, 0.1, 0.1, 0.1))
GREEDY = Sampling(temperature=0.0)
DRAFTERS: dict[str, Callable[[PretrainedLM], Drafter]] = {
    "streams": lambda lm: SpeculativeStreaming(lm, 3, 2, branching=[3, 2, 1]),
    "pruned streams": lambda lm: SpeculativeStreaming(lm, 3, 2, branching=[3, 2, 1], kept_nodes=4),
    "Medusa": lambda lm: Medusa(lm, 3, branching=[3, 2, 1]),
    "EAGLE-3": lambda lm: Eagle3(lm, width=3, num_nodes=5, max_tokens=3),
    "block": lambda lm: BlockDrafter(lm, 3, 1, markov_rank=2, confidence=True),
}


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(WORDS, num_layers=3, sharpness=6.0).eval().requires_grad_(False)


@pytest.fixture(params=DRAFTERS, ids=str)
def drafter(request: pytest.FixtureRequest, target: PretrainedLM) -> Drafter:
    """Return a drafter whose every weight matters."""
    made = DRAFTERS[request.param](target)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=noise) * 0.3)
    return made.eval().requires_grad_(False)


def pipeline(
    target: PretrainedLM,
    drafter: Drafter,
    lengths: DraftLength,
    sampling: Sampling,
    batch_size: int,
    limits: Limits,
    eos: int | None = None,
) -> SpeculativePipeline:
    return SpeculativePipeline(
        target, drafter, letters(eos), None, lengths, sampling, limits, batch_size, costs=COSTS
    )


def test_what_a_row_drafts_does_not_depend_on_what_its_neighbours_want(
    target: PretrainedLM, drafter: Drafter
) -> None:
    prompts = [[i % WORDS, (3 * i + 1) % WORDS, (i * i) % WORDS][: 1 + i % 3] for i in range(24)]
    lengths = CostModelLength(3, prior=0.3, retry=2)
    texts, origins = [], []
    for batch_size in (1, 24):
        decoder = pipeline(target, drafter, lengths, Sampling(), batch_size, Limits(24))
        found = decoder.complete(prompts, seed=3)
        texts.append([completion.tokens for completion in found])
        origins.append([completion.origins for completion in found])
        assert 0 < decoder.stats.plain_rounds < decoder.stats.full_rounds
    assert texts[0] == texts[1] and origins[0] == origins[1]


def test_a_row_that_ended_inside_a_tree_leaves_the_others_alone(
    target: PretrainedLM, drafter: Drafter
) -> None:
    """Near the end of a view (256 slots), so that slots beyond its end would be out of range."""
    drafters = (drafter, TreeOfLM(target, [1, 1, 1, 1], drawn=False))
    for size in (248, 250, 252):
        long = [(7 * i + size) % WORDS for i in range(size)]
        plain = AutoregressivePipeline(target, letters(), GREEDY, Limits(12))
        texts = [c.tokens for c in plain.complete([long, *([word] for word in range(WORDS))])]
        eos = texts[0][0]
        word = next(word for word in range(WORDS) if eos not in texts[1 + word])
        prompts, expected = [long, [word]], [[eos], texts[1 + word]]
        for each in drafters:
            lengths = FixedLength(each.max_tokens)
            decoder = pipeline(target, each, lengths, GREEDY, 2, Limits(12), eos)
            assert [c.tokens for c in decoder.complete(prompts)] == expected


def test_a_path_that_ends_at_a_leaf_was_accepted_whole() -> None:
    """Below node 1 nothing was drafted; below node 0 there was node 2."""
    draft = TokenDraft(
        torch.tensor([[5, 6, 7]] * 4), None, torch.tensor([3, 3, 3, 2]),
        torch.tensor([[-1, -1, 0]] * 4), 2,
    )  # fmt: skip
    counts = torch.tensor([0, 1, 1, 1])
    path = torch.tensor([[3, 3], [1, 3], [0, 3], [0, 3]])
    assert _tested(draft, counts, path).tolist() == [1, 1, 2, 1]


def test_a_leaf_is_followed_by_a_bonus(target: PretrainedLM) -> None:
    """The target's second best token leads nowhere: nothing was refused after it."""
    drafter = TreeOfLM(target, [2, 1], drawn=False)
    leaves = [(0,), (1,), (0, 0)]
    drafter.paths = tuple(leaves)  # type: ignore[assignment]
    drafter.parents = [-1, -1, 0]
    decoder = pipeline(target, drafter, FixedLength(2), Sampling(), 1, Limits(64))
    (completion,) = decoder.complete([[1, 2, 3]], seed=1)
    stats = decoder.stats
    assert len(stats.tested) == 2 and stats.tested[1] < stats.accepted[0]
    origins = completion.origins
    after = [b for a, b in pairwise(origins) if a is Origin.ACCEPTED]
    assert Origin.BONUS in after


def test_costs_of_other_shapes_are_kept_apart(target: PretrainedLM) -> None:
    shapes: list[dict[str, Any]] = [
        {"kept_nodes": None}, {"kept_nodes": 1}, {"stream_layers": 2}, {"stream_layers": 3},
    ]  # fmt: skip
    kinds: list[Drafter] = [SpeculativeStreaming(target, 2, mode="shared", **s) for s in shapes]
    kinds += [BlockDrafter(target, size, 1) for size in (8, 64)]
    keys = {
        _key(pipeline(target, kind, CostModelLength(2), GREEDY, 1, Limits(8))) for kind in kinds
    }
    assert len(keys) == len(kinds)
