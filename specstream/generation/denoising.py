"""Sampling a diffusion model, plainly or with drafted steps that its target verifies in one call.

The loop of De Bortoli et al. (2025), algorithm 3, on rows that each stand at a step of their own:
the drafter draws up to K next states of each row, the target evaluates the row's state and the
drafted ones in one call, the verifier keeps a prefix and gives the state that follows it.  Nothing
drafted is the plain sampler.  What the target said last of a row is what free drafts go on with:
after a rejection it is the estimate at the state before (a lazy restart, without a call for the
reflected state).

Shapes: B rows, K drafted steps, R evaluated states, S the shape of a state, N steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from specstream.drafters.denoising import StateDrafter
from specstream.generation.lengths import DraftLength, FixedLength, RowLength
from specstream.models.denoiser import Denoiser
from specstream.sampling import Noise, Role
from specstream.structures import (
    Guarantee,
    StateContext,
    StateDraft,
    StateStep,
    StateVerdict,
    Stats,
)
from specstream.transitions import step_stds, transition
from specstream.verification.gaussian import ReflectionCoupling, StateVerifier


class DenoisingPipeline:
    """Draws samples of a diffusion model; `samples` and `stats` hold those of the last run.

    Args:
        target: the diffusion model.
        num_steps: denoising steps of a sample, N.
        eta: 0 is the deterministic sampler (DDIM; Euler's method on a flow), 1 the ancestral one.
        guidance: weight of the condition (Ho and Salimans 2022); 1 is none.
        drafter: guesses steps; None: the plain sampler.
        lengths: how many steps to draft, at most.
        verifier: what keeps drafted steps.
        batch_size: samples drawn together; the result does not depend on it.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int = 50,
        eta: float = 1.0,
        guidance: float = 1.0,
        drafter: StateDrafter | None = None,
        lengths: DraftLength | None = None,
        verifier: StateVerifier | None = None,
        batch_size: int = 16,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if drafter is not None and eta == 0:
            raise ValueError(
                "eta 0 is a deterministic sampler: its steps have no law that a draft could be "
                "drawn from, so no drafted step is ever the target's; use eta above 0, or a "
                "verifier with a bounded error"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.target = target
        self.grid = target.schedule.grid(num_steps).to(target.device)
        self.eta = eta
        self.guidance = guidance
        self.drafter = drafter
        self.lengths = lengths or FixedLength(0 if drafter is None else 8)
        self.verifier = verifier or ReflectionCoupling()
        self.batch_size = batch_size
        self.last_drawn = int((step_stds(self.grid, eta) > 0).sum())  # steps that have a law
        self.stats = self._new_stats()
        self.samples = torch.empty(0)

    @property
    def guarantee(self) -> Guarantee:
        """What a run promises of its samples' law, relative to the plain sampler's."""
        return Guarantee.EXACT_LAW if self.drafter is None else self.verifier.guarantee

    def generate(
        self,
        num_samples: int,
        condition: Mapping[str, Tensor] | None = None,
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[StateStep]:
        """Draw samples and yield what each round does to each of them.

        `condition` holds tensors of `num_samples` rows.  A sample depends on `seed` and on its
        index, 0, 1, ... unless `indices` are given, and on nothing else of the batch.
        """
        numbers = list(range(num_samples)) if indices is None else list(indices)
        assert len(set(numbers)) == num_samples, "samples need different indices"
        condition = {} if condition is None else dict(condition)
        self.stats = self._new_stats()
        self.stats.prompts = num_samples
        self.samples = torch.zeros(num_samples, *self.target.shape)
        noise = Noise(0 if seed is None else seed, self.target.device)
        for first in range(0, num_samples, self.batch_size):
            rows = slice(first, first + self.batch_size)
            chosen = {name: value[rows].to(self.target.device) for name, value in condition.items()}
            context = self._start(numbers[rows], chosen, noise)
            yield from self._timed(self._rounds(context, noise))
            self.samples[rows] = context.states.cpu()

    def complete(
        self,
        num_samples: int,
        condition: Mapping[str, Tensor] | None = None,
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> Tensor:
        """Draw samples (num_samples, *S), float32 on the CPU."""
        for _ in self.generate(num_samples, condition, seed=seed, indices=indices):
            pass
        return self.samples

    def _start(
        self, indices: Sequence[int], condition: dict[str, Tensor], noise: Noise
    ) -> StateContext:
        device = self.target.device
        samples = torch.tensor(indices, device=device)
        zeros = torch.zeros_like(samples)
        pure = noise.normal(samples, zeros, self.target.shape, Role.START).float()
        return StateContext(
            states=pure,
            steps=zeros.clone(),
            samples=samples,
            drawn=zeros.clone(),
            condition=condition,
            seen=pure.clone(),
            seen_steps=zeros - 1,
            estimates=torch.zeros_like(pure),
        )

    def _rounds(self, context: StateContext, noise: Noise) -> Iterator[list[StateStep]]:
        total = self.grid.num_steps
        numbers = context.samples.tolist()
        rows = [self.lengths.for_row(None) for _ in numbers]
        steps = [0] * len(rows)
        while any(step < total for step in steps):
            active = [row for row, step in enumerate(steps) if step < total]
            wanted = self._wanted(active, steps, rows)
            index = torch.tensor(active, device=context.steps.device)
            part = context.rows(index)
            draft = self._propose(part, wanted, noise)
            verdict, seen = self._verify(part, draft, noise)
            kept = verdict.accepted.sum(1)
            self._commit(context, index, part, draft, verdict, seen)
            counts = kept.tolist()  # the one wait for the device in a round
            for row, length, count in zip(active, wanted, counts, strict=True):
                rows[row].record(min(count + 1, length), count)
                steps[row] += count + 1
            self._count(wanted, counts)
            yield [
                StateStep(numbers[row], length, count, steps[row], steps[row] == total)
                for row, length, count in zip(active, wanted, counts, strict=True)
            ]

    def _wanted(
        self, active: Sequence[int], steps: Sequence[int], rows: Sequence[RowLength]
    ) -> list[int]:
        """Return how many steps each active row drafts: the last one is always the target's own."""
        if self.drafter is None:
            return [0] * len(active)
        wanted = []
        for row in active:
            waits = self.drafter.needs_estimate and steps[row] == 0
            room = min(self.grid.num_steps - 1, self.last_drawn) - steps[row]
            wanted.append(0 if waits else max(0, min(rows[row].choose(), room)))
        return wanted

    def _propose(self, part: StateContext, wanted: Sequence[int], noise: Noise) -> StateDraft:
        if self.drafter is None or not max(wanted):
            empty = part.states[:, None][:, :0]
            return StateDraft(empty, empty, torch.zeros_like(part.steps))
        self.stats.draft_calls += 1
        return self.drafter.propose(part, wanted, self.grid, self.eta, noise)

    def _verify(
        self, part: StateContext, draft: StateDraft, noise: Noise
    ) -> tuple[StateVerdict, tuple[Tensor, Tensor]]:
        """Evaluate the states of a round in one call and judge them.

        Returns the verdict, and the states (B, K+1, *S) with what the target said of each.
        """
        states = torch.cat([part.states[:, None], draft.states], 1)  # (B, K+1, *S)
        batch, places = states.shape[:2]
        ahead = torch.arange(places, device=part.steps.device)
        steps = part.steps[:, None] + ahead
        real = ahead <= draft.lengths[:, None]  # (B, K+1)
        row, place = real.nonzero(as_tuple=True)
        said = self.target(
            states[row, place],
            steps[row, place],
            self.grid,
            {name: value[row] for name, value in part.condition.items()},
            self.guidance,
        )
        self.stats.target_calls += 1
        self.stats.target_rows += len(row) * (1 if self.guidance == 1 else 2)
        estimates = torch.zeros_like(states)
        estimates[row, place] = said
        flat = steps.clamp(max=self.grid.num_steps - 1).flatten()
        law = transition(estimates.flatten(0, 1), states.flatten(0, 1), flat, self.grid, self.eta)
        means, stds = law.means.view_as(states), law.stds.view(batch, places)
        elements = part.drawn[:, None] + ahead[:-1]
        uniforms = noise.uniform(part.samples, elements, Role.ACCEPT)
        normals = noise.normal(part.samples, part.drawn, states.shape[2:], Role.CORRECT)
        # what follows a draft that stands as a whole lies at its own length
        verdict = self.verifier(draft, means, stds, uniforms, normals)
        return verdict, (states, estimates)

    def _commit(
        self,
        context: StateContext,
        index: Tensor,
        part: StateContext,
        draft: StateDraft,
        verdict: StateVerdict,
        seen: tuple[Tensor, Tensor],
    ) -> None:
        """Write what stands into the context: the new state, and the target's last word on it."""
        count = verdict.accepted.sum(1)
        rows = torch.arange(len(index), device=index.device)
        states, estimates = seen
        context.states[index] = verdict.correction
        context.seen[index] = states[rows, count]
        context.estimates[index] = estimates[rows, count]
        context.seen_steps[index] = part.steps + count
        context.steps[index] = part.steps + count + 1
        context.drawn[index] = part.drawn + draft.lengths + 1

    def _count(self, wanted: Sequence[int], counts: Sequence[int]) -> None:
        """Add a round to the counts of the run."""
        stats = self.stats
        for length, count in zip(wanted, counts, strict=True):
            missing = length - len(stats.tested)
            stats.tested += [0] * max(missing, 0)
            stats.accepted += [0] * max(missing, 0)
            for place in range(min(count + 1, length)):
                stats.tested[place] += 1
                stats.accepted[place] += place < count
            stats.elements += count + 1
            stats.full_rounds += 1
            stats.full_committed += count + 1
            stats.plain_rounds += length == 0
            stats.draft_lengths += length

    def _timed(self, rounds: Iterator[list[StateStep]]) -> Iterator[StateStep]:
        """Run the rounds; the clock runs while we work and stands while the caller does."""
        while True:
            started = time.perf_counter()
            with torch.inference_mode():
                steps = next(rounds, None)
            self.stats.seconds += time.perf_counter() - started
            if steps is None:
                return
            yield from steps

    def _new_stats(self) -> Stats:
        return Stats("media", self.guarantee)
