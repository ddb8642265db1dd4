"""Typical acceptance: keep whatever the target finds plausible, at the price of its law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specstream.sampling import draw
from specstream.structures import Guarantee, Law, TokenDraft, Verdict
from specstream.verification.base import TokenVerifier
from specstream.verification.rejection import beyond_length, node_law, positions
from specstream.verification.tree import ancestor_matrix, parents_of, target_at_drafted


@dataclass(frozen=True)
class TypicalAcceptance(TokenVerifier):
    """Accept each drafted x with p(x) > min(epsilon, delta exp(-H(p))); the longest path stands.

    Cai et al. 2024, "Medusa" (arXiv 2401.10774), typical acceptance; the defaults are those of
    its code, which advises delta = sqrt(epsilon).  H is the entropy in nats of the target's law
    at that place, as warped: where the target hesitates, more is let through.  Among paths of
    equal length the one that ends at the lowest index stands.  The next token is drawn from p
    behind the path, so every round commits at least one token and its last is the target's own
    (the paper takes the greedy token there).

    The output's law is not the target's: no coin is tossed for a draft, so a plausible token
    that the drafter prefers comes too often.  At temperature 0 every law is one-hot and the
    output is the target's greedy text for every epsilon < 1.  Choose it only where quality is
    measured and the law of the output does not matter.

    Raises `ValueError` for epsilon outside [0, 1) or a negative delta.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    needs: ClassVar[frozenset[Law]] = frozenset({Law.DRAWN, Law.DETERMINISTIC})
    trees: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon must be in [0, 1), got {self.epsilon}")
        if not self.delta >= 0:
            raise ValueError(f"delta must not be negative, got {self.delta}")

    def __call__(
        self, draft: TokenDraft, p: Tensor, noise_accept: Tensor, noise_correct: Tensor
    ) -> Verdict:
        """Return the longest path of plausible tokens and a draw from p behind it."""
        assert p.shape[1] == draft.tokens.shape[1] + 1
        if draft.tokens.shape[1] == 0:
            return Verdict(torch.zeros_like(draft.tokens).bool(), draw(p[:, 0], noise_correct))
        parents = parents_of(draft)
        seen = ancestor_matrix(parents)  # (B, K, K)
        typical = target_at_drafted(draft, parents, p) > self.floor(p).gather(-1, parents + 1)
        typical = typical & ~beyond_length(draft)
        whole = (typical.unsqueeze(1) | ~seen).all(-1)  # with all its ancestors
        nodes = positions(draft.tokens)
        # The first of the longest: a longer path outweighs every index.
        best = (seen.sum(-1) * whole * len(nodes) - nodes).argmax(-1)  # (B,)
        rows = torch.arange(len(best), device=best.device)
        accepted = node_law(seen, best, rows) & whole
        end = ((nodes + 1) * accepted).amax(-1)  # (B,) the row of p at the path's end
        return Verdict(accepted, draw(node_law(p, end, rows), noise_correct))

    def floor(self, p: Tensor) -> Tensor:
        """Return the probability (...) that a token must exceed under laws p (..., V)."""
        entropy = torch.special.entr(p).sum(-1)
        return (self.delta * torch.exp(-entropy)).clamp(max=self.epsilon)
