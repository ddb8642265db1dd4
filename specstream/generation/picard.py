"""Sampling many steps at once by Picard's iteration, for one and the same noise.

ParaDiGMS (Shih et al. 2023, algorithm 1): all states of a window are guessed, the target evaluates
them in one call, the steps are taken again by what it said, the prefix stands whose states have
hardly moved, and the window slides on.  What is guessed is the estimate of the data at each step,
and the states follow from it.  The first guess of a step is the last estimate of the window before;
the published one is the last state.  Their tolerance is relative to the noise of a step, this one
is absolute.

The noise of a step is that of the plain sampler, so that with a tolerance of 0 a sample is the one
that `DenoisingPipeline` draws from the same seed, and not only of the same law.  Without noise, at
eta 0, a better solver may take the steps from what the target said.

Shapes: R rows, W the window, K drafted steps, W - 1 at most, S the shape of a state, N steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import FixedLength
from specstream.generation.solvers import Euler, Solver, moved_on
from specstream.models.denoiser import Denoiser
from specstream.sampling import Noise, Role
from specstream.structures import MAX_DRAFT, Guarantee, KnownParts, StateContext
from specstream.transitions import mean_square, place_known, transition


class PicardPipeline(DenoisingSampler):
    """Draws samples of the plain sampler's noise in fewer rounds, with a bounded error.

    Args:
        target: the diffusion model.
        num_steps: denoising steps of a sample, N.
        eta: 0 is the deterministic sampler (DDIM; Euler's method on a flow), 1 the ancestral one.
        tolerance: the largest root mean square by which a state that stands may have moved in an
            iteration; 0 waits until it does not move at all.
        window: states evaluated in a call, W.
        guidance: weight of the condition (Ho and Salimans 2022); 1 is none.
        batch_size: samples drawn together; the result does not depend on it.
        solver: what takes the steps, with eta 0 only; None: `Euler`.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int = 50,
        eta: float = 0.0,
        tolerance: float = 0.01,
        window: int = 8,
        guidance: float = 1.0,
        batch_size: int = 16,
        solver: Solver | None = None,
    ) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        if not 1 <= window <= MAX_DRAFT:
            raise ValueError(f"window must be in 1..{MAX_DRAFT}, got {window}")
        self.tolerance = tolerance
        self.window = window
        self.solver = solver or Euler()
        if eta and not isinstance(self.solver, Euler):
            raise ValueError(f"solver is for the deterministic sampler, eta 0, not {eta}")
        super().__init__(target, num_steps, eta, guidance, FixedLength(window - 1), batch_size)
        self._guesses = torch.empty(0)  # (B, W, *S) estimates of the data at the coming steps

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.BOUNDED_ERROR

    @property
    def law(self) -> str:
        name = type(self.solver).__name__
        solved = "" if name == "Euler" else f" as {name} solves it"
        return f"the target's{solved}, each step from a state within {self.tolerance:g} (rms)"

    def _start(
        self,
        indices: Sequence[int],
        condition: dict[str, Tensor],
        noise: Noise,
        known: KnownParts | None = None,
    ) -> StateContext:
        context = super()._start(indices, condition, noise, known)
        self._guesses = context.estimates[:, None].repeat_interleave(self.window, 1)
        return context

    def _round(
        self, context: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> Tensor:
        part = context.rows(index)
        most, lengths = max(wanted), torch.tensor(wanted, device=part.steps.device)
        drafted = self._follow(part, self._guesses[index, :most], noise)  # (R, K, *S)
        states = torch.cat([part.states[:, None], drafted], 1)
        estimates = self._evaluate(part, states, lengths, sum(wanted))  # (R, K+1, *S)
        followed = self._follow(part, estimates, noise)
        moved = mean_square(followed[:, :-1] - drafted, part.known)
        ahead = torch.arange(self.window, device=lengths.device)
        stands = (moved <= self.tolerance**2) & (ahead[:most] < lengths[:, None])
        counts = stands.long().cumprod(1).sum(1)
        rows = torch.arange(len(index), device=index.device)
        coming = (counts[:, None] + 1 + ahead).minimum(lengths[:, None])  # then the last again
        self._guesses[index] = estimates[rows[:, None], coming]
        self._commit(context, index, counts, states, estimates, followed[rows, counts], noise)
        return counts

    def _follow(self, part: StateContext, estimates: Tensor, noise: Noise) -> Tensor:
        """Return the states (R, K, *S) that estimates (R, K, *S) of successive steps lead to.

        The noise of a step is the plain sampler's own.
        """
        states, here = [], part
        for estimate in estimates.unbind(1):
            corrected = self.solver.estimate(estimate, here, self.grid)
            law = transition(corrected, here.states, here.steps, self.grid, self.eta)
            current = law.means
            if self.eta:
                shape = current.shape[1:]
                current = law.sample(noise.normal(part.samples, here.steps, shape, Role.CORRECT))
            coming = here.steps + 1
            current = place_known(current, part, coming, self.grid, self.eta, noise)
            here = moved_on(here, estimate, current, self.grid)
            states.append(current)
        return torch.stack(states, 1) if states else part.states[:, None][:, :0]
