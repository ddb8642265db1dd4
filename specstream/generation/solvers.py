"""The plain target with better solvers of its deterministic sampler: what a draft has to beat.

A multistep solver goes the step that DDIM would go from an estimate corrected by what the target
said one step before.  DDIM's step is Euler's on a straight path, whatever the schedule: with
y = x / (alpha + sigma) and u = sigma / (alpha + sigma) it is y_s = y_t + (u_s - u_t) v, where
v = noise - x0.  On a flow y is x, u is sigma and v the network's velocity; nothing divides by an
alpha of 0.

Shapes: R rows, S the shape of a state, N steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import FixedLength
from specstream.models.denoiser import Denoiser
from specstream.sampling import Noise
from specstream.structures import Guarantee, StateContext
from specstream.transitions import (
    SMALLEST,
    Prediction,
    StepGrid,
    data_estimate,
    network_output,
    transition,
    wide,
)


class Solver(ABC):
    """A method of at most two steps for the deterministic sampler; a frozen dataclass, stateless.

    `followed` is what it extrapolates: the estimate of the data or the velocity.
    """

    followed: ClassVar[Prediction] = Prediction.DATA

    @abstractmethod
    def weights(self, grid: StepGrid) -> Tensor:
        """Return the share of its last change that each step adds to `followed`, (N,) float64."""

    def estimate(self, estimates: Tensor, context: StateContext, grid: StepGrid) -> Tensor:
        """Return the estimate (R, *S) that a DDIM step goes by.

        estimates (R, *S): what the target says of the context's states.
        """
        seen = context.seen_steps.clamp(min=0)
        now = self._followed(estimates, context.states, context.steps, grid)
        before = self._followed(context.estimates, context.seen, seen, grid)
        weights = self.weights(grid)[context.steps] * (context.seen_steps >= 0)
        alphas, sigmas = grid.alphas[context.steps], grid.sigmas[context.steps]
        followed = now + wide(weights, now) * (now - before)
        return data_estimate(followed, context.states, alphas, sigmas, self.followed)

    def step(self, estimates: Tensor, context: StateContext, grid: StepGrid) -> StateContext:
        """Return the rows one step on, of which the target says `estimates` (R, *S)."""
        corrected = self.estimate(estimates, context, grid)
        law = transition(corrected, context.states, context.steps, grid, 0.0)
        return moved_on(context, estimates, law.means, grid)

    def _followed(self, estimates: Tensor, states: Tensor, steps: Tensor, grid: StepGrid) -> Tensor:
        alphas, sigmas = grid.alphas[steps], grid.sigmas[steps]
        return network_output(estimates, states, alphas, sigmas, self.followed)


@dataclass(frozen=True)
class Euler(Solver):
    """One step, order 1: DDIM (Song et al. 2021), Euler's method on a flow."""

    def weights(self, grid: StepGrid) -> Tensor:
        return torch.zeros_like(grid.alphas[1:])

    def estimate(self, estimates: Tensor, context: StateContext, grid: StepGrid) -> Tensor:
        return estimates


@dataclass(frozen=True)
class AdamsBashforth2(Solver):
    """Two steps, order 2: the velocity on the straight path, extrapolated to the middle of a step.

    The first step is Euler's.
    """

    followed = Prediction.FLOW

    def weights(self, grid: StepGrid) -> Tensor:
        strides = straight_places(grid).diff()
        first = torch.zeros_like(strides[:1])
        return torch.cat([first, strides[1:] / (2 * strides[:-1])])


@dataclass(frozen=True)
class DPMSolver2M(Solver):
    """DPM-Solver++ (2M), order 2: the estimate of the data, extrapolated in log alpha / sigma.

    Lu et al. (2022), algorithm 2.  Steps from or to a level without data or without noise, of
    which that logarithm is infinite, are DDIM's, and so is the step after one that left pure
    noise.
    """

    def weights(self, grid: StepGrid) -> Tensor:
        strides = (grid.alphas.log() - grid.sigmas.log()).diff()
        first = torch.zeros_like(strides[:1])
        shares = torch.cat([first, strides[1:] / (2 * strides[:-1])])
        return torch.where(shares.isfinite(), shares, 0)


def moved_on(
    context: StateContext, estimates: Tensor, states: Tensor, grid: StepGrid
) -> StateContext:
    """Return the rows at `states` (R, *S) a step later, the target having said `estimates` before.

    A row that stood at the last step stays there, with a state that nothing follows.
    """
    return replace(
        context,
        states=states,
        steps=(context.steps + 1).clamp(max=grid.num_steps - 1),
        seen=context.states,
        seen_steps=context.steps,
        estimates=estimates,
    )


def straight_places(grid: StepGrid) -> Tensor:
    """Return the place u of each noise level on the straight path, (N+1,) float64, falling."""
    return grid.sigmas / (grid.alphas + grid.sigmas).clamp(min=SMALLEST)


class SolverPipeline(DenoisingSampler):
    """Draws samples by a solver of the deterministic sampler, one target call a step.

    Args:
        target: the diffusion model.
        num_steps: steps of a sample, N.
        solver: None: `Euler`.
        guidance: weight of the condition (Ho and Salimans 2022); 1 is none.
        batch_size: samples drawn together; the result does not depend on it.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int = 50,
        solver: Solver | None = None,
        guidance: float = 1.0,
        batch_size: int = 16,
    ) -> None:
        self.solver = solver or Euler()
        super().__init__(target, num_steps, 0.0, guidance, FixedLength(0), batch_size)

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.EXACT_LAW

    @property
    def law(self) -> str:
        return f"the target's as {type(self.solver).__name__} solves it"

    def _round(
        self, context: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> Tensor:
        part = context.rows(index)
        counts = torch.zeros_like(part.steps)
        states = part.states[:, None]
        estimates = self._evaluate(part, states, counts, 0)  # (R, 1, *S)
        following = self.solver.step(estimates[:, 0], part, self.grid).states
        self._commit(context, index, counts, states, estimates, following, noise)
        return counts
