"""Any-subset speculative decoding on a joint law that is written out: a reference to enumerate.

Guo and Ermon 2025 (arXiv 2504.20456), algorithm ASSD.  A model that knows the law of any position
given any others fills a canvas in an order of positions: in one pass it drafts the next few, each
as if it came next (q), in a second it scores them given the drafted before them (p), and they
stand or fall by the ratio rule.  Nothing is sampled here: every draft and every decision is
followed with its probability, so that what comes out is a law and not an estimate.

Shapes: n positions, V vocabulary; a joint law is an array (V, .., V) with one axis a position.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Prefix = tuple[int, ...]  # the tokens of the first positions in the order
Acceptance = Callable[[float, float], float]  # of p(x) and q(x)


def ratio(p: float, q: float) -> float:
    """Return the probability with which the ratio rule accepts."""
    return min(1.0, p / q)


def always(p: float, q: float) -> float:
    """Return that of a rule that verifies nothing: the draft's product law comes out."""
    return 1.0


def left_over(p: Tensor, q: Tensor) -> Tensor:
    """Return the law (V,) of the token that replaces a rejected one."""
    mass = (p - q).clamp(min=0.0)
    return mass / mass.sum()


@dataclass(frozen=True)
class AnySubset:
    """A joint law, the order of its positions, and how many are drafted in a round."""

    joint: Tensor  # (V, .., V) float64
    order: tuple[int, ...]
    num_drafted: int
    accept: Acceptance = ratio
    replace: Callable[[Tensor, Tensor], Tensor] = left_over

    def conditional(self, known: Prefix, place: int) -> Tensor:
        """Return the law (V,) of the `place`-th position in the order, given the first ones."""
        ordered = self.joint.permute(self.order)[known].movedim(place - len(known), 0)
        mass = ordered.flatten(1).sum(-1) if ordered.dim() > 1 else ordered
        return mass / mass.sum()

    def round(self, known: Prefix) -> dict[Prefix, float]:
        """Return the law of what is known after one more round."""
        places = range(len(known), min(len(known) + self.num_drafted, len(self.order)))
        laws = [self.conditional(known, place) for place in places]
        after: dict[Prefix, float] = {}

        def add(prefix: Prefix, weight: float) -> None:
            after[prefix] = after.get(prefix, 0.0) + weight

        for drafted in itertools.product(range(self.joint.shape[0]), repeat=len(places)):
            weight = 1.0
            for q, token in zip(laws, drafted, strict=True):
                weight *= q[token].item()
            for i, (q, token) in enumerate(zip(laws, drafted, strict=True)):
                if weight == 0:
                    break
                p = self.conditional((*known, *drafted[:i]), places[i])
                accepted = self.accept(p[token].item(), q[token].item())
                if accepted < 1:
                    for other, share in enumerate(self.replace(p, q).tolist()):
                        add((*known, *drafted[:i], other), weight * (1 - accepted) * share)
                weight *= accepted
            else:
                add((*known, *drafted), weight)
        return after

    def law(self) -> tuple[Tensor, int]:
        """Return the law (V, .., V) of the finished canvas and the most rounds it took."""
        running: dict[Prefix, float] = {(): 1.0}
        law = torch.zeros_like(self.joint)
        rounds = 0
        while running:
            rounds += 1
            following: dict[Prefix, float] = {}
            for known, weight in running.items():
                for prefix, share in self.round(known).items():
                    if share * weight == 0:
                        continue
                    if len(prefix) < len(self.order):
                        following[prefix] = following.get(prefix, 0.0) + weight * share
                    else:
                        places = sorted(range(len(prefix)), key=self.order.__getitem__)
                        law[tuple(prefix[place] for place in places)] += weight * share
            running = following
        return law, rounds
