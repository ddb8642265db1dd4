"""Sampling with a feature cache: steps that the target's first block takes with an old memory.

As `diffusers`' First Block Cache: the first block runs at every step, and where what it adds has
changed by little since the target last ran as a whole, what the other blocks added then is added
again.  Decided for each row by itself rather than for a batch, and the rows that need it are then
evaluated in one call.  Nothing verifies what is skipped: HEURISTIC, to be judged against the plain
target with fewer steps, which costs as many calls.  (`FirstBlockDenoiser` drafts so, verified.)

Shapes: R rows, S the shape of a state, T places, D hidden, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import FixedLength
from specstream.models.denoiser import Denoiser, Reads
from specstream.sampling import Noise, Role
from specstream.structures import MAX_DRAFT, Guarantee, KnownParts, StateContext
from specstream.transitions import place_known, transition


class StepCachePipeline(DenoisingSampler):
    """Draws samples with a cache of the target's later blocks; `stats` count what was skipped.

    Args:
        target: the diffusion model, a transformer of two blocks or more.
        num_steps: denoising steps of a sample, N.
        eta: 0 is the deterministic sampler (DDIM; Euler's method on a flow), 1 the ancestral one.
        tolerance: the largest change of what the first block adds, relative to itself (mean
            absolute values), with which a step is skipped; below 0 nothing is.
        window: the most steps that are skipped in a row.
        guidance: weight of the condition (Ho and Salimans 2022); 1 is none.
        batch_size: samples drawn together; the result does not depend on it.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int = 50,
        eta: float = 0.0,
        tolerance: float = 0.1,
        window: int = 8,
        guidance: float = 1.0,
        batch_size: int = 16,
    ) -> None:
        if not 1 <= window <= MAX_DRAFT:
            raise ValueError(f"window must be in 1..{MAX_DRAFT}, got {window}")
        if math.isnan(tolerance):
            raise ValueError(f"tolerance must be a number, got {tolerance}")
        target.first_block  # noqa: B018 refused here rather than in the first round
        self.tolerance = tolerance
        super().__init__(target, num_steps, eta, guidance, FixedLength(window), batch_size)
        self._first = torch.empty(0)  # (B, T, D) what the first block added where the target spoke

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.HEURISTIC

    def _start(
        self,
        indices: Sequence[int],
        condition: dict[str, Tensor],
        noise: Noise,
        known: KnownParts | None = None,
    ) -> StateContext:
        self._first = torch.empty(0)
        return super()._start(indices, condition, noise, known)

    def _round(
        self, context: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> Tensor:
        part = context.rows(index)
        lengths = torch.tensor(wanted, device=part.steps.device)
        states, counts = part.states, torch.zeros_like(lengths)
        for place in range(max(wanted)):
            moved, changes = self._skip(part, index, states, part.steps + place, noise)
            stands = (counts == place) & (place < lengths) & (changes <= self.tolerance)
            states = torch.where(stands.view(-1, *[1] * (states.dim() - 1)), moved, states)
            counts = counts + stands
            if not stands.any():
                break
        self._go_on(context, part, index, states, counts, noise)
        return counts

    def _skip(
        self, part: StateContext, index: Tensor, states: Tensor, steps: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Return the states (R, *S) after a cached step, and how far the first block moved (R,)."""
        steps = steps.clamp(max=self.grid.num_steps - 1)
        told = (part.condition, self.guidance, Reads.REST, part.features)
        said = self.target.evaluate(states, steps, self.grid, *told)
        assert said.first is not None
        before = self._first[index]
        moved = (said.first - before).float().abs().flatten(1).mean(1)
        changes = moved / before.float().abs().flatten(1).mean(1).clamp(min=1e-12)
        held = said.estimates if part.known is None else part.known.hold(said.estimates)
        return self._step(part, held, states, steps, noise), changes

    def _go_on(
        self,
        context: StateContext,
        part: StateContext,
        index: Tensor,
        states: Tensor,
        counts: Tensor,
        noise: Noise,
    ) -> None:
        """Have the target take the step after `counts` (R,) skipped ones, from states (R, *S)."""
        part.steps = part.steps + counts
        nothing = torch.zeros_like(counts)
        said = self._ask(part, states[:, None], nothing, 0, Reads.REST)
        assert said.first is not None
        if not len(self._first):
            self._first = said.first.new_zeros(len(context.steps), *said.first.shape[1:])
        self._first[index] = said.first
        following = self._step(part, said.estimates[:, 0], states, part.steps, noise)
        context.steps[index] = part.steps
        seen = (states[:, None], said.estimates)
        self._commit(context, index, nothing, *seen, following, noise, said.features)

    def _step(
        self, part: StateContext, estimates: Tensor, states: Tensor, steps: Tensor, noise: Noise
    ) -> Tensor:
        """Return the next states (R, *S) by estimates, with the plain sampler's own noise."""
        law = transition(estimates, states, steps, self.grid, self.eta)
        following = law.means
        if self.eta:
            normals = noise.normal(part.samples, steps, states.shape[1:], Role.CORRECT)
            following = law.sample(normals)
        return place_known(following, part, steps + 1, self.grid, self.eta, noise)
