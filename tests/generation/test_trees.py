"""Trees in the pipeline: the law, greedy identity, the cache after a kept path, and the counts."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

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
from specstream.structures import TokenDraft, Verdict
from specstream.verification import TokenVerifier, TreeRejection
from tests.toys import TreeOfLM, chi_square, count_tokens, joint_law, letters, nearby, toy_lm

VOCABULARY = 5
NEW = 10
ROWS = 512
PROMPTS = ([3, 1, 4, 1, 0, 2], [2], [0, 1, 0, 1])
WARPED = Sampling(0.7, top_k=3, repetition_penalty=1.3)
COSTS = StepCosts(1.0, (0.0, 1.05, 1.1), (0.0, 0.1, 0.2))


class DeafToSiblings(TreeRejection):
    """Not exact: every sibling is judged by one law, as if none had been drawn before it."""

    def __call__(
        self, draft: TokenDraft, p: Tensor, noise_accept: Tensor, noise_correct: Tensor
    ) -> Verdict:
        if draft.probs is None or draft.parents is None:  # nothing was drafted
            return super().__call__(draft, p, noise_accept, noise_correct)
        first = (draft.parents[:, :, None] == draft.parents[:, None, :]).to(torch.uint8).argmax(2)
        probs = draft.probs.take_along_dim(first[:, :, None], 1)
        return super().__call__(replace(draft, probs=probs), p, noise_accept, noise_correct)


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(VOCABULARY)


def decoder(
    target: PretrainedLM,
    drawn: bool,
    sampling: Sampling,
    lengths: DraftLength | None = None,
    batch_size: int = 1,
    rule: TokenVerifier | None = None,
    compile: bool = False,
) -> SpeculativePipeline:
    return SpeculativePipeline(
        target,
        TreeOfLM(nearby(target, 0.4), [2, 2], drawn),
        letters(),
        rule,
        lengths or FixedLength(2),
        sampling,
        Limits(NEW, ignore_eos=True),
        batch_size,
        compile,
        costs=COSTS,
    )


@pytest.mark.parametrize("drawn", [False, True])
def test_greedy_text_is_the_targets_own(target: PretrainedLM, drawn: bool) -> None:
    greedy = Sampling(temperature=0)
    plain = AutoregressivePipeline(target, letters(), greedy, Limits(NEW, ignore_eos=True))
    expected = [completion.tokens for completion in plain.complete(PROMPTS)]
    for lengths in (FixedLength(0), FixedLength(1), FixedLength(2), CostModelLength(2, retry=2)):
        for batch_size in (1, 3):
            found = decoder(target, drawn, greedy, lengths, batch_size).complete(PROMPTS)
            assert [completion.tokens for completion in found] == expected


def law_p_value(pipeline: SpeculativePipeline, rows: int = ROWS) -> float:
    """Return the p-value of tokens 1..3 of many rows of two prompts together."""
    prompts = PROMPTS[:2]
    found = pipeline.complete([prompts[row % 2] for row in range(rows)], seed=11)
    counts = [count_tokens(found[kind::2], slice(1, 4), VOCABULARY) for kind in range(2)]
    laws = [joint_law(pipeline.target, list(p), pipeline.sampling, 4).sum(0) / 2 for p in prompts]
    return chi_square(torch.stack(counts), torch.stack(laws))


@pytest.mark.parametrize(
    ("drawn", "sampling"),
    [(True, Sampling()), (True, WARPED), (False, WARPED)],
)
def test_the_law_is_the_targets(target: PretrainedLM, drawn: bool, sampling: Sampling) -> None:
    pipeline = decoder(target, drawn, sampling, batch_size=ROWS)
    pipeline.limits = Limits(4, ignore_eos=True)
    assert law_p_value(pipeline) > 0.01


def test_a_rule_that_is_not_exact_is_found_out(target: PretrainedLM) -> None:
    pipeline = decoder(target, True, Sampling(), batch_size=ROWS, rule=DeafToSiblings())
    pipeline.limits = Limits(4, ignore_eos=True)
    assert law_p_value(pipeline) < 1e-4


def test_a_row_does_not_depend_on_its_neighbours(target: PretrainedLM) -> None:
    alone = decoder(target, True, Sampling(), batch_size=1).complete(PROMPTS, seed=5)
    together = decoder(target, True, Sampling(), batch_size=3).complete(PROMPTS, seed=5)
    assert [c.tokens for c in alone] == [c.tokens for c in together]


def test_heights_and_paths_are_what_is_counted(target: PretrainedLM) -> None:
    pipeline = decoder(target, False, Sampling(temperature=0))
    completions = pipeline.complete(PROMPTS)
    stats = pipeline.stats
    assert len(stats.tested) == 2, "alpha is counted by depth, not by node"
    assert stats.elements == sum(len(completion.tokens) for completion in completions)
    assert stats.accepted_length == pytest.approx(
        1 + sum(stats.accepted) / stats.full_rounds, abs=1e-9
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_tree_decodes_what_an_eager_one_does(target: PretrainedLM) -> None:
    torch._dynamo.reset()
    sampling = Sampling(0.8, repetition_penalty=1.1)
    eager = decoder(target, False, sampling, batch_size=2).complete(PROMPTS, seed=1)
    compiled = decoder(target, False, sampling, batch_size=2, compile=True)
    assert [c.tokens for c in compiled.complete(PROMPTS, seed=1)] == [c.tokens for c in eager]
