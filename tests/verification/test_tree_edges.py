"""What a tree is, chains as trees, the two paths of recursive rejection, and the edges of both.

That the emitted law is the target's is held by test_tree.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import TokenDraft, Verdict
from specstream.verification import (
    TokenRejection,
    TreeRejection,
    accepted_path,
    ancestor_matrix,
    depths,
)
from tests.verification.trees import ALMOST_ONE

RULE = TreeRejection()
SIZES = [1, 2, 3, 7, 8, 9, 64]


def random_parents(rows: int, size: int, seed: int = 0) -> Tensor:
    """Return trees (rows, size) in topological order, in no other order."""
    noise = torch.rand(rows, size, generator=torch.Generator().manual_seed(seed))
    return (noise * (torch.arange(size) + 1)).long() - 1


def random_draft(
    rows: int, size: int, vocabulary: int, mode: str = "drawn", seed: int = 0
) -> tuple[TokenDraft, Tensor]:
    """Return ragged random trees, in which siblings may be the same token, and p (rows, size+1, V).

    The draft reports the q that it was drawn from ("drawn"), its tokens ("one-hot"), or nothing.
    """
    noise = torch.Generator().manual_seed(seed)
    shape = (rows, size + 1, vocabulary)
    scores = torch.randn(shape, generator=noise, dtype=torch.float64)
    p = scores.softmax(-1)
    q = (scores + torch.randn(shape, generator=noise, dtype=torch.float64))[:, 1:].softmax(-1)
    uniforms = torch.rand(rows, size, generator=noise, dtype=torch.float64)
    tokens, lengths = draw(q, uniforms), torch.randint(0, size + 1, (rows,), generator=noise)
    probs = {"drawn": q, "one-hot": torch.nn.functional.one_hot(tokens, vocabulary).double()}
    return TokenDraft(tokens, probs.get(mode), lengths, random_parents(rows, size, seed)), p


def coins(rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    prompts, nodes = torch.arange(rows), torch.arange(size).expand(rows, -1)
    noise = Noise(seed)
    return (
        noise.uniform(prompts, nodes, Role.ACCEPT),
        noise.uniform(prompts, prompts * 0, Role.CORRECT),
    )


def judge(draft: TokenDraft, p: Tensor, accept: float, correct: float) -> Verdict:
    uniforms = torch.full(draft.tokens.shape, accept, dtype=torch.float64)
    return RULE(draft, p, uniforms, torch.full((len(p),), correct, dtype=torch.float64))


def same(one: Verdict, other: Verdict) -> bool:
    return torch.equal(one.accepted, other.accepted) and torch.equal(
        one.correction, other.correction
    )


def ends(draft: TokenDraft, accepted: Tensor) -> Tensor:
    """Return the row of p at the end of each path, having walked it node by node."""
    assert draft.parents is not None
    found = []
    for row in range(len(accepted)):
        here = -1
        for i in torch.nonzero(accepted[row])[:, 0].tolist():
            assert draft.parents[row, i] == here, "a path from the root, parent by parent"
            assert i < draft.lengths[row]
            here = i
        found.append(here + 1)
    return torch.tensor(found)


@pytest.mark.parametrize("size", SIZES)
def test_a_node_sees_itself_and_its_ancestors(size: int) -> None:
    chain = torch.arange(size)[None] - 1
    parents = torch.cat([random_parents(5, size), chain, torch.full_like(chain, -1)])
    expected = torch.zeros(len(parents), size, size, dtype=torch.bool)
    for row, above in enumerate(parents.tolist()):
        for i in range(size):
            j = i
            while j >= 0:
                expected[row, i, j] = True
                j = above[j]
    assert torch.equal(ancestor_matrix(parents), expected)
    assert torch.equal(depths(parents), expected.sum(-1))


def test_an_accepted_path_lists_its_nodes_and_pads_with_k() -> None:
    accepted = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    assert accepted_path(accepted, 3).tolist() == [[1, 3, 4], [5, 5, 5], [0, 5, 5]]
    assert accepted_path(accepted, 2).tolist() == [[1, 3], [5, 5], [0, 5]]
    assert accepted_path(accepted, 7)[0].tolist() == [1, 3, 4, 5, 5, 5, 5]
    assert accepted_path(accepted[:, :0], 2).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("mode", ["drawn", "silent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_gets_the_verdict_of_token_rejection(mode: str, dtype: torch.dtype) -> None:
    draft, p = random_draft(400, 5, 6, mode)
    probs = None if draft.probs is None else draft.probs.to(dtype)
    chain = replace(draft, probs=probs, parents=None)
    spelled_out = replace(chain, parents=(torch.arange(5) - 1).expand(400, -1))
    expected = TokenRejection()(chain, p.to(dtype), *coins(400, 5))
    assert expected.accepted.any() and not expected.accepted.all()
    for tree in (chain, spelled_out):
        assert same(RULE(tree, p.to(dtype), *coins(400, 5)), expected)


@pytest.mark.parametrize("vocabulary", [2, 5, 40])
def test_a_one_hot_law_that_is_reported_changes_nothing(vocabulary: int) -> None:
    silent, p = random_draft(400, 9, vocabulary, "silent")
    reporting, _ = random_draft(400, 9, vocabulary, "one-hot")
    verdict = RULE(silent, p, *coins(400, 9))
    assert verdict.accepted.any()
    assert same(RULE(reporting, p, *coins(400, 9)), verdict)


@pytest.mark.parametrize("mode", ["drawn", "silent"])
def test_refused_tokens_are_struck_at_the_end_of_the_path_and_other_branches_do_not_matter(
    mode: str,
) -> None:
    p = torch.tensor([[[0.0, 0.4, 0.6]] + [[1.0, 0.0, 0.0]] * 3])
    tokens, parents = torch.tensor([[1, 2, 1]]), torch.tensor([[-1, 0, 0]])
    q = torch.nn.functional.one_hot(tokens, 3).float() if mode == "drawn" else None
    draft = TokenDraft(tokens, q, torch.tensor([3]), parents)
    for correct in (1e-9, ALMOST_ONE):  # the root's 1 is refused, another branch holds 1 and 2
        assert judge(draft, p, ALMOST_ONE, correct).correction.tolist() == [2]


@pytest.mark.parametrize("mode", ["drawn", "silent"])
@pytest.mark.parametrize("accept", [0.0, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("correct", [0.0, ALMOST_ONE])
def test_nothing_the_target_excludes_is_ever_emitted(
    mode: str, accept: float, correct: float
) -> None:
    draft, p = random_draft(300, 8, 12, mode, seed=1)
    p = probabilities(p.log().float() * 3, Sampling(top_k=2))  # siblings often hold all of it
    verdict = judge(draft, p, accept, correct)
    law = p[torch.arange(300), ends(draft, verdict.accepted)]
    assert (law.gather(-1, verdict.correction[:, None]) > 0).all()
    assert draft.parents is not None
    above = p.gather(1, (draft.parents + 1)[:, :, None].expand(-1, -1, 12))
    emitted = above.gather(-1, draft.tokens[:, :, None])[:, :, 0]
    assert (emitted[verdict.accepted] > 0).all()


@pytest.mark.parametrize("mode", ["drawn", "silent"])
def test_where_the_residual_rounds_to_nothing_the_ends_own_law_is_drawn_from(mode: str) -> None:
    inner = [0.3, 0.7 - 2e-7, 0.0]  # sums to a little under 1, as rounded laws do
    p = torch.tensor([[[0.0, 0.0, 1.0], inner, inner, inner]])
    parents, lengths = torch.tensor([[-1, 0, 0]]), torch.tensor([3])
    if mode == "silent":  # under node 0 both tokens that p allows were drafted
        draft = TokenDraft(torch.tensor([[2, 0, 1]]), None, lengths, parents)
    else:  # one child of node 0, whose q is above p wherever p is
        q = torch.tensor([[[0.0, 0.0, 1.0], [0.3 + 1e-7, 0.7, 0.0], [0.0, 0.0, 0.0]]])
        draft = TokenDraft(torch.tensor([[2, 0, 0]]), q, lengths - 1, parents)
    accept = torch.tensor([[0.5, ALMOST_ONE, ALMOST_ONE]], dtype=torch.float64)
    for correct, token in ((0.1, 0), (0.9, 1)):
        verdict = RULE(draft, p, accept, torch.tensor([correct], dtype=torch.float64))
        assert verdict.accepted.tolist() == [[True, False, False]]
        assert verdict.correction.tolist() == [token]


def test_a_first_sibling_drawn_from_the_target_is_always_accepted() -> None:
    draft, p = random_draft(200, 6, 9)
    assert draft.parents is not None
    above = p.gather(1, (draft.parents + 1)[:, :, None].expand(-1, -1, 9)).float()
    tokens = draw(above, coins(200, 6, seed=3)[0])
    draft = replace(draft, tokens=tokens, probs=above, lengths=torch.full((200,), 6))
    verdict = judge(draft, p.float(), ALMOST_ONE, 0.5)
    for row, end in enumerate(ends(draft, verdict.accepted).tolist()):
        assert end - 1 not in draft.parents[row].tolist(), "the path ends at a leaf"


def test_a_greedy_target_takes_the_branch_that_it_would_have_said() -> None:
    draft, p = random_draft(300, 8, 3, "silent", seed=4)
    draft = replace(draft, lengths=torch.full((300,), 8))
    greedy = probabilities(p.log(), Sampling(temperature=0.0))
    best = p.argmax(-1)
    for accept in (0.0, 0.6, ALMOST_ONE):
        verdict = judge(draft, greedy, accept, accept)
        last = ends(draft, verdict.accepted)
        assert torch.equal(verdict.correction, best[torch.arange(300), last])
        assert draft.parents is not None
        asked = best.gather(1, draft.parents + 1)
        assert (draft.tokens == asked)[verdict.accepted].all()
        unmet = (draft.tokens == asked) & (draft.parents + 1 == last[:, None])
        assert not unmet.any(), "no child at the path's end was the target's token"


@pytest.mark.parametrize("mode", ["drawn", "silent"])
def test_a_row_does_not_depend_on_the_others_or_on_padding(mode: str) -> None:
    draft, p = random_draft(12, 7, 6, mode)
    accept, correct = coins(12, 7)
    whole = RULE(draft, p, accept, correct)
    for b, size in enumerate(draft.lengths.tolist()):
        assert draft.parents is not None
        probs = None if draft.probs is None else draft.probs[b : b + 1, :size]
        row = TokenDraft(
            draft.tokens[b : b + 1, :size], probs, draft.lengths[b : b + 1],
            draft.parents[b : b + 1, :size],
        )  # fmt: skip
        alone = RULE(row, p[b : b + 1, : size + 1], accept[b : b + 1, :size], correct[b : b + 1])
        assert torch.equal(alone.accepted[0], whole.accepted[b, :size])
        assert not whole.accepted[b, size:].any()
        assert alone.correction[0] == whole.correction[b]


@pytest.mark.parametrize("mode", ["drawn", "silent"])
def test_what_lies_beyond_a_rows_length_does_not_matter(mode: str) -> None:
    draft, p = random_draft(60, 6, 5, mode)
    assert draft.parents is not None
    beyond = torch.arange(6) >= draft.lengths[:, None]
    clean = RULE(draft, p, *coins(60, 6))
    for token, parent, filling in ((0, 5, 0.0), (4, -1, 7.0), (2, 2, 1.0)):
        probs = draft.probs
        if probs is not None:
            probs = probs.masked_fill(beyond[:, :, None], filling)
        soiled = TokenDraft(
            draft.tokens.masked_fill(beyond, token), probs, draft.lengths,
            draft.parents.masked_fill(beyond, parent),
        )  # fmt: skip
        laws = torch.cat([p[:, :1], p[:, 1:].masked_fill(beyond[:, :, None], filling)], 1)
        assert same(RULE(soiled, laws, *coins(60, 6)), clean)


@pytest.mark.parametrize("reports_law", [True, False])
def test_a_draft_of_no_tokens_is_plain_sampling(reports_law: bool) -> None:
    p = random_draft(6, 0, 9)[1]
    none = torch.empty(6, 0, dtype=torch.long)
    accept, correct = coins(6, 0)
    for parents in (None, none):
        draft = TokenDraft(none, p[:, 1:] if reports_law else None, torch.zeros(6).long(), parents)
        verdict = RULE(draft, p, accept, correct)
        assert verdict.accepted.shape == (6, 0) and verdict.accepted.dtype == torch.bool
        assert torch.equal(verdict.correction, draw(p[:, 0], correct))


@pytest.mark.parametrize("mode", ["drawn", "silent"])
def test_the_rule_compiles_to_one_graph_for_all_trees_of_a_size(mode: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(RULE.__call__, fullgraph=True, dynamic=False, backend=count)
    for trial in range(4):
        draft, p = random_draft(3, 4, 7, mode, seed=trial)
        assert same(compiled(draft, p, *coins(3, 4)), RULE(draft, p, *coins(3, 4)))
    assert len(graphs) == 1


def test_what_is_asked_of_a_tree_compiles_to_one_graph() -> None:
    torch._dynamo.reset()

    def ask(parents: Tensor, accepted: Tensor) -> list[Tensor]:
        return [ancestor_matrix(parents), depths(parents), accepted_path(accepted, 4)]

    compiled = torch.compile(ask, fullgraph=True, dynamic=False, backend="aot_eager")
    asked = random_parents(3, 6), torch.tensor([[True, False] * 3] * 3)
    assert all(map(torch.equal, compiled(*asked), ask(*asked)))
