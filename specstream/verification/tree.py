"""Exact verification of a drafted token tree: rejection, recursively along siblings.

A tree is read from `draft.parents` (B, K): node i hangs on node parents[i] < i, or on the last
committed token, the root, where that is -1.  Siblings stand in the order in which they were drawn;
breadth first and depth first are both fine.  Beyond a row's length `parents` may hold anything in
-1..K-1.  p (B, K+1, V) has the target's law after the root first: after node i it is p[:, i+1].

Reading order: `ancestor_matrix`, `depths` and `accepted_path` (what a tree is to the rest of the
package), `TreeRejection` (the rule), `_one_hot` and `_scan` (the same rule for drafters that
report no law and for those that do).  Shapes: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from specstream.sampling import draw
from specstream.structures import Guarantee, Law, TokenDraft, Verdict
from specstream.verification.base import TokenVerifier
from specstream.verification.rejection import TRACE, beyond_length, node_law, positions


def ancestor_matrix(parents: Tensor) -> Tensor:
    """Return (B, K, K) bool: entry (i, j) says that node j is node i or an ancestor of it.

    This is the attention mask among the nodes of a tree with parents (B, K), since a node sees
    the root and all that was committed anyway.  After n rounds of doubling a node has met its
    next 2^n - 1 ancestors.
    """
    size = parents.shape[1]
    above = pad(parents + 1, (1, 0))  # (B, K+1) with the root as node 0, its own parent
    seen = torch.eye(size + 1, dtype=torch.bool, device=parents.device).expand(len(parents), -1, -1)
    for _ in range(_num_doublings(size)):
        seen = seen | seen.gather(1, above.unsqueeze(-1).expand_as(seen))
        above = above.gather(1, above)
    return seen[:, 1:, 1:]


def depths(parents: Tensor) -> Tensor:
    """Return how many tokens (B, K) after the root each node stands: 1 for the root's children."""
    return ancestor_matrix(parents).sum(-1)


def accepted_path(accepted: Tensor, width: int) -> Tensor:
    """Return the nodes (B, width) that `accepted` (B, K) marks, in the order of the path, then K.

    A parent comes before its children, so the order of the path is that of the indices.  A path
    longer than `width` is cut; the depth of the tree is always enough.
    """
    size = accepted.shape[1]
    nodes = torch.where(accepted, positions(accepted), size).sort(-1).values[:, :width]
    return pad(nodes, (0, width - nodes.shape[1]), value=size)


def parents_of(draft: TokenDraft) -> Tensor:
    """Return the parents (B, K) of a draft; a chain is a tree in which each node has one child."""
    if draft.parents is None:
        return (positions(draft.tokens) - 1).expand_as(draft.tokens)
    return draft.parents


def target_at_drafted(draft: TokenDraft, parents: Tensor, p: Tensor) -> Tensor:
    """Return p (B, K) of each drafted token, given the path to its parent; p (B, K+1, V)."""
    return p.flatten(1).gather(-1, (parents + 1) * p.shape[-1] + draft.tokens)


@dataclass(frozen=True)
class TreeRejection(TokenVerifier):
    """Try siblings in turn against what is left of p, and walk down from the one that stands.

    Miao et al. 2023 (SpecInfer, Algorithm 2: multi-step speculative sampling) for siblings drawn
    independently, Jeon et al. 2024 ("Recursive speculative decoding", recursive rejection) for
    siblings drawn without replacement.  At a node with r_0 = p child i, drawn from q_i given its
    earlier siblings, is accepted with probability min(1, r_{i-1}(x) / q_i(x)); else
    r_i = norm(max(0, r_{i-1} - q_i)).  Where no child stands, the next token is drawn from the
    last r.  With one child at each node this is `TokenRejection`, coin for coin.

    `draft.probs` (B, K, V) holds the q_i: without replacement, the parent's law with the tokens
    of earlier siblings removed, normalised anew.  The decision to draw a node may depend on what
    was drawn before, never on its own token: a tree pruned by score is deterministic (probs
    None, q_i one-hot).  Then child i is accepted with p(x_i) / (1 - p of the siblings before), k
    siblings stand with probability p(x_1) + .. + p(x_k), which no rule exceeds, and a token that
    a sibling already had is refused.  Choose it for every tree; chains of 3 and more do better
    with `BlockRejection`.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT_LAW
    needs: ClassVar[frozenset[Law]] = frozenset({Law.DRAWN, Law.DETERMINISTIC})
    trees: ClassVar[bool] = True

    def __call__(
        self, draft: TokenDraft, p: Tensor, noise_accept: Tensor, noise_correct: Tensor
    ) -> Verdict:
        """Return the accepted path and one draw from what its last node's law has left."""
        assert p.shape[1] == draft.tokens.shape[1] + 1
        if draft.tokens.shape[1] == 0:
            return Verdict(torch.zeros_like(draft.tokens).bool(), draw(p[:, 0], noise_correct))
        walk = _one_hot if draft.probs is None else _scan
        accepted, law = walk(draft, parents_of(draft), p, noise_accept)
        return Verdict(accepted, draw(law, noise_correct))


def _one_hot(draft: TokenDraft, parents: Tensor, p: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the accepted path (B, K) and the residual (B, V) where every q is one-hot.

    All tests at once: of p only the drafted tokens are read, and one row at the end.
    """
    nodes, beyond = positions(draft.tokens), beyond_length(draft)
    earlier = (parents.unsqueeze(2) == parents.unsqueeze(1)) & (nodes.unsqueeze(-1) > nodes)
    same = draft.tokens.unsqueeze(2) == draft.tokens.unsqueeze(1)  # (B, K, K) like `earlier`
    void = (earlier & same).any(-1) | beyond  # nothing of p is left there, or there is no node
    mass = target_at_drafted(draft, parents, p).masked_fill(void, 0.0).double()  # (B, K)
    spent = (earlier * mass.unsqueeze(1)).sum(-1)
    # Rounding may spend a hair over 1: a remainder below 0 would let a token of mass 0 pass.
    passed = noise * (1.0 - spent).clamp(min=0.0) < mass
    first = passed & ~(earlier & passed.unsqueeze(1)).any(-1)
    accepted = _unbroken(first, parents)
    end = ((nodes + 1) * accepted).amax(-1)  # (B,) the row of p at the path's end
    law = node_law(p, end, torch.arange(len(p), device=p.device))  # (B, V)
    refused = (parents + 1 == end.unsqueeze(-1)) & ~beyond
    # Nodes elsewhere may hold the same token: all write the same value, so no order matters.
    struck = (same & refused.unsqueeze(1)).any(-1)
    left = law.gather(-1, draft.tokens).masked_fill(struck, 0.0)
    return accepted, torch.maximum(law.scatter(-1, draft.tokens, left), law * TRACE)


def _scan(draft: TokenDraft, parents: Tensor, p: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the accepted path (B, K) and the residual (B, V) where each node reports its q.

    One walk over the nodes in their order carries where the path ends, what is left there of its
    law, unnormalised, and the mass of that.  Nodes off the path are passed by.  The law is changed
    in place: fresh memory for each node would cost more than the arithmetic.
    """
    assert draft.probs is not None
    q_drafted = draft.probs.gather(-1, draft.tokens.unsqueeze(-1)).squeeze(-1).double()
    law, here, accepted = p[:, 0].clone(), torch.full_like(draft.lengths, -1), []
    mass = torch.ones_like(noise[:, 0])  # (B,) float64
    for i in range(draft.tokens.shape[1]):
        tested = (parents[:, i] == here) & (i < draft.lengths)
        left_at = law.gather(-1, draft.tokens[:, i : i + 1]).squeeze(-1)
        passed = tested & (noise[:, i] * (q_drafted[:, i] * mass) < left_at)
        failed = tested & ~passed
        # Scaled by 0 where nothing was tested: the row stays as it is.
        scale = (mass * failed).to(law.dtype).unsqueeze(-1)
        law.addcmul_(draft.probs[:, i], scale, value=-1.0).clamp_(min=0.0)
        mass = torch.where(failed, law.sum(-1).double(), mass).masked_fill(passed, 1.0)
        moved = passed.to(law.dtype).unsqueeze(-1)
        law.mul_(1.0 - moved).addcmul_(p[:, i + 1], moved)  # the node's own law, to the bit
        here = torch.where(passed, i, here)
        accepted.append(passed)
    whole = node_law(p, here + 1, torch.arange(len(p), device=p.device))
    return torch.stack(accepted, 1), torch.maximum(law, whole * TRACE)


def _unbroken(standing: Tensor, parents: Tensor) -> Tensor:
    """Return which nodes (B, K) stand together with all their ancestors, by doubling."""
    above = pad(parents + 1, (1, 0))  # (B, K+1) with the root as node 0, its own parent
    # Padded as bytes: inductor's vector code for padded bools does not always compile.
    standing = pad(standing.to(torch.uint8), (1, 0), value=1) > 0
    for _ in range(_num_doublings(parents.shape[1])):
        standing = standing & standing.gather(1, above)
        above = above.gather(1, above)
    return standing[:, 1:]


def _num_doublings(size: int) -> int:
    """Return n with 2^n >= size: from a node to any of its ancestors there are size - 1 steps."""
    return max(size - 1, 0).bit_length()
