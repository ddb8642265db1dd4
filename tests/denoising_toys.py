"""Diffusion models whose estimate of the data is known in closed form, and that count calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specstream.models import Denoiser, DiscreteSchedule, FlowSchedule
from specstream.models.noise_schedule import NoiseSchedule
from specstream.structures import StateDraft, StateVerdict
from specstream.transitions import Prediction
from specstream.verification.gaussian import ReflectionCoupling


class Counted(nn.Module):
    """Counts the calls of a network and the states that these showed it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.rows = 0

    def count(self, states: Tensor) -> None:
        self.calls, self.rows = self.calls + 1, self.rows + len(states)


class ExactEstimate(Counted):
    """E[x0 | x] of data N(mean, width^2) on a straight path, as a network that predicts data."""

    def __init__(self, mean: float, width: float) -> None:
        super().__init__()
        self.law = nn.Parameter(torch.tensor([mean, width], dtype=torch.float64))

    def forward(self, states: Tensor, times: Tensor) -> Tensor:
        self.count(states)
        sigma = times.double() / 1000
        alpha, (mean, width) = 1 - sigma, self.law
        gain = alpha * width**2 / (alpha**2 * width**2 + sigma**2)
        return mean + gain * (states - alpha * mean)


class MixtureEstimate(Counted):
    """E[x0 | x] of a mixture of Gaussians, which no line goes through: float64 throughout.

    Args:
        centers: (M, S).
        width: of each of the Gaussians.
        shares: alpha^2 at each time of a discrete schedule; None: a flow.
    """

    def __init__(self, centers: Tensor, width: float, shares: Tensor | None = None) -> None:
        super().__init__()
        self.centers = nn.Parameter(centers.double())
        self.width = width
        self.shares = shares

    def forward(self, states: Tensor, times: Tensor) -> Tensor:
        self.count(states)
        if self.shares is None:
            sigma = times.double() / 1000
            alpha = 1 - sigma
        else:
            share = self.shares.double()[times.long()]
            alpha, sigma = share.sqrt(), (1 - share).sqrt()
        spread = alpha**2 * self.width**2 + sigma**2  # (R, 1)
        away = states[:, None] - alpha[:, None] * self.centers  # (R, M, S)
        chances = (-away.square().sum(-1) / (2 * spread)).softmax(-1)
        posterior = self.centers + (alpha * self.width**2 / spread)[:, None] * away
        return (chances[..., None] * posterior).sum(1)


def gaussian_model(mean: float = 1.0, width: float = 0.5, size: int = 3) -> Denoiser:
    return Denoiser(ExactEstimate(mean, width), FlowSchedule(), (size,), Prediction.DATA)


def mixture_model(size: int = 8, discrete: bool = False) -> Denoiser:
    """Five Gaussians, on a flow or on the chain of Ho et al. (2020)."""
    centers = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    schedule: NoiseSchedule = FlowSchedule()
    shares = None
    if discrete:
        schedule = DiscreteSchedule()
        shares = schedule.grid(1000).alphas[:-1].square().flip(0)
    return Denoiser(MixtureEstimate(centers, 0.3, shares), schedule, (size,), Prediction.DATA)


def counts_of(model: Denoiser) -> tuple[int, int]:
    """Return the calls and rows that the model's network has seen."""
    assert isinstance(model.network, Counted)
    return model.network.calls, model.network.rows


@dataclass(frozen=True)
class KeepsAll(ReflectionCoupling):
    """A biased rule that says it is exact: whatever was drafted stands."""

    def __call__(
        self, draft: StateDraft, means: Tensor, stds: Tensor, uniforms: Tensor, normals: Tensor
    ) -> StateVerdict:
        surely = torch.full_like(uniforms, 1e-300)
        return super().__call__(draft, means, stds, surely, normals)
