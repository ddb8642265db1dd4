"""Trees that grow where the drafter is sure (Li et al. 2024, EAGLE-2, arXiv 2406.16858, section 4).

At each depth the likeliest nodes are expanded, and in the end the likeliest of all that were found
are drafted.  Which drafter finds them is not known here.

Shapes: B rows, W nodes expanded at a depth, N candidates, K nodes drafted, S nodes expanded so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.models.cache import NodeTree
from specstream.structures import TokenDraft


@dataclass(frozen=True, slots=True)
class Candidates:
    """Nodes that may enter the tree, those of one depth after those of the depth before."""

    tokens: Tensor  # (B, N)
    scores: Tensor  # (B, N) log of the probability of the whole path
    parents: Tensor  # (B, N) which candidate, -1 for the last committed token
    depths: Tensor  # (B, N) from 1


def rerank(found: Candidates, num_nodes: int, heights: Tensor, height: int) -> TokenDraft:
    """Return the tree of the `num_nodes` likeliest candidates, in order of depth.

    A path is at most as likely as its beginning and comes after it, so with ties going to the
    earlier candidate no node is chosen without its ancestors.  A row's candidates below its own
    height (B,) are not drafted; they may fill it up beyond its length.  `height` is the highest.
    """
    within = found.depths <= heights[:, None]  # (B, N)
    scores = found.scores.masked_fill(~within, -torch.inf)
    chosen = likeliest(scores, num_nodes).sort(1).values  # (B, K)
    numbers = torch.arange(num_nodes, device=chosen.device).expand_as(chosen)
    renumbered = torch.full_like(found.parents, -1).scatter(1, chosen, numbers)
    above = found.parents.gather(1, chosen)
    lengths = within.gather(1, chosen).sum(1)
    parents = torch.where(above < 0, above, renumbered.gather(1, above.clamp(min=0)))
    return TokenDraft(found.tokens.gather(1, chosen), None, lengths, parents, height)


def likeliest(scores: Tensor, num: int) -> Tensor:
    """Return the places (B, num) of the highest scores (B, N), of equals the first ones first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :num]


def joined(first: Candidates, second: Candidates) -> Candidates:
    """Return both, the second ones numbered on."""
    return Candidates(
        torch.cat([first.tokens, second.tokens], 1),
        torch.cat([first.scores, second.scores], 1),
        torch.cat([first.parents, second.parents], 1),
        torch.cat([first.depths, second.depths], 1),
    )


def extended(tree: NodeTree | None, owners: Tensor) -> NodeTree:
    """Add W nodes to the expanded ones; owners (B, W) number their parents among the last W."""
    width = owners.shape[1]
    own = torch.eye(width, dtype=torch.bool, device=owners.device).expand(len(owners), -1, -1)
    if tree is None:
        return NodeTree(torch.zeros_like(owners), own)
    above = tree.ancestors[:, -width:].take_along_dim(owners[:, :, None], 1)  # (B, W, S)
    unseen = torch.zeros_like(above.transpose(1, 2))  # no node sees a later one
    upper = torch.cat([tree.ancestors, unseen], 2)
    lower = torch.cat([above, own], 2)
    depths = torch.cat([tree.depths, tree.depths[:, -width:] + 1], 1)
    return NodeTree(depths, torch.cat([upper, lower], 1))
