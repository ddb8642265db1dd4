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

    Of equals the better, then the earlier.
    """
    least = least_good(plain, reference, tolerance)
    good = [i for i, point in enumerate(plain) if point.quality >= least]
    return min(good, key=lambda i: (plain[i].cost, -plain[i].quality, i))


def least_good(plain: Sequence[Point], reference: int, tolerance: float = TOLERANCE) -> float:
    """Return the quality from which on something is as good as full steps.

    Full steps are those samplers with at least the calls of the `reference`, and the best of them
    counts; as good is not more than `tolerance` worse.
    """
    full = [point.quality for point in plain if point.cost >= plain[reference].cost]
    return max(full) - tolerance - 1e-9  # a hundredth of a share is no float


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no cheaper or equally cheap one equals, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not kept or point.quality > kept[-1].quality:
            kept.append(point)
    return kept


def on_curve(cost: float, plain: Sequence[Point]) -> list[tuple[Point, float]]:
    """Return the points whose mean with these shares is the curve's height at a cost.

    The curve goes through the front of the plain points.  Between two of them it is linear in the
    logarithm of the cost, beyond the last and before the first it is flat.
    """
    curve = front(plain)
    if cost < curve[0].cost:
        return [(curve[0], 1.0)]
    for left, right in pairwise(curve):
        if cost < right.cost:
            share = math.log(cost / left.cost) / math.log(right.cost / left.cost)
            return [(left, 1.0 - share), (right, share)]
    return [(curve[-1], 1.0)]


def lies_above(point: Point, plain: Sequence[Point]) -> bool | None:
    """Say whether a point lies above the curve of the plain ones.

    What is cheaper than all of them is above where it is also no worse than the cheapest, and else
    cannot be compared: None.
    """
    cheapest = front(plain)[0]
    if point.cost < cheapest.cost:
        return True if point.quality >= cheapest.quality else None
    height = sum(share * other.quality for other, share in on_curve(point.cost, plain))
    return point.quality > height
