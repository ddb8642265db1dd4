"""Verify several denoising steps of a static sampler at once (FreeDave, Wu and Zhang 2025).

The target's own prediction is the draft: what the schedule would fill in its next K steps if the
prediction did not change.  One pass looks at all K canvases; the longest run of them that the
target itself would have made stands, and the last one's prediction is the next draft.  So the
output is that of the greedy static sampler, in fewer passes over more rows.

Shapes: B rows, K drafted steps, C positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specstream.generation.canvases import OpenRows
from specstream.generation.lengths import (
    DraftLength,
    FixedLength,
    RowLength,
    StepCosts,
    check_costs,
)
from specstream.generation.masked import (
    Blocks,
    MaskedPipeline,
    Round,
    Sampler,
)
from specstream.generation.masked_costs import nested_costs, rounded
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.processors import TextProcessor
from specstream.sampling import Noise
from specstream.structures import Canvas, Guarantee
from specstream.unmasking import StaticSchedule


@dataclass(slots=True)
class Drafted:
    """Where the sampler would stand."""

    canvas: Canvas
    blocks: Blocks


class FreeDavePipeline(MaskedPipeline):
    """The greedy static sampler of `MaskedPipeline`, several of its steps in one pass.

    `lengths` says how many steps are drafted; each costs the pass one more canvas.  The first step
    of a round is the target's own, made from logits that are known, so each pass makes one at
    least.  Raises ValueError where the sampler is drawn at random or has no schedule.
    """

    guarantee = Guarantee.EXACT_GREEDY

    def __init__(
        self,
        target: PretrainedMaskedLM,
        processor: TextProcessor,
        lengths: DraftLength | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 1,
        compile: bool = False,
        costs: StepCosts | None = None,
    ) -> None:
        super().__init__(target, processor, sampler, batch_size, compile)
        unmasking = self.sampler.unmasking
        if not self.sampler.sampling.greedy:
            raise ValueError("nested steps are verified at temperature 0 only")
        if not isinstance(unmasking, StaticSchedule) or unmasking.order == "random":
            raise ValueError("nested steps need a StaticSchedule whose order is not random")
        self.lengths = lengths if lengths is not None else FixedLength(4)
        self.costs = self.given_costs = costs
        self.measured: dict[int, StepCosts] = {}  # by the width of canvases
        check_costs(self.lengths, costs)
        self._none = Noise(0, target.device)  # decides nothing at temperature 0

    def prepare(self, width: int) -> None:
        if self.lengths.needs_costs and self.given_costs is None:
            width = rounded(self.target, width)
            if width not in self.measured:
                self.measured[width] = nested_costs(self.way, self.lengths, width)
            self.costs = self.measured[width]

    def _fill(self, canvas: Canvas, given: Tensor, noise: Noise, rows: OpenRows) -> Iterator[Round]:
        blocks = Blocks.of(canvas.masked, self.sampler.block_tokens)
        chosen = [self.lengths.for_row(self.costs) for _ in rows.lengths]
        logits = self._look(canvas.tokens, canvas, given, rows)
        while rows.masks:
            before = canvas.masked
            wanted = max(chosen[row].choose() for row in rows.masks)
            drafts, left = self._drafts(
                canvas, blocks, logits, min(wanted + 1, max(rows.masks.values()))
            )
            self.stats.draft_calls += len(drafts) > 1
            taken = torch.zeros_like(canvas.lengths)  # (B,) drafts beyond the first that stand
            looked = [draft for draft, masks in zip(drafts, left, strict=True) if any(masks)]
            if looked:  # else the last step is made: no need to look
                tokens = torch.cat([draft.canvas.tokens for draft in looked])
                said = self._look(tokens, canvas, given, rows).unflatten(0, (len(looked), -1))
                taken = self._agreed(drafts, said)
                here = taken.clamp(max=len(looked) - 1)  # beyond it a row has no masks
                logits = said.take_along_dim(here[None, :, None, None], 0)[0]
            self._take(canvas, blocks, drafts, taken)
            self._record(chosen, rows, left, taken)
            yield Round(before & ~canvas.masked)

    def _drafts(
        self, canvas: Canvas, blocks: Blocks, logits: Tensor, number: int
    ) -> tuple[list[Drafted], list[list[int]]]:
        """Return the canvases after 1..number steps if the logits (B, C, V) stayed as they are.

        And how many masks each of them has in each row.  They are fewer where no mask is left.
        """
        drafts = [self._after(Drafted(canvas, blocks), logits)]
        while len(drafts) < number:
            drafts.append(self._after(drafts[-1], logits))
        # The pass is to look at no canvas that is full: the host has to know which those are.
        left = torch.stack([draft.canvas.masked.sum(1) for draft in drafts]).tolist()
        size = next((i for i, masks in enumerate(left, 1) if not any(masks)), number)
        return drafts[:size], left[:size]

    def _after(self, state: Drafted, logits: Tensor) -> Drafted:
        """Return the state after one step of the sampler under `logits`; the old one stays."""
        canvas, blocks = replace(state.canvas), replace(state.blocks)
        self._step(canvas, blocks, logits, canvas.masked, self._none)
        return Drafted(canvas, blocks)

    def _agreed(self, drafts: list[Drafted], said: Tensor) -> Tensor:
        """Return how many drafts after the first are what the target does next, (B,).

        said (K, B, C, V): the logits of the drafts, of all but the last at least.
        """
        stands = torch.ones_like(drafts[0].canvas.lengths, dtype=torch.bool)
        taken = torch.zeros_like(drafts[0].canvas.lengths)
        for (draft, following), logits in zip(itertools.pairwise(drafts), said, strict=False):
            own = self._after(draft, logits).canvas.tokens
            stands = stands & (own == following.canvas.tokens).all(1) & draft.canvas.masked.any(1)
            taken = taken + stands
        return taken

    @staticmethod
    def _take(canvas: Canvas, blocks: Blocks, drafts: list[Drafted], taken: Tensor) -> None:
        """Put each row into the state of the last of its drafts that stands."""

        def pick(values: list[Tensor]) -> Tensor:
            stacked = torch.stack(values)  # (K, B, ...)
            return stacked.take_along_dim(taken.view(1, -1, *[1] * (stacked.dim() - 2)), 0)[0]

        canvas.tokens = pick([draft.canvas.tokens for draft in drafts])
        canvas.masked = pick([draft.canvas.masked for draft in drafts])
        canvas.drawn = pick([draft.canvas.drawn for draft in drafts])
        blocks.current = pick([draft.blocks.current for draft in drafts])
        blocks.steps = pick([draft.blocks.steps for draft in drafts])

    def _record(
        self,
        chosen: list[RowLength],
        rows: OpenRows,
        left: list[list[int]],
        taken: Tensor,
    ) -> None:
        """Tell each row how many of its drafted steps stood, (B,), and count them.

        `left` are the masks of each row in each draft.  The first step of a round is the target's
        own: no draft.  A row that it finishes has none.
        """
        stats = self.stats
        stats.tested += [0] * (len(left) - 1 - len(stats.tested))
        stats.accepted += [0] * (len(left) - 1 - len(stats.accepted))
        stands = taken.tolist()  # what the rows choose next depends on it
        for row, masks in rows.masks.items():
            drafted, stood = [counts[row] for counts in left], stands[row]
            made = sum(count > 0 for count in drafted[:-1])
            tested = min(stood + 1, made)
            if tested:
                chosen[row].record(tested, stood)
            for i in range(tested):
                stats.tested[i] += 1
                stats.accepted[i] += i < stood
            stats.full_rounds += 1
            stats.full_committed += masks - drafted[stood]
            stats.plain_rounds += not made
            stats.draft_lengths += drafted[0] - drafted[-1]
