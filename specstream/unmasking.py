"""Which masked positions one denoising step of a masked diffusion model reveals.

Reading order: `Unmasking` (the interface), `StaticSchedule` (a count fixed beforehand), the three
that count by the model's certainty, and the ranks all of them are made of.

Such a model predicts every masked position at once, each as if it were the only one: the more of
them a step reveals, the fewer steps and the worse the fit of the revealed tokens to each other.
Every rule here is an order of the masked positions and a count: the first so many are revealed.
Which tokens they get is not decided here, and nothing is drawn.

Rows never look at each other, and among equals the lowest position goes first, so that a row is
decoded alike in every batch.  Shapes: B batch rows, C positions of the canvas, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Order = Literal["confidence", "random", "margin", "entropy"]


class Unmasking(ABC):
    """A rule of revealing: a frozen dataclass of its options, without state."""

    @abstractmethod
    def choose(
        self,
        probs: Tensor,
        tokens: Tensor,
        masked: Tensor,
        step: Tensor,
        total: Tensor,
        coins: Tensor,
    ) -> Tensor:
        """Return which positions (B, C) bool this step reveals.

        probs (B, C, V): the law at each position, float32 or better; tokens (B, C): the candidate
        drawn from each; masked (B, C) bool: the positions that are masked and may be revealed
        now, those of the current block; step (B,): steps that the row has made in this block;
        total (B,): masks that the block held before the first of them; coins (B, C): float64
        uniforms, for orders that are random.

        The chosen are a subset of the masked, at least one in each row that has any: decoding
        never stands still.  What the other arguments hold elsewhere does not matter.
        """


@dataclass(frozen=True)
class StaticSchedule(Unmasking):
    """Reveal an equal share of the block in each of `num_steps` steps, the first in `order`.

    Nie et al. 2025, "LLaDA" (arXiv 2502.09992): of n masks step k = 0, 1, .. reveals
    n // num_steps, and one more while k < n % num_steps; with more steps than masks each reveals
    one, until none is left.  Orders: "confidence", the probability of the candidate, highest first
    (LLaDA's low-confidence remasking); "margin", best minus second-best probability, highest
    first; "entropy", lowest first; "random", by coins.  Margin and entropy are Dream's (Ye et al.
    2025, arXiv 2508.15487).

    Choose it for a number of steps that is known beforehand, or as the trajectory that a lossless
    method reproduces; steps are wasted where the model is sure and too few where it is not.

    Raises `ValueError` for `num_steps` below one or an unknown order.
    """

    num_steps: int
    order: Order = "confidence"

    def __post_init__(self) -> None:
        if not self.num_steps >= 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if self.order not in get_args(Order):
            names = ", ".join(get_args(Order))
            raise ValueError(f"order must be one of {names}, got {self.order!r}")

    def choose(
        self,
        probs: Tensor,
        tokens: Tensor,
        masked: Tensor,
        step: Tensor,
        total: Tensor,
        coins: Tensor,
    ) -> Tensor:
        """Return the first of the masked positions, as many as are due in this step."""
        _, ranks = _in_order(_precedence(self.order, probs, tokens, coins), masked)
        return masked & (ranks < self._num_due(step, total)[:, None])

    def _num_due(self, step: Tensor, total: Tensor) -> Tensor:
        """Return how many positions are revealed in `step` of a block that held `total` masks.

        One at least: beyond the schedule too, where a row is that had positions masked again.
        """
        return (total // self.num_steps + (step < total % self.num_steps)).clamp(min=1)


@dataclass(frozen=True)
class Threshold(Unmasking):
    """Reveal every position whose candidate has at least this probability, and the best one.

    Wu et al. 2025, "Fast-dLLM" (arXiv 2505.22618), confidence-aware parallel decoding.  If each of
    n candidates has more than 1 - e and (n + 1) e <= 1, they are the most probable n tokens of
    the joint law too (its theorem 1); the threshold alone does not see to the second condition.
    Choose it as the plain way to few steps.

    Raises `ValueError` for a threshold outside (0, 1].
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")

    def choose(
        self,
        probs: Tensor,
        tokens: Tensor,
        masked: Tensor,
        step: Tensor,
        total: Tensor,
        coins: Tensor,
    ) -> Tensor:
        """Return the positions with confident candidates."""
        confidence, ranks = _by_confidence(probs, tokens, masked)
        return _first((confidence >= self.threshold).sum(-1), ranks, masked)


@dataclass(frozen=True)
class Factor(Unmasking):
    """Reveal the n most confident positions, for the largest n with (n + 1)(1 - c_n) < factor.

    Wu et al. 2025, "Fast-dLLM" (arXiv 2505.22618), the factor strategy; c_n is the probability of
    the n-th most confident candidate.  With factor 1 its theorem 1 holds for what is revealed: a
    step of greedy decoding commits the most probable tokens of the joint law.  Choose it over
    `Threshold` where many positions are revealed at once.  (The authors' code reveals all where
    only the least confident position fails the test.)

    Raises `ValueError` for a factor that is not positive.
    """

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor must be positive, got {self.factor}")

    def choose(
        self,
        probs: Tensor,
        tokens: Tensor,
        masked: Tensor,
        step: Tensor,
        total: Tensor,
        coins: Tensor,
    ) -> Tensor:
        """Return the positions that are confident enough for their number."""
        confidence, ranks = _by_confidence(probs, tokens, masked)
        nth = torch.arange(1, masked.shape[1] + 1, device=masked.device)
        # The left side grows with n, so the n that satisfy it are the first ones: count them.
        fits = (nth + 1) * (1.0 - confidence) < self.factor
        return _first(fits.sum(-1), ranks, masked)


@dataclass(frozen=True)
class EntropyBound(Unmasking):
    """Reveal the positions of least entropy, as many as together stay below a bound of error.

    Ben-Hamu et al. 2025, the EB-sampler (arXiv 2505.24857): the longest prefix U in ascending
    entropy H (nats) with sum of H over U minus its largest H <= bound.  That difference bounds
    the mutual information between the revealed tokens, which revealing them independently loses.
    With bound 0 a step reveals the positions that are certain (H = 0) and one more.
    Choose it to trade steps for error by one number that does not depend on the block's size.

    Raises `ValueError` for a negative bound.
    """

    bound: float

    def __post_init__(self) -> None:
        if not self.bound >= 0:
            raise ValueError(f"bound must not be negative, got {self.bound}")

    def choose(
        self,
        probs: Tensor,
        tokens: Tensor,
        masked: Tensor,
        step: Tensor,
        total: Tensor,
        coins: Tensor,
    ) -> Tensor:
        """Return the longest prefix in ascending entropy whose error stays within the bound."""
        entropy, ranks = _in_order(_precedence("entropy", probs, tokens, coins), masked)
        # The largest H of a prefix is its last: what counts is the sum of those before it.
        before = entropy.double().cumsum(-1).roll(1, -1)
        before[:, :1] = 0.0
        return _first((before <= self.bound).sum(-1), ranks, masked)


def _precedence(order: Order, probs: Tensor, tokens: Tensor, coins: Tensor) -> Tensor:
    """Return a number (B, C) for each position; the lowest is revealed first."""
    if order == "random":
        return coins
    if order == "entropy":
        entropy: Tensor = torch.special.entr(probs).sum(-1)
        return entropy
    if order == "margin":
        best = probs.topk(2, dim=-1).values  # (B, C, 2)
        return best[..., 1] - best[..., 0]
    return -_confidence(probs, tokens)


def _confidence(probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the probability (B, C) of each candidate."""
    return probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _in_order(precedence: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return `precedence` (B, C) ascending and the rank (B, C) of each position in it.

    Positions that are not masked come last, as infinity; ties are broken by position.
    """
    ordered = precedence.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)
    return ordered.values, ordered.indices.argsort(-1)


def _by_confidence(probs: Tensor, tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the candidates' probabilities (B, C) descending and each position's rank in them.

    Positions that are not masked come last, as minus infinity.
    """
    ordered, ranks = _in_order(-_confidence(probs, tokens), masked)
    return -ordered, ranks


def _first(count: Tensor, ranks: Tensor, masked: Tensor) -> Tensor:
    """Return the first `count` (B,) of the masked positions, at least one, (B, C) bool."""
    return masked & (ranks < count.clamp(min=1).unsqueeze(-1))
