"""Whether two sets of samples have one law: the energy distance and its permutation test.

    found = energy_test(samples, reference, seed=0)
    found.distance, found.p_value

It needs no features and no training, sees every difference of laws given enough samples, and is 0
on average where there is none, so below 0 about half the time then.

Shapes: n and m samples of d numbers each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.sampling import Noise, Role


@dataclass(frozen=True, slots=True)
class EnergyTest:
    """What the energy distance says of two sets of samples.

    `p_value` is the share of random divisions of all samples that lie as far apart or farther, the
    observed one counted; `noise` the standard deviation of the distance over those divisions.
    """

    distance: float
    p_value: float
    noise: float


def energy_distance(samples: Tensor, others: Tensor) -> float:
    """Return the unbiased energy distance of two sets, 2 E|x - y| - E|x - x'| - E|y - y'|.

    Szekely and Rizzo (2013), eq. 5, without pairs of a sample with itself.  samples (n, ...) and
    others (m, ...) of one shape, at least two each; raises ValueError otherwise.
    """
    between = _between(samples, others)
    return float(_distances(between, _first(len(samples), len(between)))[0])


def energy_test(
    samples: Tensor, others: Tensor, num_permutations: int = 199, seed: int = 0
) -> EnergyTest:
    """Test whether two sets of independent samples have one law.

    By permutation (Szekely and Rizzo 2004): the test is exact for any number of samples, if those
    of the two sets share no noise.  samples (n, ...) and others (m, ...); raises ValueError as
    `energy_distance` does.
    """
    between = _between(samples, others)
    total = len(between)
    drawn = torch.arange(num_permutations)
    places = torch.arange(total).expand(num_permutations, total)
    order = Noise(seed).uniform(drawn, places, Role.ORDER).argsort(1)  # (P, n+m)
    chosen = torch.zeros(num_permutations, total, dtype=torch.float64)
    chosen.scatter_(1, order[:, : len(samples)], 1.0)
    observed = _distances(between, _first(len(samples), total))
    shuffled = _distances(between, chosen)
    as_far = int((shuffled >= observed - 1e-12).sum())
    return EnergyTest(
        distance=float(observed[0]),
        p_value=(1 + as_far) / (1 + num_permutations),
        noise=float(shuffled.std()),
    )


def _between(samples: Tensor, others: Tensor) -> Tensor:
    """Return the distances of all samples of both sets from one another, float64 (n+m, n+m)."""
    if samples.shape[1:] != others.shape[1:] or min(len(samples), len(others)) < 2:
        raise ValueError(
            "an energy distance is of two sets of two samples or more, of one shape, got "
            f"{list(samples.shape)} and {list(others.shape)}"
        )
    every = torch.cat([samples, others]).flatten(1).double()
    return torch.cdist(every, every)


def _first(count: int, total: int) -> Tensor:
    chosen = torch.zeros(1, total, dtype=torch.float64)
    chosen[:, :count] = 1
    return chosen


def _distances(between: Tensor, chosen: Tensor) -> Tensor:
    """Return the energy distance (P,) of each division; chosen (P, n+m) is 1 in the first set."""
    count = chosen.sum(1)
    rest = between.shape[0] - count
    to_first = chosen @ between  # (P, n+m)
    own = (to_first * chosen).sum(1)
    across = to_first.sum(1) - own
    others = between.sum() - own - 2 * across
    return 2 * across / (count * rest) - own / (count * (count - 1)) - others / (rest * (rest - 1))
