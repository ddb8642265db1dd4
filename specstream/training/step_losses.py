"""What a drafted denoising step costs.

It stands with probability 1 - TV of two Gaussians, erfc(|delta| / (2 sqrt 2)), delta the distance
of their means in standard deviations, and falls with erf(|delta| / (2 sqrt 2)).  Where |delta| is
large the gradient vanishes; a small share of |delta| itself keeps it alive.

P is the number of steps, S the shape of a state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from specstream.transitions import SMALLEST, StepGrid, estimate_weights, step_stds
from specstream.verification.gaussian import step_acceptance


def step_distances(errors: Tensor, steps: Tensor, grid: StepGrid, eta: float) -> Tensor:
    """Return how far drafted means lie from the target's, in standard deviations, (P,).

    errors (P, *S): of the guesses at the data; steps (P,): where the states stand.
    """
    scales = estimate_weights(grid, eta) / step_stds(grid, eta).clamp(min=SMALLEST)
    squares = errors.flatten(1).square().sum(1).add(1e-12)  # a root has no gradient at 0
    return scales[steps].abs().to(errors) * squares.sqrt()


class StepLoss(ABC):
    """What a drafted step costs, given how far its mean lies from the target's."""

    @abstractmethod
    def __call__(self, delta: Tensor, squared_error: Tensor) -> Tensor:
        """Return the loss of each step (P,).

        delta (P,): distance in standard deviations; squared_error (P,): mean over the state of the
        squared error of the guess at the data.
        """


@dataclass(frozen=True)
class RejectionProbability(StepLoss):
    """The probability that the step falls, erf(|delta| / (2 sqrt 2)), and a share of |delta|.

    The one to choose where drafts are verified exactly: it is what is paid.
    """

    distance_weight: float = 0.02

    def __call__(self, delta: Tensor, squared_error: Tensor) -> Tensor:
        return 1 - step_acceptance(delta) + self.distance_weight * delta


@dataclass(frozen=True)
class SquaredError(StepLoss):
    """The squared error of the guess at the data: the usual loss, blind to what a step forgives."""

    def __call__(self, delta: Tensor, squared_error: Tensor) -> Tensor:
        return squared_error
