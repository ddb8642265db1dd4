"""Deterministic sampling with drafted steps that stand where they are close to the target's.

FlowCast (2026, arXiv 2602.01329): velocities are guessed from earlier ones, the states that they
lead to are evaluated in one call, and the longest prefix stands whose guesses differ from the
target's velocities by no more than a tolerance.  From the state after that prefix the target's own
velocity goes on, so that every round makes at least one true step and a row whose guess falls has
lost nothing but rows of a call.  The prefix that stands is taken again by the velocities that the
target gave at the drafted states: a sweep of Picard's iteration that costs no call and leaves a
fraction of the error; published is to keep the drafted states.  Its step is then the target's word
of a state that is not quite the one it starts from, so the distance of the two is bounded as well.

There is no law that this keeps: it is a step size chosen by the error, to be judged against a
better solver with as many calls (`generation.solvers`).  As the target's velocities are known at
all the steps that stand, that solver can take them too: what is left is its error of all N steps.

Velocities are those of the straight path, noise - x0 over sigma / (alpha + sigma), which is the
flow's own and exists for every schedule.  The published guess is the last velocity (order 0); one
that follows the line through the last two is far better at the same cost (order 1, as TaylorSeer
does with features, Liu et al. 2025).  The published steps are Euler's.

Shapes: R rows, K drafted steps, S the shape of a state, N steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specstream.generation.drafting_sampler import DraftingSampler
from specstream.generation.lengths import DraftLength, FixedLength, StepCosts
from specstream.generation.solvers import AdamsBashforth2, Euler, Solver, straight_places
from specstream.models.denoiser import Denoiser
from specstream.sampling import Noise
from specstream.structures import Guarantee, KnownParts, StateContext
from specstream.transitions import (
    Prediction,
    data_estimate,
    mean_square,
    network_output,
    wide,
)


@dataclass(frozen=True, slots=True)
class VelocityDraft:
    """K guessed velocities of each row, and the states that they lead to."""

    velocities: Tensor  # (R, K, *S)
    states: Tensor  # (R, K+1, *S) the first is the row's own
    lengths: Tensor  # (R,) how many of the K are real in each row


class AcceptByErrorPipeline(DraftingSampler[VelocityDraft]):
    """Draws samples of the deterministic sampler in fewer rounds, with a bounded error.

    Args:
        target: the diffusion model.
        num_steps: denoising steps of a sample, N.
        tolerance: the largest mean squared difference of a guessed velocity from the target's,
            and of a drafted state from the one that is taken; 0 is the solver with one call a step.
        order: 0 guesses the last velocity, 1 follows the line through the last two.
        retake: take the steps that stand again by the target's velocities; False: as published.
        guidance: weight of the condition (Ho and Salimans 2022); 1 is none.
        lengths: how many steps to draft, at most; None: 8.
        batch_size: samples drawn together; the result does not depend on it.
        costs: for `lengths` that are chosen by costs; None: measured at the first run, of as many
            samples as are drawn together, and kept.  Which samples are drawn depends on them.
        solver: what takes the steps; None: `Euler` of order 0, `AdamsBashforth2` of order 1.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int = 50,
        tolerance: float = 0.01,
        order: int = 1,
        retake: bool = True,
        guidance: float = 1.0,
        lengths: DraftLength | None = None,
        batch_size: int = 16,
        costs: StepCosts | None = None,
        solver: Solver | None = None,
    ) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        if order not in (0, 1):
            raise ValueError(f"order must be 0 or 1, got {order}")
        self.tolerance = tolerance
        self.order = order
        self.retake = retake
        self.solver = solver or (AdamsBashforth2() if order else Euler())
        lengths = lengths or FixedLength(8)
        super().__init__(target, num_steps, 0.0, guidance, lengths, batch_size, costs)
        self.places = straight_places(self.grid)
        self._slopes = torch.empty(0)  # (B, *S) of the velocity, at the last that was verified

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.BOUNDED_ERROR

    @property
    def law(self) -> str:
        guesses = "state and guess of a velocity" if self.retake else "guess of a velocity"
        within = f"each {guesses} within a mean squared error of {self.tolerance:g}"
        return f"the target's as {type(self.solver).__name__} solves it, {within}"

    def _start(
        self,
        indices: Sequence[int],
        condition: dict[str, Tensor],
        noise: Noise,
        known: KnownParts | None = None,
    ) -> StateContext:
        context = super()._start(indices, condition, noise, known)
        self._slopes = torch.zeros_like(context.states)
        return context

    @property
    def drafter_parts(self) -> tuple[object, ...]:
        return self.order, self.retake, self.solver

    def _judge(
        self,
        context: StateContext,
        part: StateContext,
        index: Tensor,
        draft: VelocityDraft,
        wanted: Sequence[int],
        noise: Noise,
    ) -> Tensor:
        estimates = self._evaluate(part, draft.states, draft.lengths, sum(wanted))
        steps = self._steps(part, draft.states.shape[1])  # (R, K+1)
        flat = (estimates.flatten(0, 1), draft.states.flatten(0, 1), steps.flatten())
        velocities = self._velocity(*flat).view_as(estimates)
        errors = mean_square(draft.velocities - velocities[:, :-1], part.known)
        real = torch.arange(errors.shape[1], device=steps.device) < draft.lengths[:, None]
        stands = (errors <= self.tolerance) & real
        if self.retake:
            taken = self._retake(part, velocities, estimates[:, 0])
            moved = mean_square(taken[:, :-1] - draft.states[:, 1:], part.known)
            stands &= moved <= self.tolerance
        counts = stands.long().cumprod(1).sum(1)
        rows = torch.arange(len(index), device=index.device)
        if self.retake:
            following = taken[rows, counts]
        else:
            following = self._go_on(part, draft.states, estimates, counts)
        if self.order:
            self._slopes[index] = self._slope(part, velocities, counts)
        self._commit(context, index, counts, draft.states, estimates, following, noise)
        return counts

    def _steps(self, part: StateContext, places: int) -> Tensor:
        ahead = torch.arange(places, device=part.steps.device)
        return (part.steps[:, None] + ahead).clamp(max=self.grid.num_steps - 1)

    def _velocity(self, estimates: Tensor, states: Tensor, steps: Tensor) -> Tensor:
        """Return the velocity (R, *S) that an estimate of the data stands for."""
        alphas, sigmas = self.grid.alphas[steps], self.grid.sigmas[steps]
        return network_output(estimates, states, alphas, sigmas, Prediction.FLOW)

    def _propose(
        self, part: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> VelocityDraft:
        """Guess the velocities of the next steps, and take these steps."""
        lengths = torch.tensor(wanted, device=part.steps.device)
        slopes, seen = self._slopes[index], part.seen_steps.clamp(min=0)
        last = self._velocity(part.estimates, part.seen, seen)
        guesses, states, here = [], [part.states], part
        for _ in range(max(wanted)):
            guess = last + wide(self.places[here.steps] - self.places[seen], last) * slopes
            here = self._step(guess, here)
            states.append(here.states)
            guesses.append(guess)
        drafted = torch.stack(guesses, 1) if guesses else part.states[:, None][:, :0]
        return VelocityDraft(drafted, torch.stack(states, 1), lengths)

    def _retake(self, part: StateContext, velocities: Tensor, estimates: Tensor) -> Tensor:
        """Return the states (R, K+1, *S) that the target's velocities (R, K+1, *S) lead to.

        estimates (R, *S): what it says of the rows' own states, so that one step is a plain one.
        """
        here = self.solver.step(estimates, part, self.grid)
        states = [here.states]
        for velocity in velocities.unbind(1)[1:]:
            here = self._step(velocity, here)
            states.append(here.states)
        return torch.stack(states, 1)

    def _go_on(
        self, part: StateContext, states: Tensor, estimates: Tensor, counts: Tensor
    ) -> Tensor:
        """Return the states (R, *S) that follow the last drafted ones that stand."""
        rows = torch.arange(len(counts), device=counts.device)
        seen = torch.cat([part.seen[:, None], states], 1)[rows, counts]
        said = torch.cat([part.estimates[:, None], estimates], 1)[rows, counts]
        at = part.steps + counts
        last = replace(
            part,
            states=states[rows, counts],
            steps=at,
            seen=seen,
            seen_steps=torch.where(counts > 0, at - 1, part.seen_steps),
            estimates=said,
        )
        return self.solver.step(estimates[rows, counts], last, self.grid).states

    def _step(self, velocities: Tensor, here: StateContext) -> StateContext:
        """Return the rows one step on by velocities (R, *S)."""
        alphas, sigmas = self.grid.alphas[here.steps], self.grid.sigmas[here.steps]
        said = data_estimate(velocities, here.states, alphas, sigmas, Prediction.FLOW)
        return self.solver.step(said, here, self.grid)

    def _slope(self, part: StateContext, velocities: Tensor, counts: Tensor) -> Tensor:
        """Return the slope (R, *S) through the last two velocities that were verified.

        velocities (R, K+1, *S): the target's of this round.  A row with one only has none.
        """
        seen = part.seen_steps.clamp(min=0)
        before = self._velocity(part.estimates, part.seen, seen)
        known = torch.cat([before[:, None], velocities], 1)  # (R, K+2, *S)
        rows = torch.arange(len(counts), device=counts.device)
        at = part.steps + counts
        change = known[rows, counts + 1] - known[rows, counts]
        stride = self.places[at] - self.places[(at - 1).clamp(min=0)]
        return change * wide(torch.where(at > 0, 1 / stride, 0), change)
