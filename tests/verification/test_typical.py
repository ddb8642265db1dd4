"""Typical acceptance: its threshold and its path by hand, and that it does not keep the law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Guarantee, TokenDraft
from specstream.verification import TypicalAcceptance, depths
from tests.verification.trees import ALMOST_ONE, Outcome, ToyTree, emitted_law, toy_tree

RULE = TypicalAcceptance()


def judge(rule: TypicalAcceptance, draft: TokenDraft, p: Tensor, uniform: float):  # type: ignore[no-untyped-def]
    coins = torch.full(draft.tokens.shape, uniform, dtype=torch.float64)
    return rule(draft, p, coins, torch.full((len(p),), uniform, dtype=torch.float64))


def longest_typical_path(rule: TypicalAcceptance, laws: Tensor, tokens: list[int],
                         parents: list[int]) -> tuple[int, ...]:  # fmt: skip
    """Return the nodes of the first longest path of plausible tokens, by walking them all."""
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        law = laws[parent + 1].tolist()
        entropy = -sum(value * math.log(value) for value in law if value > 0)
        if parent in paths and law[token] > min(rule.epsilon, rule.delta * math.exp(-entropy)):
            paths[i] = (*paths[parent], i)
    return max(paths.values(), key=len)  # the first of the longest: nodes come in their order


def outcomes(rule: TypicalAcceptance, tree: ToyTree) -> Iterator[Outcome]:
    """Yield the one outcome of each draft: its coins decide nothing but the correction."""
    num = len(tree.parents)
    for tokens, length, weight in tree.drafts():
        _, p = tree.record([(tokens, length)])
        path = longest_typical_path(rule, p[0], list(tokens[:length]), [*tree.parents][:length])
        residual = p[0, path[-1] + 1 if path else 0].tolist()
        yield Outcome(tokens, length, weight, path, [0.0] * num, [ALMOST_ONE] * num, residual)


@pytest.mark.parametrize("mode", ["without replacement", "with replacement", "best"])
@pytest.mark.parametrize("parents", [(-1,), (-1, 0), (-1, -1), (-1, -1, 0, 1)])
def test_typical_acceptance_fails_the_enumeration_that_exact_rules_pass(
    parents: tuple[int, ...], mode: str
) -> None:
    tree = toy_tree(parents, mode, seed=5)
    law = emitted_law(RULE, tree, list(outcomes(RULE, tree)))
    assert law.sum() == pytest.approx(1.0, abs=1e-12)  # it emits a law, only not the target's
    assert (law - tree.target_law()).abs().max() > 1e-2
    assert RULE.guarantee is Guarantee.HEURISTIC


def test_a_greedy_target_is_kept_to_the_letter() -> None:
    tree = toy_tree((-1, -1, 0), "without replacement", sampling=Sampling(temperature=0.0),
                    draft_sampling=Sampling())  # fmt: skip
    law = emitted_law(RULE, tree, list(outcomes(RULE, tree)))
    assert (law - tree.target_law()).abs().max() < 1e-12


def test_the_floor_is_epsilon_or_delta_over_the_exponential_of_the_entropy() -> None:
    sure, even = torch.tensor([0.98, 0.01, 0.01, 0.0]), torch.full((4,), 0.25)
    floors = TypicalAcceptance(epsilon=0.2, delta=0.4).floor(torch.stack([sure, even]))
    assert floors.tolist() == pytest.approx([0.2, 0.4 / 4])  # exp(H) of four equal tokens is 4
    halves = TypicalAcceptance(epsilon=0.9, delta=0.4).floor(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert halves.item() == pytest.approx(0.4 / 2)
    defaults = TypicalAcceptance()
    assert defaults.delta == pytest.approx(math.sqrt(defaults.epsilon))


def test_the_longest_path_stands_and_the_first_of_equals() -> None:
    p = torch.full((1, 6, 2), 0.5)
    p[0, 0] = torch.tensor([0.99, 0.01])  # the root refuses token 1
    tokens = torch.tensor([[1, 0, 0, 0, 1]])

    def path(*parents: int) -> list[int]:
        draft = TokenDraft(tokens, None, torch.tensor([5]), torch.tensor([parents]))
        return torch.nonzero(judge(RULE, draft, p, 0.5).accepted[0])[:, 0].tolist()

    assert path(-1, -1, 0, 2, 3) == [1]  # what hangs on a refused token never stands
    assert path(-1, -1, -1, 2, 2) == [2, 3]
    assert path(-1, -1, -1, 1, 2) == [1, 3]
    assert path(-1, 0, 0, -1, 3) == [3, 4]


@pytest.mark.parametrize("reports_law", [True, False])
def test_a_chain_stands_up_to_the_first_implausible_token(reports_law: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    p = (torch.randn(300, 6, 8, generator=noise) * 2).softmax(-1)
    q = torch.randn(300, 5, 8, generator=noise).softmax(-1)
    tokens = torch.where(
        torch.rand(300, 5, generator=noise) < 0.8,
        p[:, :-1].argmax(-1),
        torch.randint(0, 8, (300, 5), generator=noise),
    )
    lengths = torch.randint(0, 6, (300,), generator=noise)
    chain = TokenDraft(tokens, q if reports_law else None, lengths)
    accept = Noise(0).uniform(torch.arange(300), torch.arange(5).expand(300, 5), Role.ACCEPT)
    correct = Noise(0).uniform(torch.arange(300), torch.arange(300), Role.CORRECT)
    spelled_out = replace(chain, parents=(torch.arange(5) - 1).expand(300, 5))
    for draft in (chain, spelled_out):
        verdict = RULE(draft, p, accept, correct)
        for row in range(300):
            size = int(lengths[row])
            path = longest_typical_path(
                RULE, p[row].double(), tokens[row, :size].tolist(), list(range(-1, size - 1))
            )
            assert torch.nonzero(verdict.accepted[row])[:, 0].tolist() == list(path)
        counts = verdict.accepted.sum(-1)
        assert torch.equal(verdict.correction, draw(p[torch.arange(300), counts], correct))
    assert counts.max() == 5 and counts.min() == 0


@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("rule", [RULE, TypicalAcceptance(epsilon=0.0)], ids=repr)
def test_nothing_the_target_excludes_is_ever_emitted(
    rule: TypicalAcceptance, uniform: float
) -> None:
    noise = torch.Generator().manual_seed(2)
    p = probabilities(torch.randn(200, 7, 10, generator=noise), Sampling(top_k=3))
    parents = torch.tensor([-1, -1, 0, 1, 1, 3]).expand(200, 6)
    tokens = torch.randint(0, 10, (200, 6), generator=noise)
    verdict = judge(rule, TokenDraft(tokens, None, torch.full((200,), 6), parents), p, uniform)
    above = p.gather(1, (parents + 1)[:, :, None].expand(-1, -1, 10))
    emitted = above.gather(-1, tokens[:, :, None])[:, :, 0]
    assert verdict.accepted.any() and (emitted[verdict.accepted] > 0).all()
    end = ((torch.arange(6) + 1) * verdict.accepted).amax(-1)
    depth = torch.nn.functional.pad(depths(parents), (1, 0)).gather(1, end[:, None])[:, 0]
    assert torch.equal(verdict.accepted.sum(-1), depth)  # one whole path and nothing beside it
    law = p[torch.arange(200), end]
    assert (law.gather(-1, verdict.correction[:, None]) > 0).all()


def test_a_draft_of_no_tokens_is_plain_sampling() -> None:
    p = torch.rand(6, 1, 9)
    correct = Noise(0).uniform(torch.arange(6), torch.arange(6), Role.CORRECT)
    none = torch.empty(6, 0, dtype=torch.long)
    verdict = RULE(TokenDraft(none, None, torch.zeros(6).long()), p, none.double(), correct)
    assert verdict.accepted.shape == (6, 0)
    assert torch.equal(verdict.correction, draw(p[:, 0], correct))


def test_typical_acceptance_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(RULE.__call__, fullgraph=True, dynamic=False, backend="aot_eager")
    tree = toy_tree((-1, -1, 0, 1), "best")
    draft, p = tree.record([(tokens, length) for tokens, length, _ in tree.drafts()])
    coins = torch.full(draft.tokens.shape, 0.5, dtype=torch.float64)
    made, plain = (rule(draft, p, coins, coins[:, 0]) for rule in (compiled, RULE))
    assert torch.equal(made.accepted, plain.accepted)
    assert torch.equal(made.correction, plain.correction)


@pytest.mark.parametrize("options, message", [
    ({"epsilon": 1.0}, "epsilon must be in [0, 1), got 1.0"),
    ({"epsilon": -0.1}, "epsilon must be in [0, 1), got -0.1"),
    ({"delta": -1.0}, "delta must not be negative, got -1.0"),
    ({"delta": math.nan}, "delta must not be negative, got nan"),
])  # fmt: skip
def test_thresholds_outside_their_range_are_refused(
    options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        TypicalAcceptance(**options)
    assert str(caught.value) == message
