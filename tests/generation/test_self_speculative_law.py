"""The law of self-speculation by enumeration: every order, every draft, every outcome of a test.

The sampler itself is run once over all texts, with coins that make it draft each of them and a
rule that lets it go on token by token: so at every place where a round can begin it says what it
would hand to its rule.  The real rule is then asked about all its coins there, and the rounds are
put together to the law of whole texts, which must be the sequential one to 1e-12.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from specstream.generation import SelfSpeculativeSampler
from specstream.generation.self_speculative import _Canvas, _Window
from specstream.models import SelfSpeculativeHead, UntrainedMaskedLM
from specstream.sampling import Noise, Role, Sampling
from specstream.structures import Guarantee, Law, TokenDraft, Verdict
from specstream.verification import BlockRejection, TokenRejection, TokenVerifier
from specstream.verification.rejection import ChainRejection
from tests.generation.test_self_speculative import (
    CANVAS,
    ENDS,
    MASK,
    ORDERS,
    PLACES,
    TOKENS,
    causal_layer,
    sequential_law,
    toy,
)
from tests.toys import LossyRule

TOLERANCE = 1e-12
ROUNDING = 1e-15  # cases rarer than this have no midpoint that float64 could hit
CASES = list(itertools.product(ORDERS, itertools.product(range(TOKENS), repeat=3)))
Prefix = tuple[int, ...]


@torch.no_grad()
def in_float64(module: nn.Module) -> nn.Module:
    """Return a module in float64, its norms too, which would compute in float32."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=1e-6)  # type: ignore[union-attr]
                norm.weight.copy_(child.weight)  # type: ignore[arg-type]
                setattr(parent, name, norm)
    return module.double().requires_grad_(False)


class Scripted(Noise):
    """Coins under which a sampler takes given orders and drafts given texts."""

    def __init__(self, orders: Tensor, texts: Tensor) -> None:
        super().__init__(0)
        self.orders, self.texts = orders, texts  # (N, C) and (N, C)
        self.window: _Window | None = None

    def uniform(self, prompts: Tensor, elements: Tensor, role: Role) -> Tensor:
        if role is Role.ORDER:
            return self.orders
        if role is not Role.DRAFT:
            return super().uniform(prompts, elements, role)
        assert self.window is not None
        wanted = self.texts.gather(1, self.window.places)[:, :, None]
        laws = self.window.laws / self.window.laws.sum(-1, keepdim=True)
        return (laws.cumsum(-1) - laws / 2).gather(-1, wanted)[:, :, 0]


@dataclass(frozen=True)
class TokenByToken(TokenVerifier):
    """Keeps what it is shown; rejects everything and puts the first drafted token in its place."""

    guarantee = Guarantee.EXACT_LAW
    needs = frozenset({Law.DRAWN})
    shown: list[tuple[TokenDraft, Tensor]] = field(default_factory=list)

    def __call__(
        self, draft: TokenDraft, p: Tensor, noise_accept: Tensor, noise_correct: Tensor
    ) -> Verdict:
        self.shown.append((draft, p))
        return Verdict(torch.zeros_like(draft.tokens, dtype=torch.bool), draft.tokens[:, 0])


class Watched(SelfSpeculativeSampler):
    """Tells the noise which window is open."""

    def _open(self, canvas: _Canvas, end: Tensor, ends: list[int]) -> _Window:
        window = super()._open(canvas, end, ends)
        self.noise.window = window
        return window


def rounds(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead, num_windows: int
) -> list[tuple[TokenDraft, Tensor]]:
    """Return what a rule is shown where a round begins at the i-th token, one row for each case."""
    tokens = torch.tensor([CANVAS]).expand(len(CASES), -1)
    orders, texts = torch.ones(tokens.shape, dtype=torch.float64), tokens.clone()
    for row, (order, said) in enumerate(CASES):
        for turn, (i, token) in enumerate(zip(order, said, strict=True)):
            orders[row, PLACES[i]], texts[row, PLACES[i]] = turn / 10, token
    rule = TokenByToken()
    sampler = Watched(trunk, head, Sampling(), num_windows, rule)
    sampler.noise = Scripted(orders, texts)
    lengths, rows = torch.full((len(CASES),), len(CANVAS)), torch.arange(len(CASES))
    *_, last = sampler.fill(tokens, tokens == MASK, lengths, rows, sampler.noise)
    assert torch.equal(last.tokens, texts) and len(rule.shown) == 3
    return rule.shown


def outcomes(rule: ChainRejection, draft: TokenDraft, p: Tensor) -> list[tuple[int, Prefix, float]]:
    """Return (case, tokens settled, probability) of all that a round may do, drafts included."""
    assert draft.probs is not None
    size, vocabulary = draft.tokens.shape[1], p.shape[2]
    patterns = list(itertools.product([True, False], repeat=size))
    cases = list(itertools.product(range(len(CASES)), patterns, range(vocabulary)))
    row = torch.tensor([case for case, _, _ in cases])
    passed = torch.tensor([pattern for _, pattern, _ in cases])
    corrections = torch.tensor([token for _, _, token in cases])[:, None]
    draft = TokenDraft(draft.tokens[row], draft.probs[row], draft.lengths[row])
    p = p[row]
    tests = rule.tests(draft, p)
    chance, count = tests.probabilities, rule.num_accepted(passed)
    residual = rule.residual(draft, p, tests.weights, count).double()
    residual = residual / residual.sum(-1, keepdim=True)
    step = residual.gather(1, corrections)[:, 0]
    middle = residual.cumsum(-1).gather(1, corrections)[:, 0] - step / 2
    drawn = draft.probs.gather(2, draft.tokens[:, :, None])[:, :, 0].prod(1)  # type: ignore[union-attr]
    weights = drawn * torch.where(passed, chance, 1 - chance).prod(1) * step
    verdict = rule(draft, p, torch.where(passed, chance / 2, (1 + chance) / 2), middle)
    found = []
    for i in torch.nonzero(weights > ROUNDING)[:, 0].tolist():
        number = int(verdict.accepted[i].sum())
        assert number == count[i] and (number == size or verdict.correction[i] == corrections[i])
        settled = draft.tokens[i, :number].tolist()
        settled += [int(verdict.correction[i])] * (number < size)
        found.append((cases[i][0], tuple(settled), float(weights[i])))
    return found


def composed_law(rule: ChainRejection, shown: list[tuple[TokenDraft, Tensor]]) -> Tensor:
    """Return the law of (order, tokens at PLACES), (6, 3, 3, 3), of rounds one after the other."""
    steps: list[dict[tuple[Prefix, Prefix], float]] = []  # from i: (order, tokens after the round)
    ends = [i + draft.tokens.shape[1] for i, (draft, _) in enumerate(shown)]
    for i, (draft, p) in enumerate(shown):
        reached: dict[tuple[Prefix, Prefix], float] = defaultdict(float)
        for case, settled, weight in outcomes(rule, draft, p):
            order, said = CASES[case]
            # Texts that differ after the window only are one case here.
            reached[order, (*said[:i], *settled)] += weight / TOKENS ** (3 - ends[i])
        steps.append(reached)

    def tail(order: Prefix, said: Prefix, i: int, end: int) -> float:
        """Return the probability that the rest of a window that ends at `end` is said[i:end]."""
        if i == end:
            return 1.0
        return sum(
            steps[i].get((order, said[:j]), 0.0) * tail(order, said, j, end)
            for j in range(i + 1, end + 1)
        )

    law = torch.zeros([len(ORDERS), *[TOKENS] * 3], dtype=torch.float64)
    for order, said in CASES:
        starts = [i for i in range(3) if i == 0 or ends[i] != ends[i - 1]]
        values = [said[order.index(i)] for i in range(3)]
        law[ORDERS.index(order), *values] = 1 / len(ORDERS)
        for i in starts:
            law[ORDERS.index(order), *values] *= tail(order, said, i, ends[i])
    return law


@pytest.fixture(scope="module")
def trunk() -> UntrainedMaskedLM:
    return in_float64(toy())  # type: ignore[return-value]


@pytest.fixture(scope="module")
def head(trunk: UntrainedMaskedLM) -> SelfSpeculativeHead:
    return in_float64(causal_layer(trunk))  # type: ignore[return-value]


@pytest.mark.parametrize("num_windows", [1, 2, 3])
def test_the_composed_law_of_all_rounds_is_the_sequential_one(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead, num_windows: int
) -> None:
    law = sequential_law(trunk, head, Sampling(), ENDS[num_windows])
    shown = rounds(trunk, head, num_windows)
    for rule in (TokenRejection(), BlockRejection()):
        found = composed_law(rule, shown)
        assert abs(float(found.sum()) - 1) < TOLERANCE
        assert float((found - law).abs().max()) < TOLERANCE
    assert float((composed_law(LossyRule(), shown) - law).abs().max()) > 1e-3
