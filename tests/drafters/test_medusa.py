"""Medusa heads: what they read, what they guess, and that the target's law survives them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specstream.drafters import Drafter, LookupFirst, Medusa
from specstream.drafters.loading import load_drafter, save_drafter
from specstream.drafters.medusa import default_paths, sparse_paths
from specstream.drafters.static_tree import StaticTree
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.generation.lengths import RowLength
from specstream.models import PretrainedLM
from specstream.models.fingerprint import fingerprint
from specstream.sampling import Noise, Sampling
from specstream.structures import Context, Guarantee, TokenDraft
from specstream.verification import TokenRejection, TokenVerifier, TypicalAcceptance
from tests.toys import VOCABULARY, chi_square, count_tokens, joint_law, letters, toy_lm

WORDS = 12
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7], [0, 1])
GREEDY = Sampling(temperature=0.0)
ROWS = 1536
COSTS = StepCosts(1.0, (0.0, 1.3, 1.5, 1.7, 1.9), (0.0, 0.1, 0.1, 0.1, 0.1))


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(WORDS, num_layers=2)


@torch.no_grad()
def shaken(drafter: Medusa, amount: float = 0.3) -> Medusa:
    """Move every weight, so that no two heads and no two blocks are alike."""
    noise = torch.Generator().manual_seed(5)
    for weight in drafter.parameters():
        weight.add_(torch.randn(weight.shape, generator=noise) * amount)
    return drafter.eval().requires_grad_(False)


def medusa(target: PretrainedLM, **options: Any) -> Medusa:
    return shaken(Medusa(target, **options))


def pipeline(
    target: PretrainedLM,
    drafter: Drafter,
    lengths: DraftLength | None = None,
    sampling: Sampling = GREEDY,
    rule: TokenVerifier | None = None,
    new: int = 12,
    batch_size: int = 3,
    compile: bool = False,
) -> SpeculativePipeline:
    return SpeculativePipeline(
        target, drafter, letters(), rule, lengths or FixedLength(3), sampling, Limits(new),
        batch_size, compile, costs=COSTS,
    )  # fmt: skip


class Uneven(DraftLength):
    """Every row at another point of the same ups and downs, as a cost model may choose."""

    max_tokens = 4
    heights = (4, 0, 2, 0, 0, 3, 1)

    def __init__(self) -> None:
        self.rows = itertools.count()

    def for_row(self, costs: StepCosts | None) -> RowLength:
        row = RowOfUneven()
        row.heights = itertools.islice(itertools.cycle(self.heights), next(self.rows), None)
        return row


class RowOfUneven(RowLength):
    heights: Iterator[int]

    def choose(self) -> int:
        return next(self.heights)


class Watched(Medusa):
    """Checks every state it drafts from against a forward of the row without a cache."""

    rounds = 0

    def propose(
        self, context: Context, cache: Any, num_tokens: int, sampling: Sampling, noise: Noise
    ) -> TokenDraft:
        draft = super().propose(context, cache, num_tokens, sampling, noise)
        for row, tokens in enumerate(context.history):
            if len(tokens) < 2:
                assert draft.lengths[row] == 0
            elif context.active[row]:
                self.check(draft.tokens[row], tokens, num_tokens)
        self.rounds += 1
        return draft

    def check(self, drafted: Tensor, tokens: list[int], num_tokens: int) -> None:
        hidden = lm(self).hidden(torch.tensor([tokens]))[0, len(tokens) - 2]
        for node, path in enumerate(self.tree.paths[: self.tree.cut(num_tokens)]):
            logits = self.heads[len(path) - 1](hidden)
            expected = logits.sort(descending=True).values[path[-1]]
            torch.testing.assert_close(logits[drafted[node]], expected, atol=1e-3, rtol=1e-3)


def lm(drafter: Watched) -> PretrainedLM:
    (found,) = drafter.__dict__["watching"]
    return found


def watched(target: PretrainedLM, **options: Any) -> Watched:
    drafter = Watched(target, **options)
    drafter.watching = (target,)
    shaken(drafter)
    return drafter


@pytest.mark.parametrize("lengths", [FixedLength(4), FixedLength(2), Uneven()])
def test_a_draft_is_what_the_heads_say_of_the_text_whatever_was_rejected_before(
    target: PretrainedLM, lengths: DraftLength
) -> None:
    """After ragged prompts, rejected and accepted rounds, and rounds in which nothing was drafted.

    The reference reads the committed tokens alone, so a state that a rejected draft had touched,
    or that belonged to another place, would be another one.
    """
    drafter = watched(target)
    decoding = pipeline(target, drafter, lengths, new=24)
    decoding.complete(PROMPTS)
    assert drafter.rounds > 5 and 0 < sum(decoding.stats.accepted) < sum(decoding.stats.tested)
    if isinstance(lengths, Uneven):
        assert decoding.stats.plain_rounds > 5


def test_a_prompt_of_one_token_gets_no_draft_and_of_two_gets_one(target: PretrainedLM) -> None:
    steps = list(pipeline(target, medusa(target)).generate([[7], [0, 1]]))
    first = {step.prompt: step.origins[0].value for step in reversed(steps)}
    assert first[0] == "plain" and first[1] != "plain"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_targets_own_for_every_draft_length(
    target: PretrainedLM, batch_size: int
) -> None:
    plain = AutoregressivePipeline(target, letters(), GREEDY, Limits(12), batch_size)
    expected = [completion.tokens for completion in plain.complete(PROMPTS)]
    drafter = medusa(target, num_layers_per_head=2)
    for lengths in (*map(FixedLength, range(5)), Uneven()):
        decoding = pipeline(target, drafter, lengths, batch_size=batch_size)
        found = [completion.tokens for completion in decoding.complete(PROMPTS)]
        assert found == expected, lengths
        assert (sum(decoding.stats.accepted) > 0) is (lengths.max_tokens > 0)


def test_greedy_text_with_a_repetition_penalty_is_the_targets_own(target: PretrainedLM) -> None:
    penalised = Sampling(temperature=0.0, repetition_penalty=1.4)
    plain = AutoregressivePipeline(target, letters(), penalised, Limits(12), 3).complete(PROMPTS)
    found = pipeline(target, medusa(target), None, penalised).complete(PROMPTS)
    assert [c.tokens for c in found] == [c.tokens for c in plain]


def p_value(decoding: SpeculativePipeline, prompts: Sequence[list[int]]) -> float:
    """Return the p-value of tokens 1..3 after the prompts, all of them together."""
    kinds = len(prompts)
    found = decoding.complete([prompts[row % kinds] for row in range(ROWS)], seed=7)
    laws = [joint_law(decoding.target, p, decoding.sampling, 4).sum(0) / kinds for p in prompts]
    counts = [count_tokens(found[kind::kinds], slice(1, 4), VOCABULARY) for kind in range(kinds)]
    return chi_square(torch.stack(counts), torch.stack(laws))


@pytest.mark.parametrize(
    ("sampling", "lengths"),
    [(Sampling(), FixedLength(3)), (Sampling(0.7, top_k=4), CostModelLength(4, retry=1))],
    ids=["T=1", "T=0.7, top-k, lengths by cost"],
)
def test_the_law_of_sampled_text_is_the_targets(sampling: Sampling, lengths: DraftLength) -> None:
    small = toy_lm()
    decoding = pipeline(small, medusa(small), lengths, sampling, None, 4, ROWS)
    assert p_value(decoding, ([0, 1, 2, 1], [3], [4, 4])) > 0.01
    assert decoding.guarantee is Guarantee.EXACT_LAW
    assert 0 < sum(decoding.stats.accepted) < sum(decoding.stats.tested)


def test_typical_acceptance_changes_the_law_and_says_so() -> None:
    small = toy_lm()
    rule = TypicalAcceptance()
    decoding = pipeline(small, medusa(small), FixedLength(3), Sampling(), rule, 4, ROWS)
    assert p_value(decoding, ([0, 1, 2, 1],)) < 1e-6
    assert decoding.guarantee is Guarantee.HEURISTIC


def test_fresh_heads_say_what_the_targets_head_says(target: PretrainedLM) -> None:
    drafter, hidden = Medusa(target, num_layers_per_head=2), torch.randn(3, 16)
    for head in drafter.heads:
        torch.testing.assert_close(head(hidden), target.head(hidden), atol=0, rtol=0)


def test_each_head_and_each_block_has_weights_of_its_own(target: PretrainedLM) -> None:
    drafter = Medusa(target, 3, 2)
    drafter.heads[0].blocks[0].linear.weight.data.fill_(1.0)
    drafter.heads[0].output.weight.data.zero_()
    assert not drafter.heads[0].blocks[1].linear.weight.any()
    assert not drafter.heads[1].blocks[0].linear.weight.any()
    assert torch.equal(drafter.heads[1].output.weight, target.head.weight)
    assert target.head.weight.any()


def test_the_heads_are_as_many_numbers_as_the_paper_counts(target: PretrainedLM) -> None:
    size, heads = 16, 4
    drafter = Medusa(target, heads)
    found = drafter.extra_parameters()
    assert found == {"residual blocks": heads * (size**2 + size), "heads": heads * size * WORDS}
    assert sum(found.values()) == sum(p.numel() for p in drafter.parameters())


def test_a_biased_head_is_copied_with_its_bias(target: PretrainedLM) -> None:
    biased = toy_lm(WORDS)
    head = torch.nn.Linear(16, WORDS)
    biased.model.set_output_embeddings(head)
    drafter = Medusa(biased, 2)
    assert torch.equal(drafter.heads[1].output.bias, head.bias)
    assert drafter.extra_parameters()["heads"] == 2 * (16 * WORDS + WORDS)


def test_the_default_tree_lets_every_head_draft() -> None:
    for heads in (2, 4, 30):
        tree = StaticTree(default_paths(heads, 1000))
        assert tree.height == heads and len(tree) == max(24, heads)
    assert StaticTree(default_paths(2, 3)).num_ranks == 3


def test_a_sparse_tree_has_the_best_chain_and_the_likeliest_nodes_beside_it() -> None:
    paths = sparse_paths([[0.5, 0.4], [0.5, 0.4], [0.01, 0.0]], 6)
    assert sorted(paths) == [(0,), (0, 0), (0, 0, 0), (0, 1), (1,), (1, 0)]


def test_a_shorter_draft_is_a_lower_tree(target: PretrainedLM) -> None:
    drafter = medusa(target, branching=[3, 2, 1, 1])
    assert [drafter.num_slots(n) for n in (1, 2, 3, 4)] == [4, 10, 16, 22]
    decoding = pipeline(target, drafter, FixedLength(2), batch_size=1, new=9)
    decoding.complete(PROMPTS[:1])
    assert len(decoding.stats.tested) == 2


def test_trained_heads_are_saved_and_loaded_for_their_target_only(
    target: PretrainedLM, tmp_path: Path
) -> None:
    drafter = medusa(target, num_heads=3, num_layers_per_head=2, paths=[[0], [1], [0, 0]])
    save_drafter(tmp_path / "draft", drafter, letters(), "here", fingerprint(target.model))
    again = load_drafter(tmp_path / "draft", target)
    assert isinstance(again, Medusa) and again.tree.paths == drafter.tree.paths
    assert again.max_tokens == 2 and not any(p.requires_grad for p in again.parameters())
    for mine, theirs in zip(drafter.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine.bfloat16().float(), theirs)
    with pytest.raises(ValueError, match="was trained for the target 'here' as it was then"):
        load_drafter(tmp_path / "draft", toy_lm(WORDS, seed=1, num_layers=2))
    direct = Medusa(target, 3, 2, weights=str(tmp_path / "draft"))  # as a generate config does
    assert torch.equal(direct.heads[2].output.weight, again.heads[2].output.weight)


def test_heads_compute_in_their_targets_dtype(target: PretrainedLM) -> None:
    half = toy_lm(WORDS, num_layers=2)
    half.model.to(torch.bfloat16)
    drafter = Medusa(half)
    assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16}
    assert drafter.new_cache(1, 8).values.dtype is torch.bfloat16
    drafter.to(torch.float32)  # as in training
    assert pipeline(half, drafter).complete(PROMPTS)


def test_weights_that_are_missing_damaged_or_of_other_heads_are_refused(
    target: PretrainedLM, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*medusa.safetensors'"):
        Medusa(target, weights=str(tmp_path))
    medusa(target, num_heads=2).save(tmp_path, letters())
    with pytest.raises(ValueError, match=r"heads.2.*is missing there and \(16,\) here"):
        Medusa(target, 3, weights=str(tmp_path))
    with pytest.raises(ValueError, match=r"output.weight is \(12, 16\) there and \(13, 16\) here"):
        Medusa(toy_lm(13), 2, weights=str(tmp_path))
    (tmp_path / "medusa.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot read"):
        Medusa(target, 2, weights=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_heads": 0}, "num_heads must lie in 1..64, not 0"),
        ({"num_heads": 65}, "num_heads must lie in 1..64, not 65"),
        ({"num_layers_per_head": 0}, "num_layers_per_head must be at least 1, not 0"),
        ({"paths": [[0]], "branching": [1]}, "give paths or branching, not both"),
        ({"branching": [1, 1, 1], "num_heads": 2}, "height 3 needs as many heads, not 2"),
        ({"paths": [[0], [12]]}, "a tree of 13 ranks needs as many tokens, not 12"),
        ({"paths": [[0], [1, 0]]}, r"tree node \[1, 0\] has no parent"),
        ({"branching": [9, 9]}, "makes 90 nodes"),
    ],
)
def test_options_that_fit_no_heads_are_refused(
    target: PretrainedLM, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        Medusa(target, **options)


def test_heads_are_refused_where_they_do_not_fit(target: PretrainedLM) -> None:
    with pytest.raises(ValueError, match="sit on a causal language model, not on Linear"):
        Medusa(torch.nn.Linear(1, 1))
    drafter = Medusa(target)
    other = toy_lm(WORDS, num_layers=1)
    with pytest.raises(ValueError, match=r"\(2, 16, 12\), not \(1, 16, 12\)"):
        pipeline(other, drafter)
    with pytest.raises(ValueError, match=r"\(2, 16, 12\), not Linear"):
        drafter.check_target(torch.nn.Linear(1, 1), letters())
    with pytest.raises(ValueError, match="max_tokens 5 is more than the 4 that this Medusa drafts"):
        pipeline(target, drafter, FixedLength(5))
    with pytest.raises(ValueError, match="TokenRejection judges chains"):
        pipeline(target, drafter, rule=TokenRejection())
    with pytest.raises(ValueError, match="does not draw"):
        LookupFirst(target, lambda _: drafter)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_heads_draft_what_eager_ones_do(target: PretrainedLM) -> None:
    drafter = medusa(target, num_heads=2)
    texts = [
        [c.tokens for c in pipeline(target, drafter, FixedLength(2), compile=on).complete(PROMPTS)]
        for on in (True, False)
    ]
    assert texts[0] == texts[1]
