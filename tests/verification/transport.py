"""The best that any rule can make of several drafted siblings: optimal transport as a cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor


def optimal_acceptance(p: Tensor, drafts: Iterable[tuple[Iterable[int], float]]) -> float:
    """Return the greatest P(target's token is among the drafted), over all couplings.

    p (V,) is the target's law, `drafts` the drafted siblings with their probabilities Q.  A
    coupling is a flow from the tokens y, which supply p(y), to the sets S of drafted tokens,
    which take Q(S), and only a pair with y in S counts.  By max-flow = min-cut the most that
    counts is the least cut: with A the tokens left on the side of the source, all others are cut
    off at the price p, and so is every S that an edge from A reaches, at the price Q(S):

        min over A of  p(not A) + Q(S meets A)  =  1 - max over A of  p(A) - Q(S meets A).

    (Sun et al. 2023 pose the problem, Hu et al. 2025 solve it over subsets.)  With one sibling it
    is sum of min(p, q): A holds the tokens with p > q.  All 2^V subsets are tried.
    """
    sets = [(frozenset(tokens), weight) for tokens, weight in drafts]
    law = p.tolist()
    cuts = []
    for size in range(len(law) + 1):
        for kept in itertools.combinations(range(len(law)), size):
            outside = sum(law) - sum(law[y] for y in kept)
            cuts.append(outside + sum(w for tokens, w in sets if tokens & set(kept)))
    return min(cuts)
