"""Every verifier that promises EXACT_LAW is enumerated on a toy vocabulary, and then sampled.

Enumeration drives the real `__call__`: all drafts with their probabilities, all pass/fail
patterns of the acceptance tests with uniforms in the middle of the interval that causes them, all
corrections with uniforms in the middle of their step of the CDF.  The law of the emitted tokens,
continued by the target to K+1 tokens, must be the target's to 1e-12.  `LossyRule` must fail.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import specstream.verification
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Guarantee, TokenDraft
from specstream.verification import TokenRejection, TokenVerifier
from specstream.verification.rejection import ChainRejection, ChainTests

Prefix = tuple[int, ...]
VOCABULARY = 3
TOLERANCE = 1e-12
ROUNDING = 1e-15  # cases rarer than this have no midpoint that float64 could hit


def exact_verifiers() -> list[type[TokenVerifier]]:
    """Find every concrete verifier of the package that promises the law."""
    for module in pkgutil.iter_modules(specstream.verification.__path__):
        importlib.import_module(f"specstream.verification.{module.name}")

    def below(cls: type[TokenVerifier]) -> Iterator[type[TokenVerifier]]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    return [
        cls
        for cls in dict.fromkeys(below(TokenVerifier))
        if cls.__module__.startswith("specstream.")
        and not inspect.isabstract(cls)
        and cls.guarantee is Guarantee.EXACT_LAW
    ]


CHAIN_RULES = [cls for cls in exact_verifiers() if issubclass(cls, ChainRejection)]


@dataclass(frozen=True)
class LossyRule(TokenRejection):
    """The negative control: accept whatever the target finds likely enough."""

    threshold: float = 0.3

    def tests(self, draft: TokenDraft, p: Tensor) -> ChainTests:
        right = super().tests(draft, p)
        likely = (right.numerators > self.threshold * right.denominators).to(p.dtype)
        return ChainTests(likely, torch.ones_like(likely), None)


@dataclass(frozen=True)
class World:
    """A target and a drafter over a toy vocabulary: one law for each prefix, and a stop rule."""

    num_drafted: int
    p: dict[Prefix, Tensor]
    q: dict[Prefix, Tensor]
    length: Callable[[Prefix], int]  # of a whole draft; may look at tokens before the end only
    deterministic: bool

    def drafts(self) -> list[tuple[Prefix, int, float]]:
        """Return (tokens, length, probability) of every draft; beyond its length tokens are 0."""
        found = []
        for tokens in itertools.product(range(VOCABULARY), repeat=self.num_drafted):
            length = self.length(tokens)
            weight = 1.0
            for i in range(length):
                weight *= self.q[tokens[:i]][tokens[i]].item()
            if weight > 0 and not any(tokens[length:]):
                found.append((tokens, length, weight))
        return found

    def draft(self, chosen: list[tuple[Prefix, int]]) -> tuple[TokenDraft, Tensor]:
        """Return the record of these drafts and the target's laws along them."""
        k = self.num_drafted
        tokens = torch.tensor([t for t, _ in chosen], dtype=torch.long).view(len(chosen), k)
        lengths = torch.tensor([n for _, n in chosen])
        p = torch.stack([self.p[t[:i]] for t, _ in chosen for i in range(k + 1)])
        q = None
        if not self.deterministic:
            laws = [self.q[t[:i]] for t, _ in chosen for i in range(k)]
            q = torch.stack(laws) if laws else torch.empty(0, VOCABULARY).double()
            q = q.view(len(chosen), k, VOCABULARY)
        return TokenDraft(tokens, q, lengths), p.view(len(chosen), k + 1, VOCABULARY)

    def target_law(self) -> Tensor:
        """Return the joint law of K+1 tokens, an array with one axis for each."""
        law = torch.zeros([VOCABULARY] * (self.num_drafted + 1), dtype=torch.float64)
        for tokens in itertools.product(range(VOCABULARY), repeat=self.num_drafted + 1):
            law[tokens] = self.probability(tokens)
        return law

    def probability(self, tokens: Prefix) -> float:
        """Return the target's probability of a prefix."""
        weight = 1.0
        for i, token in enumerate(tokens):
            weight *= self.p[tokens[:i]][token].item()
        return weight


def world(
    num_drafted: int,
    sampling: Sampling = Sampling(),
    draft_sampling: Sampling | None = None,
    length: Callable[[Prefix], int] | None = None,
    deterministic: bool = False,
    seed: int = 0,
) -> World:
    """Return random laws in float64, the drafter's a perturbation of the target's."""
    noise = torch.Generator().manual_seed(seed)
    p, q = {}, {}
    for size in range(num_drafted + 1):
        for prefix in itertools.product(range(VOCABULARY), repeat=size):
            target = torch.randn(VOCABULARY, generator=noise, dtype=torch.float64)
            other = torch.randn(VOCABULARY, generator=noise, dtype=torch.float64)
            p[prefix] = probabilities(target, sampling)
            greedy = Sampling(temperature=0.0)
            q[prefix] = probabilities(
                target + other, greedy if deterministic else draft_sampling or sampling
            )
    return World(num_drafted, p, q, length or (lambda _: num_drafted), deterministic)


def emitted_law(rule: ChainRejection, toy: World) -> Tensor:
    """Return the exact law of what `rule` emits, continued by the target to K+1 tokens."""
    k = toy.num_drafted
    drafts = toy.drafts()
    patterns = list(itertools.product([True, False], repeat=k))
    cases = list(itertools.product(drafts, patterns, range(VOCABULARY)))
    draft, p = toy.draft([(tokens, length) for (tokens, length, _), _, _ in cases])
    passed = torch.tensor([pattern for _, pattern, _ in cases], dtype=torch.bool)
    corrections = torch.tensor([correction for _, _, correction in cases])

    tests = rule.tests(draft, p)
    chance = tests.probabilities  # (cases, K)
    count = rule.num_accepted(passed)
    residual = rule.residual(draft, p, tests.weights, count.clamp(max=draft.lengths)).double()
    cdf = residual.cumsum(-1) / residual.sum(-1, keepdim=True)
    step = (residual / residual.sum(-1, keepdim=True)).gather(-1, corrections[:, None])[:, 0]
    noise_correct = cdf.gather(-1, corrections[:, None])[:, 0] - step / 2

    weights = torch.tensor([weight for (_, _, weight), _, _ in cases], dtype=torch.float64)
    weights = weights * torch.where(passed, chance, 1 - chance).prod(-1) * step
    verdict = rule(draft, p, torch.where(passed, chance / 2, (1 + chance) / 2), noise_correct)

    law = torch.zeros([VOCABULARY] * (k + 1), dtype=torch.float64)
    target = toy.target_law()
    for row in torch.nonzero(weights > ROUNDING)[:, 0].tolist():
        accepted = verdict.accepted[row]
        num = int(accepted.sum())
        assert num == count[row] <= draft.lengths[row], "the midpoint must cause its pattern"
        assert accepted[:num].all(), "an accepted chain is a prefix"
        assert verdict.correction[row] == corrections[row]
        prefix = (*draft.tokens[row, :num].tolist(), corrections[row].item())
        law[prefix] += weights[row] * target[prefix] / toy.probability(prefix)
    return law


def expected_accepted(rule: ChainRejection, toy: World) -> float:
    """Return E[number of accepted tokens], exactly."""
    total = 0.0
    for tokens, length, weight in toy.drafts():
        draft, p = toy.draft([(tokens, length)])
        chance = rule.tests(draft, p).probabilities[0]
        for pattern in itertools.product([True, False], repeat=toy.num_drafted):
            passed = torch.tensor([pattern]).view(1, toy.num_drafted)
            happens = torch.where(passed[0], chance, 1 - chance).prod().item()
            total += weight * happens * rule.num_accepted(passed).item()
    return total


def stops_after_token_two(tokens: Prefix) -> int:
    """Stop once a 2 has been drafted: a decision on earlier tokens only."""
    return tokens.index(2) + 1 if 2 in tokens else len(tokens)


WORLDS = {
    "nothing drafted": world(0),
    "one token": world(1),
    "two tokens": world(2),
    "three tokens": world(3),
    "three tokens, another seed": world(3, seed=7),
    "greedy target": world(2, Sampling(temperature=0.0), Sampling()),
    "greedy target and drafter": world(2, Sampling(temperature=0.0)),
    "sampled target, greedy drafter that reports its law": world(2, draft_sampling=Sampling(0.0)),
    "cold target": world(2, Sampling(temperature=0.3), Sampling()),
    "top-k": world(2, Sampling(top_k=2)),
    "top-p": world(2, Sampling(top_p=0.7)),
    "top-k on the target only": world(3, Sampling(top_k=2), Sampling()),
    "deterministic drafter": world(3, deterministic=True),
    "deterministic drafter, greedy target": world(2, Sampling(temperature=0), deterministic=True),
    "length 2 of 3": world(3, length=lambda _: 2),
    "length 0 of 2": world(2, length=lambda _: 0),
    "length 1 of 3, deterministic": world(3, length=lambda _: 1, deterministic=True),
    "length by the drafted tokens": world(3, length=stops_after_token_two),
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("rule", CHAIN_RULES, ids=lambda cls: cls.__name__)
def test_the_emitted_law_is_the_targets(rule: type[ChainRejection], name: str) -> None:
    toy = WORLDS[name]
    error = (emitted_law(rule(), toy) - toy.target_law()).abs().max().item()
    assert error < TOLERANCE


@pytest.mark.parametrize("rule", CHAIN_RULES, ids=lambda cls: cls.__name__)
def test_a_drafter_equal_to_the_target_is_always_accepted(rule: type[ChainRejection]) -> None:
    toy = world(3)
    same = World(3, toy.p, toy.p, toy.length, False)
    assert expected_accepted(rule(), same) == pytest.approx(3, abs=1e-12)
    assert (emitted_law(rule(), same) - same.target_law()).abs().max() < TOLERANCE


def test_a_lossy_rule_fails_the_enumeration() -> None:
    toy = WORLDS["two tokens"]
    assert (emitted_law(LossyRule(), toy) - toy.target_law()).abs().max() > 1e-2


def test_reporting_a_soft_law_for_an_argmax_draft_fails_the_enumeration() -> None:
    hidden = world(1, deterministic=True)  # drafts by argmax ..
    soft = world(1)  # .. and hands its softmax on as q

    class Misreporting(World):
        def drafts(self) -> list[tuple[Prefix, int, float]]:
            return hidden.drafts()

    toy = Misreporting(1, soft.p, soft.q, soft.length, False)
    assert (emitted_law(TokenRejection(), toy) - toy.target_law()).abs().max() > 1e-2


def chi_square_p_value(rule: ChainRejection, toy: World, rows: int) -> float:
    """Sample `rows` rounds through `__call__` and compare the joint law of K+1 tokens."""
    k = toy.num_drafted
    noise = Noise(seed=11)
    prompts = torch.arange(rows)
    elements = torch.arange(k + 1).expand(rows, -1)
    drawn = noise.uniform(prompts, elements, Role.DRAFT)
    tokens: list[Prefix] = [()] * rows
    for i in range(k):
        laws = torch.stack([toy.q[prefix] for prefix in tokens])
        following = draw(laws, drawn[:, i]).tolist()
        tokens = [(*prefix, token) for prefix, token in zip(tokens, following, strict=True)]
    chosen = [(t, toy.length(t)) for t in tokens]
    draft, p = toy.draft(chosen)
    accept = noise.uniform(prompts, elements[:, :k], Role.ACCEPT)
    verdict = rule(draft, p.float(), accept, noise.uniform(prompts, prompts * 0, Role.CORRECT))
    rest = Noise(noise.seed + 1).uniform(prompts, elements, Role.CORRECT).tolist()
    counts = torch.zeros([VOCABULARY] * (k + 1), dtype=torch.float64)
    for row, num in enumerate(verdict.accepted.sum(-1).tolist()):
        prefix = (*tokens[row][:num], int(verdict.correction[row]))
        while len(prefix) <= k:
            uniform = torch.tensor(rest[row][len(prefix)], dtype=torch.float64)
            prefix = (*prefix, int(draw(toy.p[prefix], uniform)))
        counts[prefix] += 1
    expected = toy.target_law() * rows
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = torch.tensor(float(likely.sum()) - 1, dtype=torch.float64)
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


@pytest.mark.parametrize("name", ["two tokens", "length by the drafted tokens", "top-k"])
@pytest.mark.parametrize("rule", CHAIN_RULES, ids=lambda cls: cls.__name__)
def test_sampled_rounds_pass_a_chi_square_test(rule: type[ChainRejection], name: str) -> None:
    assert chi_square_p_value(rule(), WORLDS[name], rows=8_000) > 0.01


def test_a_lossy_rule_fails_the_chi_square_test() -> None:
    assert chi_square_p_value(LossyRule(), WORLDS["two tokens"], rows=8_000) < 1e-6


def test_every_exact_verifier_is_enumerated() -> None:
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    for cls in exact_verifiers():
        named = any(cls.__name__ in source for source in sources)
        assert cls in CHAIN_RULES or named, f"{cls.__name__} has no enumeration"
