"""How many tokens to draft: a fixed number, or what the measured costs and the row's history say.

A row chooses from its own history and a saved table of costs, so its output does not depend on its
neighbours in the batch.  The choice is made before a round starts, from earlier rounds only, so it
cannot bias the law.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from specstream.structures import MAX_DRAFT

RETRY_WEIGHT = 2.0  # observations that old evidence counts for when drafting is tried again


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of the passes of one pair of models on one machine.

    `plain` is a target pass over one token a row; `verify[k]` one over k + 1 tokens a row and
    `draft[k]` the drafting of k tokens.  Entries of lengths that are never chosen mean nothing.
    """

    plain: float
    verify: tuple[float, ...]
    draft: tuple[float, ...]

    def round_seconds(self, num_tokens: int) -> float:
        """Seconds of a round that drafts `num_tokens`."""
        if num_tokens == 0:
            return self.plain
        return self.verify[num_tokens] + self.draft[num_tokens]


class RowLength(ABC):
    """The draft length of one row: chosen before each round, told its outcome after."""

    @abstractmethod
    def choose(self) -> int:
        """Return how many tokens to draft in the coming round."""

    def record(self, tested: int, accepted: int) -> None:  # noqa: B027
        """Learn that `accepted` of `tested` drafted tokens stood, one after the other."""


class DraftLength(ABC):
    """A policy for draft lengths; `max_tokens` bounds every choice."""

    max_tokens: int
    needs_costs: ClassVar[bool] = False

    @property
    def choices(self) -> Sequence[int]:
        """The lengths above 0 that may be chosen."""
        return range(1, self.max_tokens + 1)

    @abstractmethod
    def for_row(self, costs: StepCosts | None) -> RowLength:
        """Return the policy's state for a new row."""


@dataclass(frozen=True)
class FixedLength(DraftLength, RowLength):
    """Always draft `max_tokens` tokens; 0 is plain decoding."""

    max_tokens: int = 5

    def __post_init__(self) -> None:
        _check_length(self.max_tokens)

    @property
    def choices(self) -> Sequence[int]:
        return (self.max_tokens,) if self.max_tokens else ()

    def for_row(self, costs: StepCosts | None) -> RowLength:
        return self

    def choose(self) -> int:
        return self.max_tokens


@dataclass(frozen=True)
class CostModelLength(DraftLength):
    """Draft as many tokens as make the most committed tokens a second, 0 included.

    With acceptance a, a round of k drafts commits 1 + a + ... + a^k tokens on average (Leviathan
    et al. 2023, eq. 1) in the seconds that were measured for this pair of models.  `prior` is the
    acceptance assumed at a row's start with the weight of `prior_tokens` observations; history
    decays by `decay` a round.  A row that stopped drafting tries again after `retry` rounds, then
    after twice as many each time it fails, until drafting pays again.  `every` thins the lengths
    out, from `max_tokens` down: each one costs a measurement, and a compilation where passes are
    compiled.
    """

    max_tokens: int = 8
    every: int = 1
    prior: float = 0.7
    prior_tokens: float = 4.0
    decay: float = 0.9
    retry: int = 16
    needs_costs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_length(self.max_tokens)
        if not 0 < self.prior < 1 or not 0 < self.decay <= 1 or self.prior_tokens <= 0:
            raise ValueError("prior and decay must lie in (0, 1] and prior_tokens be positive")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")
        if self.retry < 1:
            raise ValueError(f"retry must be at least 1 round, not {self.retry}")

    @property
    def choices(self) -> Sequence[int]:
        return sorted(range(self.max_tokens, 0, -self.every))

    def for_row(self, costs: StepCosts | None) -> RowLength:
        assert costs is not None, "the pipeline measures costs before it decodes"
        return _CostModelRow(self, costs)


class _CostModelRow(RowLength):
    def __init__(self, policy: CostModelLength, costs: StepCosts) -> None:
        self.policy = policy
        self.costs = costs
        self.tested = policy.prior_tokens
        self.accepted = policy.prior_tokens * policy.prior
        self.wait = 0  # plain rounds left before drafting is tried again
        self.tries = 0  # rounds left to draft in, whatever history says
        self.patience = policy.retry

    def choose(self) -> int:
        if self.tries:
            self.tries -= 1
            return self.policy.choices[0]
        best = best_length(self.accepted / self.tested, self.costs, self.policy.choices)
        if best or not self.policy.choices:
            self.wait, self.patience = 0, self.policy.retry
            return best
        if self.wait == 0:  # the last try failed, or the costs forbid drafting from the start
            self.wait, self.patience = self.patience, 2 * self.patience
            return 0
        self.wait -= 1
        if self.wait:
            return 0
        self._forget()
        self.tries = 1  # one more: a drafter may first have to be shown a target pass
        return self.policy.choices[0]

    def _forget(self) -> None:
        """Let a retry speak louder than the evidence that stopped drafting."""
        scale = min(1.0, RETRY_WEIGHT / self.tested)
        self.tested, self.accepted = self.tested * scale, self.accepted * scale

    def record(self, tested: int, accepted: int) -> None:
        if not tested:
            return
        self.tries = 0
        self.tested = self.policy.decay * self.tested + tested
        self.accepted = self.policy.decay * self.accepted + accepted


class EachInTurn(DraftLength):
    """Every length that `policy` may choose, and 0, one after the other: all shapes are met."""

    def __init__(self, policy: DraftLength) -> None:
        self.max_tokens = policy.max_tokens
        self._choices = tuple(policy.choices)

    @property
    def choices(self) -> Sequence[int]:
        return self._choices

    def for_row(self, costs: StepCosts | None) -> RowLength:
        return _TurningRow(itertools.cycle((0, *self._choices)))


@dataclass(frozen=True)
class _TurningRow(RowLength):
    turns: Iterator[int]

    def choose(self) -> int:
        return next(self.turns)


def committed(acceptance: float, num_drafted: int) -> float:
    """Return the elements a round of `num_drafted` drafts commits on average, 1 + a + ... + a^k."""
    return sum(acceptance**i for i in range(num_drafted + 1))


def best_length(acceptance: float, costs: StepCosts, choices: Sequence[int]) -> int:
    """Return the k that commits most elements a second, k = 0 included."""
    return max((0, *choices), key=lambda k: committed(acceptance, k) / costs.round_seconds(k))


def predicted_ratio(acceptance: float, costs: StepCosts, choices: Sequence[int]) -> float:
    """Return the seconds of an element with the best length above 0, over those without drafts."""
    return min(costs.round_seconds(k) / committed(acceptance, k) for k in choices) / costs.plain


def check_costs(lengths: DraftLength, costs: StepCosts | None) -> None:
    """Raise ValueError where `lengths` reads a given table of costs that is too short."""
    if not lengths.needs_costs or costs is None:
        return
    size = min(len(costs.verify), len(costs.draft))
    if size <= lengths.max_tokens:
        raise ValueError(f"`costs` end at {size - 1} drafts, `lengths` at {lengths.max_tokens}")


def _check_length(max_tokens: int) -> None:
    if not 0 <= max_tokens <= MAX_DRAFT:
        raise ValueError(f"max_tokens must lie in 0..{MAX_DRAFT}, not {max_tokens}")
