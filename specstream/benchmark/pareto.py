"""Quality against cost: which plain sampler to beat, and who does.

Anybody can trade quality for speed by taking fewer steps, so a method is worth something only
where it is better than plain sampling at the same cost.  Higher quality is better here throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TOLERANCE = 0.01  # one point of a score in 0..1, or 0.01 nats


@dataclass(frozen=True, slots=True)
class Point:
    """What a method costs, in calls or in seconds, and how good its output is."""

    cost: float
    quality: float


def fewest_steps(plain: Sequence[Point], reference: int, tolerance: float = TOLERANCE) -> int:
    """Return which plain sampler has the fewest calls among those that are as good as full steps.

    Full steps are those samplers with at least the calls of the `reference`, and the best of them
    counts; as good is not more than `tolerance` worse.  Of equals the better, then the earlier.
    """
    full = [point.quality for point in plain if point.cost >= plain[reference].cost]
    least = max(full) - tolerance - 1e-9  # a hundredth of a share is no float
    good = [i for i, point in enumerate(plain) if point.quality >= least]
    return min(good, key=lambda i: (plain[i].cost, -plain[i].quality, i))


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no cheaper or equally cheap one equals, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not kept or point.quality > kept[-1].quality:
            kept.append(point)
    return kept


def lies_above(point: Point, plain: Sequence[Point]) -> bool | None:
    """Say whether a point lies above the curve through the front of the plain ones.

    Between two of them the curve is linear in the logarithm of the cost, beyond the last it is
    flat.  What is cheaper than all of them is above where it is also no worse than the cheapest,
    and else cannot be compared: None.
    """
    curve = front(plain)
    if point.cost < curve[0].cost:
        return True if point.quality >= curve[0].quality else None
    for left, right in pairwise(curve):
        if point.cost < right.cost:
            share = math.log(point.cost / left.cost) / math.log(right.cost / left.cost)
            return point.quality > left.quality + share * (right.quality - left.quality)
    return point.quality > curve[-1].quality
