"""Where plain sampling says what a judge finds as likely as the text of another method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from specstream.benchmark.rows import MatchedQuality

REACHED, BEYOND = "reached", "beyond the curve"


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
