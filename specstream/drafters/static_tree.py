"""Trees of one fixed shape, filled with the best guesses for each depth (Medusa, streams).

Heads that guess several tokens ahead do so independently of each other, so the candidates of one
depth are the same below every node, and a node is known by its path of ranks: (0, 2) is the third
best token of depth 2 below the best of depth 1.  Shapes: B rows, H depths, R ranks, K nodes.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from specstream.structures import MAX_DRAFT, TokenDraft


class StaticTree(nn.Module):
    """The shape: which nodes there are, on which they hang, and which guess fills them.

    `paths` are the nodes' ranks from the root, every prefix of a path being a node too; they are
    put in order of depth.  Raises ValueError for a path without its parent, and for more nodes
    than a round may draft.
    """

    parents: Tensor
    depths: Tensor
    ranks: Tensor

    def __init__(self, paths: Iterable[Sequence[int]]) -> None:
        super().__init__()
        ordered = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        if not 1 <= len(ordered) <= MAX_DRAFT:
            raise ValueError(f"a tree has 1..{MAX_DRAFT} nodes, not {len(ordered)}")
        places = {path: i for i, path in enumerate(ordered)} | {(): -1}
        for path in ordered:
            if not path or min(path) < 0 or path[:-1] not in places:
                raise ValueError(f"tree node {list(path)} has no parent in the tree")
        self.paths = tuple(ordered)
        self.height = len(ordered[-1])
        self.num_ranks = 1 + max(max(path) for path in ordered)
        rows = [[places[p[:-1]], len(p) - 1, p[-1]] for p in ordered]
        parents, depths, ranks = torch.tensor(rows).unbind(1)
        self.register_buffer("parents", parents, persistent=False)  # (K,)
        self.register_buffer("depths", depths, persistent=False)  # (K,) 0 for the root's children
        self.register_buffer("ranks", ranks, persistent=False)  # (K,)

    def __len__(self) -> int:
        return len(self.paths)

    def cut(self, height: int) -> int:
        """Return how many nodes lie no deeper than `height`."""
        return sum(len(path) <= height for path in self.paths)

    def fill(self, guesses: Tensor, height: int) -> TokenDraft:
        """Return the tree down to `height`, filled from guesses (B, H, R), best first."""
        num, rows = self.cut(height), guesses.shape[0]
        tokens = guesses[:, self.depths[:num], self.ranks[:num]]  # (B, K)
        lengths = torch.full((rows,), num, device=guesses.device)
        parents = self.parents[:num].expand(rows, -1)
        return TokenDraft(tokens, None, lengths, parents, min(height, self.height))

    def extra_repr(self) -> str:
        """Name the nodes: costs of one shape do not hold for another."""
        return f"paths={self.paths}"


def product_paths(branching: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the paths of the tree in which each node of depth i has branching[i] children.

    Raises ValueError for numbers that are not positive, and for a tree too large to be listed.
    """
    if not branching or min(branching) < 1:
        raise ValueError(f"branching {list(branching)} must hold positive numbers")
    num_nodes = sum(itertools.accumulate(branching, operator.mul))
    if num_nodes > MAX_DRAFT:
        raise ValueError(
            f"branching {list(branching)} makes {num_nodes} nodes; a tree has 1..{MAX_DRAFT}"
        )
    depths = [[range(n) for n in branching[: i + 1]] for i in range(len(branching))]
    return [path for ranges in depths for path in itertools.product(*ranges)]


def likeliest_paths(accuracies: Sequence[Sequence[float]], num_nodes: int) -> list[tuple[int, ...]]:
    """Return the `num_nodes` paths most likely to stand, if depths err independently.

    accuracies[i][r] is how often the guess of rank r at depth i + 1 is right (Cai et al. 2024,
    Medusa, section 2.3.3: nodes are added greedily by the product along their path).  A node comes
    after its parent, and of equals the shallower first, then the one of lower ranks.
    """
    found: list[tuple[int, ...]] = []
    border: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]  # the best comes out first
    while border and len(found) <= num_nodes:
        chance, depth, path = heapq.heappop(border)
        found.append(path)
        if depth < len(accuracies):
            for rank, accuracy in enumerate(accuracies[depth]):
                heapq.heappush(border, (chance * accuracy, depth + 1, (*path, rank)))
    return found[1:]  # without the root
