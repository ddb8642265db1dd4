"""Verify several denoising steps of a static sampler at once (FreeDave, Wu and Zhang 2025).

The target's own prediction is the draft: what the schedule would fill in its next K steps if the
prediction did not change.  One pass looks at all K canvases; the longest run of them that the
target itself would have made stands, and the last one's prediction is the next draft.  So the
output is that of the greedy static sampler, in fewer passes over more rows.

Shapes: B rows, K drafted steps, C positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specstream.generation.lengths import DraftLength, FixedLength, RowLength, StepCosts
from specstream.generation.masked import Blocks, MaskedPipeline, Sampler
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
        self.costs = costs
        self._none = Noise(0, target.device)  # decides nothing at temperature 0

    def _fill(self, canvas: Canvas, given: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        blocks = Blocks.of(canvas.masked, self.sampler.block_tokens)
        rows = [self.lengths.for_row(self.costs) for _ in canvas.lengths]
        self.stats.target_calls += 1
        law = self._law(canvas.tokens, canvas, given)
        while bool(canvas.masked.any()):
            before = canvas.masked
            alive = before.any(1).tolist()
            wanted = max(row.choose() for row, open_ in zip(rows, alive, strict=True) if open_)
            drafts = self._drafts(canvas, blocks, law, max(wanted, 1))
            taken = torch.zeros_like(canvas.lengths)  # (B,) drafts beyond the first that stand
            if bool(drafts[0].canvas.masked.any()):  # else the last step is made: no need to look
                self.stats.target_calls += 1
                self.stats.draft_calls += 1
                tokens = torch.cat([draft.canvas.tokens for draft in drafts])
                laws = self._law(tokens, canvas, given).unflatten(0, (len(drafts), -1))
                taken = self._agreed(drafts, laws)
                law = laws.take_along_dim(taken[None, :, None, None], 0)[0]
            self._take(canvas, blocks, drafts, taken)
            for row, open_, held in zip(rows, alive, taken.tolist(), strict=True):
                if open_:
                    self._record(row, len(drafts), held)
            filled = before & ~canvas.masked
            yield torch.zeros_like(filled), filled

    def _drafts(self, canvas: Canvas, blocks: Blocks, law: Tensor, number: int) -> list[Drafted]:
        """Return the canvases after 1..number steps if the law (B, C, V) stayed as it is."""
        drafts = []
        state = Drafted(replace(canvas), replace(blocks))
        for _ in range(number):
            state = self._after(state, law)
            drafts.append(state)
        return drafts

    def _after(self, state: Drafted, law: Tensor) -> Drafted:
        """Return the state after one step of the sampler under `law`; the old one stays."""
        canvas, blocks = replace(state.canvas), replace(state.blocks)
        self._step(canvas, blocks, law, canvas.masked, self._none)
        return Drafted(canvas, blocks)

    def _agreed(self, drafts: list[Drafted], laws: Tensor) -> Tensor:
        """Return how many drafts after the first are what the target does next, (B,)."""
        stands = torch.ones_like(drafts[0].canvas.lengths)
        taken = torch.zeros_like(stands)
        for i in range(len(drafts) - 1):
            own = self._after(drafts[i], laws[i]).canvas.tokens
            stands = stands * (own == drafts[i + 1].canvas.tokens).all(1)
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

    def _record(self, row: RowLength, drafted: int, taken: int) -> None:
        stats = self.stats
        tested = min(taken + 1, drafted - 1)  # the first step is the target's own
        row.record(tested, taken)
        missing = drafted - 1 - len(stats.tested)
        stats.tested += [0] * missing
        stats.accepted += [0] * missing
        for i in range(tested):
            stats.tested[i] += 1
            stats.accepted[i] += i < taken
        stats.full_rounds += 1
        stats.full_committed += taken + 1
        stats.draft_lengths += drafted - 1
