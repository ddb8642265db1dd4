"""Toy trees whose drafts are enumerated, and the outcomes that recursive rejection gives them.

An outcome is a draft, the node where the accepted path ends, and what is left of the target's law
there.  Its probability is reckoned here as the papers write the rule, with quotients and
normalised residuals, and each of its coins has an interval.  `emitted_law` then drives the real
`__call__` with uniforms at both ends of every interval, so a threshold that lies elsewhere by more
than `EDGE` fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.sampling import Sampling, probabilities
from specstream.structures import TokenDraft
from specstream.verification import TokenVerifier

Prefix = tuple[int, ...]
EDGE = 1e-13
RARE = 1e-12  # an interval as short as this has no inside
ALMOST_ONE = 1 - 2.0**-53


@dataclass(frozen=True)
class Outcome:
    """One way for a round to go: a draft, the end of its path, and the interval of each coin."""

    tokens: Prefix
    length: int
    weight: float  # probability of the draft and of this path
    path: tuple[int, ...]  # the accepted nodes
    near: list[float]  # a uniform for each node, at its threshold ..
    far: list[float]  # .. and as far from it as can be
    residual: list[float]  # the law of the correction


@dataclass(frozen=True)
class ToyTree:
    """A target and a drafter over a toy vocabulary: one law for each prefix, a shape, a mode."""

    parents: tuple[int, ...]
    mode: str  # "without replacement", "with replacement", "best" or "same": the best, repeatedly
    p: dict[Prefix, Tensor]
    q: dict[Prefix, Tensor]
    length: Callable[[Prefix], int]  # of a whole draft; may look at tokens before the end only
    one_hot: bool = False  # report q of a deterministic drafter as what it is

    @property
    def vocabulary(self) -> int:
        return len(self.p[()])

    @property
    def height(self) -> int:
        return max(len(self.path(i)) for i in range(len(self.parents)))

    def path(self, node: int) -> tuple[int, ...]:
        """Return the nodes from a child of the root down to `node`; none for -1."""
        return () if node < 0 else (*self.path(self.parents[node]), node)

    def prefix(self, node: int, tokens: Sequence[int]) -> Prefix:
        return tuple(tokens[i] for i in self.path(node))

    def siblings(self, node: int) -> list[int]:
        """Return the children of the same parent that were drawn before `node`."""
        return [i for i in range(node) if self.parents[i] == self.parents[node]]

    def drawn(self, node: int, tokens: Sequence[int]) -> Tensor:
        """Return the law that `node` is drawn from, given the tokens before it."""
        law = self.q[self.prefix(self.parents[node], tokens)]
        if self.mode == "with replacement":
            return law
        if self.mode == "without replacement":
            law = law.clone()
            law[[tokens[i] for i in self.siblings(node)]] = 0.0
            return law / law.sum()
        rank = len(self.siblings(node)) if self.mode == "best" else 0
        best = law.argsort(descending=True)[rank]
        return torch.nn.functional.one_hot(best, self.vocabulary).double()

    def reported(self, node: int, tokens: Sequence[int]) -> Tensor:
        """Return the law that the draft says it drew `node` from: an honest one, here."""
        return self.drawn(node, tokens)

    def drafts(self) -> Iterator[tuple[Prefix, int, float]]:
        """Yield (tokens, length, probability) of every draft; beyond its length tokens are 0."""
        for tokens in itertools.product(range(self.vocabulary), repeat=len(self.parents)):
            length = self.length(tokens)
            if any(tokens[length:]):
                continue
            weight = 1.0
            for i in range(length):
                weight = weight and weight * self.drawn(i, tokens)[tokens[i]].item()
            if weight > 0:
                yield tokens, length, weight

    def record(self, chosen: Sequence[tuple[Prefix, int]]) -> tuple[TokenDraft, Tensor]:
        """Return the draft of these tokens and lengths, one in a row, and the target's laws."""
        num = len(self.parents)
        rows = {}
        for tokens, length in set(chosen):
            p = [self.p[self.prefix(i, tokens)] for i in range(-1, num)]
            q = [self.reported(i, tokens) for i in range(length)]
            q += [torch.zeros(self.vocabulary).double()] * (num - length)
            rows[tokens, length] = torch.stack(p), torch.stack(q)
        deterministic = self.mode in ("best", "same") and not self.one_hot
        draft = TokenDraft(
            torch.tensor([tokens for tokens, _ in chosen]),
            None if deterministic else torch.stack([rows[key][1] for key in chosen]),
            torch.tensor([length for _, length in chosen]),
            torch.tensor(self.parents).expand(len(chosen), -1),
        )
        return draft, torch.stack([rows[key][0] for key in chosen])

    def probability(self, tokens: Prefix) -> float:
        """Return the target's probability of a prefix."""
        weight = 1.0
        for i, token in enumerate(tokens):
            weight *= self.p[tokens[:i]][token].item()
        return weight

    def target_law(self) -> Tensor:
        """Return the joint law of as many tokens as a round may commit, one axis for each."""
        size = self.height + 1
        law = torch.zeros([self.vocabulary] * size, dtype=torch.float64)
        for tokens in itertools.product(range(self.vocabulary), repeat=size):
            law[tokens] = self.probability(tokens)
        return law


def toy_tree(
    parents: Sequence[int],
    mode: str,
    vocabulary: int = 3,
    sampling: Sampling = Sampling(),
    draft_sampling: Sampling | None = None,
    length: Callable[[Prefix], int] | None = None,
    seed: int = 0,
    kind: type[ToyTree] = ToyTree,
    one_hot: bool = False,
) -> ToyTree:
    """Return a tree over random laws in float64, the drafter's a perturbation of the target's."""
    noise = torch.Generator().manual_seed(seed)
    p, q = {}, {}
    for size in range(len(parents) + 1):
        for prefix in itertools.product(range(vocabulary), repeat=size):
            target = torch.randn(vocabulary, generator=noise, dtype=torch.float64)
            other = torch.randn(vocabulary, generator=noise, dtype=torch.float64)
            p[prefix] = probabilities(target, sampling)
            q[prefix] = probabilities(target + other, draft_sampling or sampling)
    return kind(tuple(parents), mode, p, q, length or (lambda _: len(parents)), one_hot)


def outcomes(tree: ToyTree) -> Iterator[Outcome]:
    """Yield all that recursive rejection can make of all drafts, given the laws they report."""
    for tokens, length, weight in tree.drafts():
        chance, residual = _rejections(tree, tokens, length)
        for end in range(-1, length):
            path = tree.path(end)
            refused = [i for i in range(length) if tree.parents[i] == end]
            refused += [i for node in path for i in tree.siblings(node)]
            happens, near, far = weight, [0.0] * len(tokens), [ALMOST_ONE] * len(tokens)
            for i in path:
                happens *= chance[i]
                near[i], far[i] = chance[i] - EDGE, 0.0
            for i in refused:
                happens *= 1 - chance[i]
                near[i] = chance[i] + EDGE
            if happens > RARE:
                assert min(near) >= 0, "an interval without an inside"
                yield Outcome(tokens, length, happens, path, near, far, residual[end])


def _rejections(
    tree: ToyTree, tokens: Prefix, length: int
) -> tuple[list[float], dict[int, list[float]]]:
    """Return P(node i stands | its parent does, its earlier siblings do not), and the residuals.

    The residual at a node, -1 for the root, is what all its children together leave over.
    """
    chance = [0.0] * length
    left = {node: tree.p[tree.prefix(node, tokens)].tolist() for node in range(-1, length)}
    for i in range(length):
        law, q, token = left[tree.parents[i]], tree.reported(i, tokens).tolist(), tokens[i]
        chance[i] = min(1.0, law[token] / q[token])
        over = [max(0.0, a - b) for a, b in zip(law, q, strict=True)]
        if sum(over) > RARE:  # else it is refused with probability 0
            left[tree.parents[i]] = [value / sum(over) for value in over]
    return chance, left


def emitted_law(rule: TokenVerifier, tree: ToyTree, found: Sequence[Outcome]) -> Tensor:
    """Return the law of what `rule` emits, continued by the target to the height plus one.

    Asserts that the rule turns the coins of each outcome into that outcome.
    """
    cases = [(o, c) for o in found for c in range(tree.vocabulary) if o.residual[c] > RARE]
    draft, p = tree.record([(o.tokens, o.length) for o, _ in cases])
    path = torch.zeros(len(cases), len(tree.parents), dtype=torch.bool)
    for row, (outcome, _) in enumerate(cases):
        path[row, list(outcome.path)] = True
    corrections = torch.tensor([c for _, c in cases])
    below = torch.tensor([sum(o.residual[:c]) for o, c in cases], dtype=torch.float64)
    step = torch.tensor([o.residual[c] for o, c in cases], dtype=torch.float64)
    near = torch.tensor([o.near for o, _ in cases], dtype=torch.float64)
    far = torch.tensor([o.far for o, _ in cases], dtype=torch.float64)
    for accept, correct in ((near, below + EDGE), (far, below + step - EDGE)):
        verdict = rule(draft, p, accept.clamp(max=ALMOST_ONE), correct)
        assert torch.equal(verdict.accepted, path), "the coins must cause the path"
        assert torch.equal(verdict.correction, corrections), "the coin must cause the correction"
    target = tree.target_law()
    law = torch.zeros_like(target)
    for outcome, correction in cases:
        prefix = (*(outcome.tokens[i] for i in outcome.path), correction)
        weight = outcome.weight * outcome.residual[correction]
        law[prefix] += weight * target[prefix] / tree.probability(prefix)
    return law


def acceptance(found: Sequence[Outcome]) -> float:
    """Return the probability that some drafted token stands."""
    return sum(outcome.weight for outcome in found if outcome.path)
