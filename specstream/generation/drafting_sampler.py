"""Rounds of denoising that are drafted first and judged after, as many steps as pay.

A fixed number of steps is drafted in every round, or as many as the measured costs and the
sample's own history say (`CostModelLength`, as for text).  More rows in a call of the target cost
little where the device is not full, and what they cost alone where it is: there nothing is drafted,
and the run says what drafting would have cost.

The table is that of a whole run, so that a sample still depends on nothing of its batch; but with
lengths that are chosen by costs it depends on what was measured, as its draws do on what was
drafted before.  Its law does not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from specstream.generation.costs import cost_table, fastest, key_of, stored
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import (
    CostModelLength,
    DraftLength,
    FixedLength,
    RowLength,
    StepCosts,
    best_length,
    check_costs,
    predicted_ratio,
)
from specstream.models.denoiser import Denoiser
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.sampling import Noise
from specstream.structures import StateContext, StateStep

DraftT = TypeVar("DraftT")


class DraftingSampler(DenoisingSampler, Generic[DraftT]):
    """Draws samples in rounds of drafted steps; a policy that needs costs has them measured.

    `costs` are of rounds that draft 0, 1, ... steps of each row; None: measured at the first run
    of so many rows, off the clock, and kept where the tables of text are.  Where not even drafts
    that all stand would pay, none is tried.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int,
        eta: float,
        guidance: float,
        lengths: DraftLength,
        batch_size: int,
        costs: StepCosts | None,
    ) -> None:
        super().__init__(target, num_steps, eta, guidance, lengths, batch_size)
        if isinstance(lengths, CostModelLength):  # the last step is the target's own
            most = min(lengths.max_tokens, self.grid.num_steps - 1)
            self.lengths = lengths = replace(lengths, max_tokens=most)
        check_costs(lengths, costs)
        self.costs = self.given_costs = costs
        self.measured: dict[str, StepCosts] = {}  # by the name of the table

    @property
    @abstractmethod
    def drafter_parts(self) -> tuple[object, ...]:
        """What the seconds of drafting depend on, beside the target."""

    @abstractmethod
    def _propose(
        self, part: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> DraftT:
        """Draft `wanted` steps of the rows `part`, which are the rows `index` (R,) of the batch."""

    @abstractmethod
    def _judge(
        self,
        context: StateContext,
        part: StateContext,
        index: Tensor,
        draft: DraftT,
        wanted: Sequence[int],
        noise: Noise,
    ) -> Tensor:
        """Have the target look at a draft, commit what stands; return how many steps do (R,)."""

    def _round(
        self, context: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> Tensor:
        part = context.rows(index)
        draft = self._propose(part, index, wanted, noise)
        return self._judge(context, part, index, draft, wanted, noise)

    def _prepare(self, num_rows: int, condition: Mapping[str, Tensor]) -> None:
        if not self.lengths.needs_costs or self.given_costs is not None:
            return
        told = self._told(condition, slice(num_rows))
        key, size = self._key(num_rows, told), self.lengths.max_tokens + 1
        if key not in self.measured:
            self.measured[key] = stored(key, size, lambda: self._measure(num_rows, told))
        self.costs = self.measured[key]

    @torch.inference_mode()
    def _measure(self, num_rows: int, condition: dict[str, Tensor]) -> StepCosts:
        """Time plain rounds, and judging and drafting of each length that may be chosen."""
        self.stats = self._new_stats()  # these rounds are no run's: not of the one before either
        noise = Noise(0, self.target.device)
        context = self._start(range(num_rows), condition, noise)
        index = torch.arange(num_rows, device=context.steps.device)
        if self.lengths.choices:  # drafters go on from the target's word
            self._round(context, index, [0] * num_rows, noise)
        part = context.rows(index)
        passes: list[Callable[[], object]] = []
        for k in (0, *self.lengths.choices):
            wanted = [k] * num_rows
            made = self._propose(part, index, wanted, noise)
            judge = partial(self._judge, context, part, index, made, wanted, noise)
            passes += [judge, partial(self._propose, part, index, wanted, noise)]
        plain, _, *others = fastest(passes)  # of a plain round nothing is drafted
        return cost_table(plain, self.lengths, others[::2], others[1::2])

    def _key(self, num_rows: int, condition: Mapping[str, Tensor]) -> str:
        """Name a table by what its times depend on: both models, what is drawn, the machine."""
        target = self.target
        return key_of(
            target.device,
            [str(device) for device in target.devices],
            type(self).__name__,
            target.path,
            str(target),
            target.dtype,
            target.shape,
            target.memory if isinstance(target, PretrainedDenoiser) else None,
            self.guidance != 1,
            sorted((name, tuple(value.shape)) for name, value in condition.items()),
            num_rows,
            self.drafter_parts,
            self.stats.quantized,
            self.lengths.choices,
        )

    @property
    def _pays(self) -> bool:
        """Whether drafts that all stand would be faster than none."""
        costs = self.costs
        return costs is None or best_length(1.0, costs, self.lengths.choices) > 0

    def _row_length(self) -> RowLength:
        if self.lengths.needs_costs and not self._pays:
            return FixedLength(0)
        return super()._row_length()

    def _rounds(self, context: StateContext, noise: Noise) -> Iterator[list[StateStep]]:
        yield from super()._rounds(context, noise)
        policy, costs, stats = self.lengths, self.costs, self.stats
        if not isinstance(policy, CostModelLength) or costs is None or not policy.choices:
            return
        supposed = policy.prior if self._pays else 1.0
        stats.predicted_at = supposed if stats.acceptance is None else stats.acceptance
        stats.predicted_ratio = predicted_ratio(stats.predicted_at, costs, policy.choices)
