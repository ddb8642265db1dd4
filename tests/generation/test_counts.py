"""The published numbers, recounted from the emitted tokens and the target's calls."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specstream.drafters import DraftModel, PromptLookup
from specstream.generation import (
    AutoregressivePipeline,
    FixedLength,
    Limits,
    SpeculativePipeline,
)
from specstream.models import PretrainedLM
from specstream.sampling import Sampling, probabilities
from specstream.structures import Guarantee, Law, Stats, TokenDraft, Verdict
from specstream.verification import BlockRejection, TokenRejection
from tests.toys import ScriptedLM, letters, nearby, spell, toy_lm

K = 3
PROMPT = [1, 2, 3]


@dataclass(frozen=True)
class Watching(TokenRejection):
    """Token-wise rejection that notes sum min(p, q) at every node that was tested."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "overlaps", [])

    def __call__(self, draft: TokenDraft, p: Tensor, *noise: Tensor) -> Verdict:
        verdict = super().__call__(draft, p, *noise)
        if draft.probs is not None:
            overlap = torch.minimum(p[:, :-1], draft.probs).sum(-1)  # (B, K)
            steps = torch.arange(overlap.shape[1])
            reached = steps <= verdict.accepted.sum(1, keepdim=True)
            self.overlaps.extend(overlap[reached & (steps < draft.lengths[:, None])].tolist())
        return verdict


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(8)


@pytest.fixture(scope="module")
def drafter(target: PretrainedLM) -> DraftModel:
    return DraftModel(target, lambda: nearby(target, 0.3))


@pytest.mark.parametrize("rule", [TokenRejection(), BlockRejection()], ids=["token", "block"])
def test_tau_is_what_the_emitted_tokens_and_the_targets_calls_say(
    target: PretrainedLM, drafter: DraftModel, rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    extend = target.extend

    def counted(tokens, *arguments, **options):
        widths.append(tokens.shape[1])
        return extend(tokens, *arguments, **options)

    monkeypatch.setattr(target, "extend", counted)
    pipeline = SpeculativePipeline(
        target, drafter, letters(), rule, FixedLength(K), limits=Limits(120)
    )
    steps = list(pipeline.generate([PROMPT], seed=2))
    verify = widths[1:]  # the first pass read the prompt
    assert len(verify) == len(steps) == pipeline.stats.target_calls
    assert sum(verify) == pipeline.stats.target_rows
    assert sum(len(step.tokens) for step in steps) == pipeline.stats.elements == 120
    left, full = 120, []
    for step in steps:  # a round is whole when the limit neither shortened its draft nor cut it
        full += [len(step.tokens)] if left > K else []
        left -= len(step.tokens)
    assert pipeline.stats.full_rounds == len(full)
    assert pipeline.stats.accepted_length == pytest.approx(sum(full) / len(full))
    assert pipeline.stats.draft_calls == sum(width > 1 for width in verify)


def test_alpha_is_the_mean_overlap_of_the_two_laws(
    target: PretrainedLM, drafter: DraftModel
) -> None:
    rule = Watching()
    pipeline = SpeculativePipeline(
        target, drafter, letters(), rule, FixedLength(K), limits=Limits(24), batch_size=512
    )
    pipeline.complete([PROMPT] * 512, seed=3)
    overlaps = torch.tensor(rule.overlaps, dtype=torch.float64)
    assert pipeline.stats.acceptance is not None and len(overlaps) > 5000
    spread = (overlaps * (1 - overlaps)).mean().div(len(overlaps)).sqrt().item()
    assert abs(pipeline.stats.acceptance - overlaps.mean().item()) < 3 * spread


def test_tau_is_one_plus_the_sum_of_the_prefix_products(
    target: PretrainedLM, drafter: DraftModel
) -> None:
    pipeline = SpeculativePipeline(
        target, drafter, letters(), lengths=FixedLength(K), limits=Limits(40), batch_size=64
    )
    pipeline.complete([PROMPT] * 64, seed=3)
    stats = pipeline.stats
    prefixes = list(itertools.accumulate(stats.alphas, lambda a, b: a * b))
    assert stats.accepted_length == pytest.approx(1 + sum(prefixes), abs=1e-12)
    assert stats.mean_length == K and stats.share_plain == 0


@torch.no_grad()
def first_round_tokens(target: PretrainedLM, draft: PretrainedLM) -> float:
    """Return E[tokens of the first round] exactly: 1 + sum over prefixes of prod min(p, q)."""
    total = 1.0
    for size in range(1, K + 1):
        tails = torch.tensor(list(itertools.product(range(8), repeat=size)))
        tokens = torch.cat([torch.tensor(PROMPT).expand(len(tails), -1), tails], 1)
        least = torch.minimum(*(probabilities(m(tokens), Sampling()) for m in (target, draft)))
        rows = least[:, len(PROMPT) - 1 : -1].gather(-1, tails[:, :, None])[..., 0]
        total += rows.double().prod(1).sum().item()
    return total


def test_the_first_rounds_tokens_meet_their_exact_expectation(
    target: PretrainedLM, drafter: DraftModel
) -> None:
    pipeline = SpeculativePipeline(
        target, drafter, letters(), lengths=FixedLength(K), limits=Limits(K + 1), batch_size=4096
    )
    found = pipeline.generate([PROMPT] * 4096, seed=1)
    first = torch.tensor([float(len(next(found).tokens)) for _ in range(4096)])
    expected = first_round_tokens(target, drafter.model)
    assert abs(first.mean().item() - expected) < 3 * first.std().item() / 64


def test_block_verification_commits_at_least_as_much(
    target: PretrainedLM, drafter: DraftModel
) -> None:
    taus = []
    for rule in (TokenRejection(), BlockRejection()):
        pipeline = SpeculativePipeline(
            target, drafter, letters(), rule, FixedLength(5), limits=Limits(16), batch_size=256
        )
        pipeline.complete([PROMPT] * 256, seed=3)
        taus.append(pipeline.stats.accepted_length)
    assert taus[1] > taus[0]


def test_a_round_that_ends_a_row_without_being_cut_counts() -> None:
    target = ScriptedLM(spell("xyabcdefghijkl"))

    def stats(limit: int, eos: str | None = None) -> Stats:
        pipeline = SpeculativePipeline(
            target, DraftModel(target, lambda: target), letters(spell(eos)[0] if eos else None),
            lengths=FixedLength(3), limits=Limits(limit),
        )  # fmt: skip
        pipeline.complete([spell("xy")])
        return pipeline.stats

    assert (stats(8).full_rounds, stats(8).full_committed) == (2, 8)
    assert (stats(9).full_rounds, stats(9).full_committed) == (2, 8)  # the ninth: draft shortened
    assert (stats(12, eos="f").full_rounds, stats(12, eos="f").full_committed) == (1, 4)  # cut
    assert (stats(12, eos="d").full_rounds, stats(12, eos="d").full_committed) == (1, 4)  # whole


def test_plain_decoding_counts_a_call_for_each_token(target: PretrainedLM) -> None:
    pipeline = AutoregressivePipeline(target, letters(), limits=Limits(10), batch_size=2)
    pipeline.complete([PROMPT, [4], [5, 6]])
    stats = pipeline.stats
    assert (stats.prompts, stats.elements, stats.target_calls, stats.target_rows) == (3, 30, 20, 30)
    assert stats.draft_calls == 0 and stats.acceptance is None and stats.accepted_length == 1
    assert stats.seconds > 0 and stats.as_dict()["elements_per_second"] == 30 / stats.seconds


def test_the_clock_stands_while_the_caller_works(target: PretrainedLM) -> None:
    pipeline = AutoregressivePipeline(target, letters(), limits=Limits(3))
    pipeline.complete([PROMPT])
    for _ in pipeline.generate([PROMPT]):
        before = pipeline.stats.seconds
        torch.randn(500, 500) @ torch.randn(500, 500)
        assert pipeline.stats.seconds == before


def test_a_run_promises_what_its_weakest_part_does(target: PretrainedLM) -> None:
    @dataclass(frozen=True)
    class Heuristic(TokenRejection):
        guarantee = Guarantee.HEURISTIC
        needs = frozenset({Law.DETERMINISTIC})

    drafter = PromptLookup(target)
    pipeline = SpeculativePipeline(target, drafter, letters(), Heuristic(), FixedLength(2))
    assert pipeline.stats.as_dict()["guarantee"] == "heuristic"
    exact = SpeculativePipeline(target, drafter, letters(), lengths=FixedLength(2))
    assert exact.stats.as_dict()["guarantee"] == "exact law"
