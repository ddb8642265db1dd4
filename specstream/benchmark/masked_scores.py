"""What decides between ways of filling, prompt by prompt, so that differences have intervals.

Two methods fill the same prompts, so prompts are drawn in pairs: what is hard for both says nothing
of their difference.  A point on the curve of plain sampling is a mean of the plain samplers on
either side of it, for every draw of prompts alike.

Shapes: N prompts, S draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from specstream.benchmark.rows import MatchedQuality
from specstream.benchmark.timing import SAMPLES

Verdict = bool | Literal["level"] | None
REACHED, BEYOND = "reached", "beyond the curve"


@dataclass(frozen=True)
class Scores:
    """Scores of prompts, higher is better; their mean is sum(values) / sum(weights)."""

    values: NDArray[np.float64]  # (N,)
    weights: NDArray[np.float64]  # (N,) tokens that a judge has read, or ones

    @property
    def mean(self) -> float:
        """The score of all prompts."""
        return float(self.values.sum() / self.weights.sum())

    def resampled(self, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the score of each draw of prompts (S, N), (S,)."""
        means: NDArray[np.float64] = self.values[draws].sum(1) / self.weights[draws].sum(1)
        return means


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two scores, and its 95 % interval over prompts."""

    mean: float
    interval: tuple[float, float]

    @property
    def is_above(self) -> Verdict:
        """Whether it is above zero; "level" where the interval does not say."""
        low, high = self.interval
        return "level" if low <= 0 <= high else low > 0


def difference(ours: Scores, theirs: Sequence[tuple[Scores, float]], seed: int = 0) -> Difference:
    """Return how much better `ours` is than the mean of `theirs` with their shares."""
    size = len(ours.values)
    draws = np.random.default_rng(seed).integers(size, size=(SAMPLES, size))
    found = ours.resampled(draws) - sum(share * s.resampled(draws) for s, share in theirs)
    mean = ours.mean - sum(share * s.mean for s, share in theirs)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Difference(mean, (float(low), float(high)))


@dataclass(frozen=True, slots=True)
class Judged:
    """What free text costs in passes of the whole target, and what a judge says of it."""

    full_passes: float
    nll: float
    entropy: float


def matched(row: Judged, plain: Sequence[Judged]) -> MatchedQuality:
    """Return where the curve through the plain rows reaches the NLL of `row`.

    The curve is linear between neighbours in passes; where it does so several times, the fewest
    passes count.
    """
    curve = sorted(plain, key=lambda point: point.full_passes)
    for left, right in pairwise(curve):
        if min(left.nll, right.nll) <= row.nll <= max(left.nll, right.nll):
            gap = right.nll - left.nll
            share = (row.nll - left.nll) / gap if gap else 0.0
            passes = left.full_passes + share * (right.full_passes - left.full_passes)
            entropy = left.entropy + share * (right.entropy - left.entropy)
            return MatchedQuality(REACHED, passes, passes / row.full_passes, entropy)
    return MatchedQuality(BEYOND)
