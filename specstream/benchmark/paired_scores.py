"""Scores of the same prompts under two models or methods, so that differences have intervals.

Prompts are drawn in pairs: what is hard for both says nothing of their difference.  A point on a
curve is a mean of the methods on either side of it, for every draw of prompts alike.

Shapes: N prompts, S draws of the bootstrap, M scores of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from specstream.benchmark.timing import SAMPLES
from specstream.metrics import TextQuality

Verdict = bool | Literal["level"] | None


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


def text_scores(
    quality: TextQuality, texts: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """Return the scores of each text, (N, M), in the order of the metric's names."""
    return np.array([quality.scores(*pair) for pair in zip(texts, references, strict=True)])
