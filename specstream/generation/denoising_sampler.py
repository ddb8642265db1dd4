"""What all samplers of a diffusion model share: rows that each stand at a step of their own.

In every round a row may draft some of its next steps, the target evaluates the row's state and the
drafted ones of all rows in one call, and the row moves on by the drafted steps that stand and by
one of the target's own.  What is drafted and what stands is the subclass's.

Parts of a sample may be given (inpainting).  Their states are noised data, the same to the target
and to whoever drafts (`place_known`): the Gaussians of both agree there, so a rule that is exact
stays exact, for the law of the plain sampler that holds the same parts.  The rest is denoised
beside them, which is not quite the model's own law under that condition.

Shapes: B rows, K drafted steps, S the shape of a state, N steps.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from specstream.generation.lengths import DraftLength, RowLength, StepCosts
from specstream.models.denoiser import Denoiser, Evaluation, Reads
from specstream.models.quantization import quantization_report, quantized_law
from specstream.sampling import Noise, Role
from specstream.structures import Guarantee, KnownParts, StateContext, StateStep, Stats
from specstream.transitions import place_known


class DenoisingSampler(ABC):
    """Draws samples of a diffusion model; `samples` and `stats` hold those of the last run.

    The constructor reads `guarantee`, `law` and `models`: a subclass sets what these need before.

    Args:
        target: the diffusion model.
        num_steps: denoising steps of a sample, N.
        eta: 0 is the deterministic sampler (DDIM; Euler's method on a flow), 1 the ancestral one.
        guidance: weight of the condition (Ho and Salimans 2022); 1 is none.
        lengths: how many steps to draft, at most.
        batch_size: samples drawn together; the result does not depend on it.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int,
        eta: float,
        guidance: float,
        lengths: DraftLength,
        batch_size: int,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.target = target
        self.grid = target.schedule.grid(num_steps).to(target.device)
        self.eta = eta
        self.guidance = guidance
        self.lengths = lengths
        self.batch_size = batch_size
        self.costs: StepCosts | None = None
        self.stats = self._new_stats()
        self.samples = torch.empty(0)

    @property
    @abstractmethod
    def guarantee(self) -> Guarantee:
        """What a run promises of its samples, relative to `law`."""

    @property
    def models(self) -> dict[str, nn.Module]:
        """The networks that draw, by role; `stats` say which of them are int8."""
        return {"target": self.target.network}

    @property
    def law(self) -> str:
        """The law that the guarantee is about, in words."""
        return "the target's"

    def generate(
        self,
        num_samples: int,
        condition: Mapping[str, Tensor] | None = None,
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        known: KnownParts | None = None,
    ) -> Iterator[StateStep]:
        """Draw samples and yield what each round does to each of them.

        `condition` and `known` hold tensors of `num_samples` rows.  A sample depends on `seed` and
        on its index, 0, 1, ... unless `indices` are given, and on nothing else of the batch.
        Raises ValueError for parts that are not of these samples.
        """
        if known is not None:
            known.check(num_samples, self.target.shape)
        numbers = list(range(num_samples)) if indices is None else list(indices)
        assert len(set(numbers)) == num_samples, "samples need different indices"
        condition = {} if condition is None else dict(condition)
        if numbers:
            self._prepare(min(num_samples, self.batch_size), condition)
        self.stats = self._new_stats()
        self.stats.prompts = num_samples
        if known is not None:
            self.stats.law += ", held to what is given"
        self.samples = torch.zeros(num_samples, *self.target.shape)
        noise = Noise(0 if seed is None else seed, self.target.device)
        for first in range(0, num_samples, self.batch_size):
            rows = slice(first, first + self.batch_size)
            held = None if known is None else known.rows(rows).to(self.target.device)
            context = self._start(numbers[rows], self._told(condition, rows), noise, held)
            yield from self._timed(self._rounds(context, noise))
            self.samples[rows] = context.states.cpu()

    def complete(
        self,
        num_samples: int,
        condition: Mapping[str, Tensor] | None = None,
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        known: KnownParts | None = None,
    ) -> Tensor:
        """Draw samples (num_samples, *S), float32 on the CPU."""
        for _ in self.generate(num_samples, condition, seed=seed, indices=indices, known=known):
            pass
        return self.samples

    @abstractmethod
    def _round(
        self, context: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> Tensor:
        """Draft `wanted` steps of the rows `index` (R,), verify and commit them.

        Returns how many of them stand, (R,): the rows have moved on by one step more.
        """

    def _prepare(self, num_rows: int, condition: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Get ready, off the clock, to draw `num_rows` samples together."""

    def _told(self, condition: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        return {name: value[rows].to(self.target.device) for name, value in condition.items()}

    def _row_length(self) -> RowLength:
        return self.lengths.for_row(self.costs)

    def _room(self, step: int) -> int:
        """Return how many steps a row at `step` may draft: before the first nothing is known."""
        return self.grid.num_steps - 1 - step if step else 0  # the last is the target's own

    def _start(
        self,
        indices: Sequence[int],
        condition: dict[str, Tensor],
        noise: Noise,
        known: KnownParts | None = None,
    ) -> StateContext:
        device = self.target.device
        samples = torch.tensor(indices, device=device)
        zeros = torch.zeros_like(samples)
        pure = self._pure(samples, noise)
        context = StateContext(
            states=pure,
            steps=zeros.clone(),
            samples=samples,
            drawn=zeros.clone(),
            condition=condition,
            seen=pure.clone(),
            seen_steps=zeros - 1,
            estimates=torch.zeros_like(pure),
            known=known,
        )
        context.states = place_known(pure, context, zeros, self.grid, self.eta, noise)
        return context

    def _pure(self, samples: Tensor, noise: Noise) -> Tensor:
        """Return the noise (B, *S) that samples (B,) begin with."""
        first = torch.zeros_like(samples)
        return noise.normal(samples, first, self.target.shape, Role.START).float()

    def _rounds(self, context: StateContext, noise: Noise) -> Iterator[list[StateStep]]:
        total = self.grid.num_steps
        numbers = context.samples.tolist()
        rows = [self._row_length() for _ in numbers]
        steps = [0] * len(rows)
        said = context.estimates.unbind()
        while any(step < total for step in steps):
            active = [row for row, step in enumerate(steps) if step < total]
            wanted = [self._wanted(steps[row], rows[row]) for row in active]
            self.stats.draft_calls += any(wanted)
            index = torch.tensor(active, device=context.steps.device)
            kept = self._round(context, index, wanted, noise)
            counts = kept.tolist()  # the one answer that the host waits for
            for row, length, count in zip(active, wanted, counts, strict=True):
                rows[row].record(min(count + 1, length), count)
                steps[row] += count + 1
            self._count(wanted, counts)
            yield [
                StateStep(numbers[row], length, count, steps[row], steps[row] == total, said[row])
                for row, length, count in zip(active, wanted, counts, strict=True)
            ]

    def _wanted(self, step: int, row: RowLength) -> int:
        room = self._room(step)
        return min(row.choose(), room) if room > 0 else 0

    def _evaluate(
        self, part: StateContext, states: Tensor, lengths: Tensor, num_drafted: int
    ) -> Tensor:
        """Return what the target says, in one call, of the states (B, K+1, *S) of a round.

        Of row b it sees the first lengths[b] + 1; what it is not shown is 0.  `num_drafted` is the
        sum of lengths (B,), which the host knows: to ask the device would be to wait for the draft.
        """
        return self._ask(part, states, lengths, num_drafted).estimates

    def _ask(
        self,
        part: StateContext,
        states: Tensor,
        lengths: Tensor,
        num_drafted: int,
        reads: Reads | None = None,
    ) -> Evaluation:
        """Do what `_evaluate` does, and return what is read of the target's thoughts.

        With axes (B, K+1) before their own; but `first` of the states shown alone, one for each.
        """
        shown = lengths + 1
        rows = torch.arange(len(shown), device=shown.device)
        row = rows.repeat_interleave(shown, output_size=len(shown) + num_drafted)
        first = shown.cumsum(0) - shown
        place = torch.arange(len(row), device=shown.device) - first[row]
        condition = {name: value[row] for name, value in part.condition.items()}
        steps = part.steps[row] + place
        given = (states[row, place], steps, self.grid, condition, self.guidance)
        self.stats.target_calls += 1
        self.stats.target_rows += len(row) * (2 if self.guidance != 1 and condition else 1)
        said = self.target.evaluate(*given, reads=reads)
        held = said.estimates if part.known is None else part.known.rows(row).hold(said.estimates)
        estimates = torch.zeros_like(states)
        estimates[row, place] = held
        features = None
        if said.features is not None:
            features = said.features.new_zeros(*states.shape[:2], *said.features.shape[1:])
            features[row, place] = said.features
        return Evaluation(estimates, features, said.first)

    def _commit(
        self,
        context: StateContext,
        index: Tensor,
        counts: Tensor,
        states: Tensor,
        estimates: Tensor,
        following: Tensor,
        noise: Noise,
        features: Tensor | None = None,
    ) -> None:
        """Move the rows `index` (R,) on by the `counts` (R,) that stand and one step more.

        states and estimates (R, K+1, *S): what the target saw and said; following (R, *S): the
        states that come after what stands, but for what is given of them; features (R, K+1, ...):
        what is read of the target's thoughts there.
        """
        rows = torch.arange(len(index), device=index.device)
        if context.known is not None:
            part, steps = context.rows(index), context.steps[index] + counts + 1
            following = place_known(following, part, steps, self.grid, self.eta, noise)
        context.states[index] = following
        context.seen[index] = states[rows, counts]
        context.estimates[index] = estimates[rows, counts]
        if features is not None:
            if context.features is None:  # of rows that were not asked of yet: nothing
                shape = (len(context.steps), *features.shape[2:])
                context.features = features.new_zeros(shape)
            context.features[index] = features[rows, counts]
        context.seen_steps[index] = context.steps[index] + counts
        context.steps[index] += counts + 1

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
        reports = {role: quantization_report(model) for role, model in self.models.items()}
        quantized = {role: report for role, report in reports.items() if report is not None}
        law = quantized_law(self.law, quantized)
        return Stats("media", self.guarantee, law=law, quantized=dict(quantized))
