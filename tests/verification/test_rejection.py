"""Token-wise and block verification: acceptance against its formulas, and the edges.

That the emitted law is the target's is held by test_exactness.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import TokenDraft, Verdict
from specstream.verification import BlockRejection, TokenRejection
from specstream.verification.rejection import ChainRejection

RULES: list[ChainRejection] = [TokenRejection(), BlockRejection()]
ALMOST_ONE = 1 - 2.0**-53


def laws(rows: int, num_drafted: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return p (B, K+1, V) and q (B, K, V) in float64."""
    noise = torch.Generator().manual_seed(seed)
    shape = (rows, num_drafted + 1, vocabulary)
    target = torch.randn(shape, generator=noise, dtype=torch.float64)
    other = torch.randn(shape, generator=noise, dtype=torch.float64)
    return target.softmax(-1), (target + other)[:, :-1].softmax(-1)


def all_drafts(num_drafted: int, vocabulary: int, seed: int = 0) -> tuple[TokenDraft, Tensor]:
    """Return every chain as a row, its laws given by position only, as a drafter's heads do."""
    p, q = laws(1, num_drafted, vocabulary, seed)
    chains = list(itertools.product(range(vocabulary), repeat=num_drafted))
    tokens, rows = torch.tensor(chains), len(chains)
    lengths = torch.full((rows,), num_drafted)
    draft = TokenDraft(tokens, q.expand(rows, -1, -1), lengths)
    return draft, p.expand(rows, -1, -1)


def prefix_probabilities(rule: ChainRejection, draft: TokenDraft, p: Tensor) -> Tensor:
    """Return P(at least i accepted | drafted row), (B, K), exactly."""
    chance = rule.tests(draft, p).probabilities
    reached = torch.zeros_like(chance)
    num_drafted = chance.shape[1]
    for pattern in itertools.product([True, False], repeat=num_drafted):
        passed = torch.tensor(pattern).expand_as(chance)
        happens = torch.where(passed, chance, 1 - chance).prod(-1, keepdim=True)
        count = rule.num_accepted(passed).unsqueeze(-1)
        reached += happens * (torch.arange(num_drafted) < count)
    return reached


def drafted_weight(draft: TokenDraft) -> Tensor:
    assert draft.probs is not None
    return draft.probs.gather(-1, draft.tokens.unsqueeze(-1)).squeeze(-1).prod(-1)


def judge(rule: ChainRejection, draft: TokenDraft, p: Tensor, accept: float, correct: float):  # type: ignore[no-untyped-def]
    uniforms = torch.full(draft.tokens.shape, accept, dtype=torch.float64)
    return rule(draft, p, uniforms, torch.full((len(p),), correct, dtype=torch.float64))


def test_token_wise_acceptance_is_the_sum_of_minima() -> None:
    draft, p = all_drafts(num_drafted=3, vocabulary=4)
    prefixes = drafted_weight(draft) @ prefix_probabilities(TokenRejection(), draft, p)
    alphas = torch.minimum(p[0, :-1], draft.probs[0]).sum(-1)
    torch.testing.assert_close(prefixes, alphas.cumprod(0), rtol=0, atol=1e-12)


def test_block_prefixes_stand_with_probability_w() -> None:
    draft, p = all_drafts(num_drafted=3, vocabulary=4)
    weights = torch.ones(len(p), 4, dtype=torch.float64)
    for i in range(3):  # the recursion as the paper writes it
        token = draft.tokens[:, i : i + 1]
        ratio = p[:, i].gather(-1, token) / draft.probs[:, i].gather(-1, token)
        weights[:, i + 1] = (weights[:, i] * ratio[:, 0]).clamp(max=1)
    reached = prefix_probabilities(BlockRejection(), draft, p)
    mean = drafted_weight(draft) @ weights[:, 1:]
    torch.testing.assert_close(drafted_weight(draft) @ reached, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(BlockRejection().tests(draft, p).weights, weights)


@pytest.mark.parametrize("seed", range(5))
def test_block_verification_accepts_no_less_than_token_wise_at_every_length(seed: int) -> None:
    draft, p = all_drafts(num_drafted=3, vocabulary=3, seed=seed)
    token, block = (drafted_weight(draft) @ prefix_probabilities(r, draft, p) for r in RULES)
    assert (block >= token - 1e-12).all()
    assert block.sum() > token.sum() + 1e-3
    one, p_one = all_drafts(num_drafted=1, vocabulary=3, seed=seed)
    token, block = (drafted_weight(one) @ prefix_probabilities(r, one, p_one) for r in RULES)
    torch.testing.assert_close(token, block)  # with one token the two rules are one


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_draft_of_no_tokens_is_plain_sampling(rule: ChainRejection) -> None:
    p, q = laws(6, 0, 9)
    uniforms = Noise(0).uniform(torch.arange(6), torch.zeros(6).long(), Role.CORRECT)
    for probs in (q, None):
        draft = TokenDraft(torch.empty(6, 0, dtype=torch.long), probs, torch.zeros(6).long())
        verdict = rule(draft, p, torch.empty(6, 0, dtype=torch.float64), uniforms)
        assert verdict.accepted.shape == (6, 0)
        assert torch.equal(verdict.correction, draw(p[:, 0], uniforms))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_draft_equal_to_the_target_is_accepted_whatever_the_uniforms(
    rule: ChainRejection,
) -> None:
    p = laws(200, 4, 9)[0].float()
    uniforms = Noise(2).uniform(torch.arange(200), torch.arange(4).expand(200, 4), Role.DRAFT)
    draft = TokenDraft(draw(p[:, :-1], uniforms), p[:, :-1].clone(), torch.full((200,), 4))
    verdict = judge(rule, draft, p, accept=ALMOST_ONE, correct=0.4)
    assert verdict.accepted.all()
    assert torch.equal(verdict.correction, draw(p[:, -1], torch.full((200,), 0.4).double()))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_where_the_residual_rounds_to_nothing_the_target_itself_is_drawn_from(
    rule: ChainRejection,
) -> None:
    p = laws(50, 2, 9)[0].float()
    draft = TokenDraft(torch.zeros(50, 2).long(), p[:, :-1], torch.full((50,), 2))
    law = rule.residual(draft, p, torch.ones(50, 3), torch.zeros(50).long())
    uniforms = Noise(0).uniform(torch.arange(50), torch.arange(50), Role.CORRECT)
    assert torch.equal(draw(law, uniforms), draw(p[:, 0], uniforms))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("accept", [0.0, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("correct", [0.0, ALMOST_ONE])
@pytest.mark.parametrize("reports_law", [True, False])
def test_nothing_the_target_excludes_is_ever_emitted(
    rule: ChainRejection, accept: float, correct: float, reports_law: bool
) -> None:
    noise = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 4, 12, generator=noise) * 3
    p = probabilities(scores, Sampling(top_k=3))
    q = probabilities(scores[:, :-1] + torch.randn(300, 3, 12, generator=noise), Sampling(top_k=4))
    uniforms = torch.rand(300, 3, generator=noise, dtype=torch.float64)
    lengths = torch.randint(0, 4, (300,), generator=noise)
    draft = TokenDraft(draw(q, uniforms), q if reports_law else None, lengths)
    verdict = judge(rule, draft, p, accept, correct)
    emitted_p = p[:, :-1].gather(-1, draft.tokens.unsqueeze(-1)).squeeze(-1)
    assert (emitted_p[verdict.accepted] > 0).all()
    counts = verdict.accepted.sum(-1)
    assert (counts <= lengths).all()
    law = p[torch.arange(300), counts]
    assert (law.gather(-1, verdict.correction.unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_greedy_laws_accept_exactly_what_the_target_would_say(rule: ChainRejection) -> None:
    greedy = Sampling(temperature=0.0)
    noise = torch.Generator().manual_seed(1)
    scores = torch.randn(200, 5, 3, generator=noise)
    p = probabilities(scores, greedy)
    q = probabilities(torch.randn(200, 4, 3, generator=noise) + scores[:, :-1], greedy)
    best, tokens = scores.argmax(-1), q.argmax(-1)
    expected = (tokens == best[:, :-1]).long().cumprod(-1)
    for probs in (q, None):
        draft = TokenDraft(tokens, probs, torch.full((200,), 4))
        for uniform in (0.0, 0.7, ALMOST_ONE):
            verdict: Verdict = judge(rule, draft, p, uniform, uniform)
            assert torch.equal(verdict.accepted.long(), expected)
            correction = best.gather(-1, expected.sum(-1, keepdim=True))
            assert torch.equal(verdict.correction, correction.squeeze(-1))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("reports_law", [True, False])
def test_a_row_does_not_depend_on_the_others_or_on_padding(
    rule: ChainRejection, reports_law: bool
) -> None:
    p, q = laws(8, 4, 6)
    lengths = torch.tensor([0, 1, 2, 3, 4, 4, 2, 1])
    tokens = q.argmax(-1) if not reports_law else draw(q, torch.full((8, 4), 0.3).double())
    noise = Noise(9)
    accept = noise.uniform(torch.arange(8), torch.arange(4).expand(8, 4), Role.ACCEPT)
    correct = noise.uniform(torch.arange(8), torch.zeros(8).long(), Role.CORRECT)
    draft = TokenDraft(tokens, q if reports_law else None, lengths)
    whole = rule(draft, p, accept, correct)
    for b, size in enumerate(lengths.tolist()):
        probs = q[b : b + 1, :size] if reports_law else None
        row = TokenDraft(tokens[b : b + 1, :size], probs, lengths[b : b + 1])
        alone = rule(row, p[b : b + 1, : size + 1], accept[b : b + 1, :size], correct[b : b + 1])
        assert torch.equal(alone.accepted[0], whole.accepted[b, :size])
        assert not whole.accepted[b, size:].any()
        assert alone.correction[0] == whole.correction[b]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_what_lies_beyond_a_rows_length_does_not_matter(rule: ChainRejection) -> None:
    p, q = laws(5, 3, 6)
    draft = TokenDraft(draw(q, torch.full((5, 3), 0.6).double()), q, torch.full((5,), 1))
    clean = judge(rule, draft, p, 0.3, 0.5)
    for filling in (0.0, 7.0):
        p[:, 2:], q[:, 1:] = filling, filling
        soiled = judge(rule, draft, p, 0.3, 0.5)
        assert torch.equal(clean.accepted, soiled.accepted)
        assert torch.equal(clean.correction, soiled.correction)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("reports_law", [True, False])
def test_a_verifier_compiles_to_one_graph(rule: ChainRejection, reports_law: bool) -> None:
    torch._dynamo.reset()
    p, q = laws(3, 4, 7)
    lengths = torch.tensor([4, 2, 0])
    draft = TokenDraft(q.argmax(-1), q if reports_law else None, lengths)
    compiled = torch.compile(rule.__call__, fullgraph=True, dynamic=False, backend="aot_eager")
    noise = Noise(4)
    for trial in range(5):
        elements = torch.arange(4).expand(3, 4) + 10 * trial
        accept = noise.uniform(torch.arange(3), elements, Role.ACCEPT)
        correct = noise.uniform(torch.arange(3), elements[:, 0], Role.CORRECT)
        made, plain = compiled(draft, p, accept, correct), rule(draft, p, accept, correct)
        assert torch.equal(made.accepted, plain.accepted)
        assert torch.equal(made.correction, plain.correction)


def test_a_tree_is_refused() -> None:
    p, q = laws(1, 2, 3)
    tree = TokenDraft(torch.zeros(1, 2).long(), q, torch.tensor([2]), torch.tensor([[-1, -1]]))
    with pytest.raises(AssertionError, match="trees"):
        judge(TokenRejection(), tree, p, 0.5, 0.5)
