"""Exact verification of a drafted chain: token by token, or the block as a whole.

Both rules are two pure steps, and `__call__` only composes them with uniforms:

1. `tests`: each drafted token meets an acceptance test, passed with a known probability;
2. `residual`: the law of the token that follows the accepted prefix, max(0, w p - q), which is
   what p leaves over after acceptance has paid out all it could.  At the end of the draft
   nothing was drafted, q = 0, and the residual is p itself: the bonus token is no special case.

The tests below the package enumerate these two steps exactly, so the claim EXACT_LAW is proven
on small vocabularies and not only measured.  Shapes: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specstream.sampling import draw
from specstream.structures import Guarantee, Law, TokenDraft, Verdict
from specstream.verification.base import TokenVerifier

# Where p and q agree to the last bit the residual rounds to zero everywhere.  Such a node is
# rejected with probability 0 in exact arithmetic, so what is drawn there is free, as long as it
# is a token that p allows.  A trace of p achieves it without a branch: it changes the law by
# less than 1e-30 elsewhere.
TRACE = 1e-30


@dataclass(frozen=True, slots=True)
class ChainTests:
    """The acceptance test of each drafted token: passed iff u * denominator < numerator.

    A quotient is never formed: a denominator of 0 does no harm, and a token with numerator 0
    (one that the target excludes) never passes, whatever u.
    """

    numerators: Tensor  # (B, K), 0 beyond the row's length
    denominators: Tensor  # (B, K)
    weights: Tensor | None  # (B, K+1) the scale w of p in the residual at each node; None: 1

    @property
    def probabilities(self) -> Tensor:
        """The probability (B, K) in float64 that each test is passed."""
        numerators = self.numerators.double()
        passed = (numerators / self.denominators.double()).clamp(max=1.0)
        return torch.where(numerators > 0, passed, 0.0)


class ChainRejection(TokenVerifier):
    """What token-wise and block verification have in common."""

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT_LAW
    needs: ClassVar[frozenset[Law]] = frozenset({Law.DRAWN, Law.DETERMINISTIC})

    @abstractmethod
    def tests(self, draft: TokenDraft, p: Tensor) -> ChainTests:
        """Return the acceptance test of each drafted token; p (B, K+1, V)."""

    @abstractmethod
    def num_accepted(self, passed: Tensor) -> Tensor:
        """Return the length (B,) of the accepted prefix, given which tests (B, K) passed."""

    def residual(
        self, draft: TokenDraft, p: Tensor, weights: Tensor | None, nodes: Tensor
    ) -> Tensor:
        """Return the law (B, V), not normalised, of the token after the first `nodes` (B,).

        p (B, K+1, V); `weights` as in `ChainTests`.  Only the row that is drawn from is made.
        """
        rows = torch.arange(len(nodes), device=p.device)
        law = node_law(p, nodes, rows)
        trace = law * TRACE
        if weights is not None:
            law = law * weights.gather(-1, nodes.unsqueeze(-1)).to(law.dtype)
        if draft.tokens.shape[1] == 0:
            return law
        inside = (nodes < draft.lengths).unsqueeze(-1)  # (B, 1) else q = 0 here
        last = nodes.clamp(max=draft.tokens.shape[1] - 1)
        if draft.probs is None:
            token = draft.tokens.gather(-1, last.unsqueeze(-1))  # (B, 1)
            kept = law.gather(-1, token).masked_fill(inside, 0.0)
            law = law.scatter(-1, token, kept)  # w p <= 1, so nothing of it is left at the token
        else:
            law = torch.addcmul(law, node_law(draft.probs, last, rows), inside, value=-1.0)
        return torch.maximum(law, trace)

    def __call__(
        self, draft: TokenDraft, p: Tensor, noise_accept: Tensor, noise_correct: Tensor
    ) -> Verdict:
        """Return the accepted prefix and one draw from the residual behind it."""
        assert draft.parents is None, "a chain verifier does not read trees"
        assert p.shape[1] == draft.tokens.shape[1] + 1
        tests = self.tests(draft, p)
        passed = noise_accept * tests.denominators < tests.numerators
        count = self.num_accepted(passed)
        accepted = positions(draft.tokens) < count.unsqueeze(-1)
        law = self.residual(draft, p, tests.weights, count)
        return Verdict(accepted, draw(law, noise_correct))


@dataclass(frozen=True)
class TokenRejection(ChainRejection):
    """Accept each drafted x with probability min(1, p(x) / q(x)), until the first that fails.

    Leviathan et al. 2023 (Algorithm 1) and Chen et al. 2023 (Algorithm 2).  Token-wise no rule
    accepts more often: the probability is the sum over v of min(p, q) = 1 - TV(p, q).  Choose it
    when K is 1 or 2, or when the acceptance of a position is to be read off as that sum.
    """

    def tests(self, draft: TokenDraft, p: Tensor) -> ChainTests:
        """Return p(x) over q(x), each given the drafted tokens before it."""
        p_drafted, q_drafted = _at_drafted(draft, p)
        return ChainTests(p_drafted.masked_fill(beyond_length(draft), 0.0), q_drafted, None)

    def num_accepted(self, passed: Tensor) -> Tensor:
        """Return how many tests (B, K) passed before the first that failed."""
        return passed.cumprod(-1).sum(-1)


@dataclass(frozen=True)
class BlockRejection(ChainRejection):
    """Accept the longest prefix whose test passes: never fewer tokens than `TokenRejection`.

    Sun et al. 2024, "Block verification accelerates speculative decoding" (arXiv 2403.10444),
    Algorithm 2.  With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i)), prefix i is tested with
    probability r_i / (r_i + 1 - w_i), r_i = sum over v of max(0, w_i p - q) at its node (q = 0 at
    the end of the block, hence w there).  Tokens that the draft was too modest about pay for
    later ones it was too sure of, which the token-wise rule cannot use.  The first i tokens stand
    with probability E[w_i].  Choose it for K of 3 and more.

    A row shorter than K is a block of its own length; the length may depend on the drafted
    tokens before the end (a node where drafting stopped is a node with q = 0).
    """

    def tests(self, draft: TokenDraft, p: Tensor) -> ChainTests:
        """Return r_i over r_i + 1 - w_i, and the weights w."""
        p_drafted, q_drafted = _at_drafted(draft, p)
        beyond = beyond_length(draft)
        weights = _block_weights(p_drafted.masked_fill(beyond, 0.0), q_drafted)  # (B, K+1)
        after = weights[:, 1:]  # (B, K)
        inner = self._inner_mass(draft, p, after[:, :-1])  # (B, K-1)
        # At its last token nothing was drafted further: the whole of w p is left over.
        ends = positions(draft.tokens) == draft.lengths.unsqueeze(-1) - 1
        mass = torch.where(ends, after, torch.nn.functional.pad(inner, (0, 1)))
        return ChainTests(mass.masked_fill(beyond, 0.0), mass + (1.0 - after), weights)

    def _inner_mass(self, draft: TokenDraft, p: Tensor, weights: Tensor) -> Tensor:
        """Return r (B, K-1) at the nodes 1..K-1, weights (B, K-1) given."""
        scale = weights.unsqueeze(-1).to(p.dtype)  # (B, K-1, 1)
        if draft.probs is None:
            drafted = draft.tokens[:, 1:].unsqueeze(-1)
            mass = scale * (1.0 - p[:, 1:-1].gather(-1, drafted))
            return mass.squeeze(-1).double()
        left = p[:, 1:-1] * scale - draft.probs[:, 1:]  # (B, K-1, V)
        return left.clamp_(min=0.0).sum(-1).double()

    def num_accepted(self, passed: Tensor) -> Tensor:
        """Return the length of the longest prefix whose test (B, K) passed."""
        if passed.shape[1] == 0:
            return passed.sum(-1)
        return ((positions(passed) + 1) * passed).amax(-1)


def _block_weights(p_drafted: Tensor, q_drafted: Tensor) -> Tensor:
    """Return w (B, K+1): w_0 = 1, w_i = min(1, w_{i-1} p_i / q_i), in float64.

    The recursion has a closed form (Lindley's): with S the running sum of log p_i / q_i,
    log w_i = S_i - max(0, S_1, .., S_i).  Six operations instead of two for each token.
    """
    ratios = p_drafted.double() / q_drafted.double()
    logs = torch.where(p_drafted > 0, ratios, 0.0).log().cumsum(-1)
    logs = torch.nn.functional.pad(logs, (1, 0))  # (B, K+1), S_0 = 0
    return (logs - logs.cummax(-1).values).exp()


def _at_drafted(draft: TokenDraft, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and q (B, K) of the drafted tokens."""
    tokens = draft.tokens.unsqueeze(-1)
    p_drafted = p[:, :-1].gather(-1, tokens).squeeze(-1)
    if draft.probs is None:
        return p_drafted, torch.ones_like(p_drafted)
    return p_drafted, draft.probs.gather(-1, tokens).squeeze(-1)


def positions(drafted: Tensor) -> Tensor:
    """Return 0..K-1 for a tensor (B, K)."""
    return torch.arange(drafted.shape[1], device=drafted.device)


def beyond_length(draft: TokenDraft) -> Tensor:
    """Return a mask (B, K), True where the row has ended."""
    return positions(draft.tokens) >= draft.lengths.unsqueeze(-1)


def node_law(laws: Tensor, nodes: Tensor, rows: Tensor) -> Tensor:
    """Return laws[b, nodes[b]] (B, V) of laws (B, N, V): one row copied, nothing else read."""
    return laws.flatten(0, 1).index_select(0, rows * laws.shape[1] + nodes)
