"""What a drafted denoising step costs.

It stands with probability 1 - TV of two Gaussians, erfc(|delta| / (2 sqrt 2)), delta the distance
of their means in standard deviations, and falls with erf(|delta| / (2 sqrt 2)).  Where |delta| is
large the gradient vanishes; a small share of |delta| itself keeps it alive.

P is the number of steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from specstream.verification.gaussian import step_acceptance


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
