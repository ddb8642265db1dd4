"""Draft with a cheap masked model, score the draft with the target, mask again what it doubts.

DualDiffusion (Goyal et al. 2026), with what its code lacks: the target scores the drafter's own
tokens, rows of a batch remask different positions, what is filled further right stays, and a round
that fills nothing hands over to the target.  HEURISTIC: nothing is promised about the law.

Shapes: B rows, C positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from specstream.drafters.base import CanvasDrafter
from specstream.generation.lengths import DraftLength, FixedLength, RowLength, StepCosts
from specstream.generation.masked import (
    Blocks,
    MaskedPipeline,
    Round,
    Sampler,
    check_costs,
    own_law,
)
from specstream.generation.masked_costs import drafted_costs, rounded
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.quantization import quantization_report
from specstream.processors import TextProcessor
from specstream.sampling import Noise
from specstream.structures import Canvas, CanvasDraft, Guarantee
from specstream.verification import CanvasVerifier, ConfidenceThreshold


@dataclass(slots=True)
class HandedOver:
    """For how many rounds each row is the target's alone, (B,) each.

    A round of which nothing stands hands the row over for one round, the next such for two, and so
    on: a drafter that is of no use costs little.
    """

    wait: Tensor
    patience: Tensor

    @classmethod
    def of(cls, canvas: Canvas) -> HandedOver:
        return cls(torch.zeros_like(canvas.lengths), torch.ones_like(canvas.lengths))

    def over(self) -> Tensor:
        """Return which rows may be drafted in the coming round, (B,) bool."""
        return self.wait == 0

    def learn(self, drafted: Tensor, stood: Tensor) -> None:
        """Learn of a round in which rows drafted (B,), and of which something stood (B,)."""
        self.wait = (self.wait - 1).clamp(min=0)
        failed = drafted & ~stood
        self.wait = torch.where(failed, self.patience, self.wait)
        self.patience = torch.where(failed, 2 * self.patience, self.patience)
        self.patience = torch.where(stood, 1, self.patience)


class DualDiffusionPipeline(MaskedPipeline):
    """Fills canvases with `drafter`'s guesses that `verifier` lets stand.

    `lengths` says how many denoising steps the drafter makes in a round, 0 is a plain step of the
    target.  The target scores a draft in one pass: `copies` 1 shows it whole (for a target trained
    with `corruption`, which was asked about tokens it sees); more copies of the canvas mask each
    drafted position in one of them, and the others' tokens stay.  Where all of a draft stands that
    was shown whole, the target makes a step of its own in the same pass.  After `max_target_calls`
    what is masked is filled at once.
    """

    guarantee = Guarantee.HEURISTIC

    def __init__(
        self,
        target: PretrainedMaskedLM,
        drafter: CanvasDrafter,
        processor: TextProcessor,
        verifier: CanvasVerifier | None = None,
        lengths: DraftLength | None = None,
        copies: int = 2,
        max_target_calls: int | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 1,
        compile: bool = False,
        costs: StepCosts | None = None,
    ) -> None:
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        if max_target_calls is not None and max_target_calls < 1:
            raise ValueError(f"max_target_calls must be at least 1, got {max_target_calls}")
        self.drafter = drafter
        self.verifier = verifier if verifier is not None else ConfidenceThreshold(0.5)
        self.lengths = lengths if lengths is not None else FixedLength(4)
        self.copies = copies
        self.max_target_calls = max_target_calls
        self.costs = self.given_costs = costs
        self.measured: dict[int, StepCosts] = {}  # by the width of canvases
        check_costs(self.lengths, costs)
        if self.lengths.needs_costs and copies > 1:
            raise ValueError(
                "the cost model counts a step of the target's own in each round, which it makes "
                "with copies 1 only"
            )
        drafter.check_target(target, processor)
        super().__init__(target, processor, sampler, batch_size, compile)

    @property
    def law(self) -> str:
        return "no law: drafts stand by a rule"

    @property
    def models(self) -> list[nn.Module]:
        return [self.target, self.drafter]

    def prepare(self, width: int) -> None:
        if self.lengths.needs_costs and self.given_costs is None:
            width = rounded(self.target, width)
            if width not in self.measured:
                self.measured[width] = drafted_costs(self.way, self.drafter, self.lengths, width)
            self.costs = self.measured[width]

    def _fill(self, canvas: Canvas, given: Tensor, noise: Noise) -> Iterator[Round]:
        blocks = Blocks.of(canvas.masked, self.sampler.block_tokens)
        rows = [self.lengths.for_row(self.costs) for _ in canvas.lengths]
        cache = self.drafter.new_cache(*canvas.tokens.shape)
        calls = torch.zeros_like(canvas.lengths)  # (B,) target passes that each row has needed
        handed_over = HandedOver.of(canvas)
        while bool(canvas.masked.any()):
            before = canvas.masked
            alive = before.any(1)  # (B,)
            drafting = (alive & handed_over.over()).tolist()
            wanted = [row.choose() if may else 0 for row, may in zip(rows, drafting, strict=True)]
            draft = self._draft(canvas, blocks, cache, wanted, noise)
            asks = alive & (~draft.drafted.any(1) | self.verifier.needs_target)
            logits = self._score(canvas, draft, given) if bool(asks.any()) else None
            stands, replaced = self._judge(canvas, draft, logits)
            calls = calls + asks
            last = asks & (calls >= (self.max_target_calls or math.inf))
            if logits is not None:
                self._go_on(canvas, blocks, draft, stands, logits, asks, last, noise)
            filled = before & ~canvas.masked
            handed_over.learn(draft.drafted.any(1), (filled & draft.drafted).any(1))
            self._record(rows, draft, stands, filled, alive)
            yield Round(filled, draft.drafted, replaced)
            fallen = canvas.masked & last[:, None]
            if logits is not None and bool(fallen.any()):
                self._finish(canvas, fallen, logits, noise)
                yield Round(fallen)

    def _draft(
        self, canvas: Canvas, blocks: Blocks, cache: Any, wanted: list[int], noise: Noise
    ) -> CanvasDraft:
        """Let the drafter guess in each row's current block."""
        self.stats.draft_calls += max(wanted) > 0
        shown = replace(canvas, masked=blocks.open(canvas.masked))
        draft = self.drafter.propose(shown, cache, wanted, self.sampler.sampling, noise)
        canvas.drawn = shown.drawn
        return draft

    def _judge(
        self, canvas: Canvas, draft: CanvasDraft, logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Put into `canvas` what the rule lets stand; return where that is the draft's, where not.

        (B, C) each: a rule may put the target's token in place of a drafted one.
        """
        verdict = self.verifier(draft, None if logits is None else own_law(logits))
        canvas.tokens = torch.where(verdict.kept, verdict.tokens, canvas.tokens)
        canvas.masked = canvas.masked & ~verdict.kept
        own = verdict.tokens == draft.tokens
        return verdict.kept & own, verdict.kept & ~own

    def _go_on(
        self,
        canvas: Canvas,
        blocks: Blocks,
        draft: CanvasDraft,
        stands: Tensor,
        logits: Tensor,
        asks: Tensor,
        last: Tensor,
        noise: Noise,
    ) -> None:
        """Let the target fill on in those of the rows `asks` (B,) in which no draft has fallen.

        It finishes a row for which this pass is the `last` (B,).  In another it makes a step of
        its own, if `logits` (B, C, V) speak of the canvas as it is: all of the draft was shown.
        """
        whole = asks & (stands == draft.drafted).all(1)
        self._finish(canvas, canvas.masked & (whole & last)[:, None], logits, noise)
        own = whole & ~last
        if self.copies > 1:
            own = own & ~draft.drafted.any(1)
        if bool(own.any()):
            self._step(canvas, blocks, logits, canvas.masked & own[:, None], noise)

    def _finish(self, canvas: Canvas, rest: Tensor, logits: Tensor, noise: Noise) -> None:
        """Fill the positions `rest` (B, C) all at once."""
        if bool(rest.any()):
            canvas.tokens = torch.where(rest, self._draw(canvas, logits, noise), canvas.tokens)
            canvas.masked = canvas.masked & ~rest

    def _score(self, canvas: Canvas, draft: CanvasDraft, given: Tensor) -> Tensor:
        """Return the target's logits (B, C, V) at each position of the draft, from one pass."""
        if self.copies == 1 or not bool(draft.drafted.any()):
            return self._look(draft.tokens, canvas, given)
        rank = draft.drafted.cumsum(1) - 1  # (B, C)
        turns = torch.arange(self.copies, device=rank.device)[:, None, None]
        hidden = draft.drafted & (rank % self.copies == turns)  # (N, B, C)
        shown = torch.where(hidden, self.target.mask_id, draft.tokens)
        said = self._look(shown.flatten(0, 1), canvas, given).unflatten(0, hidden.shape[:2])
        turn = torch.where(draft.drafted, rank % self.copies, 0)
        return said.take_along_dim(turn[None, :, :, None], 0)[0]

    def _record(
        self,
        rows: list[RowLength],
        draft: CanvasDraft,
        stands: Tensor,
        filled: Tensor,
        alive: Tensor,
    ) -> None:
        """Tell each row which of its steps stood whole, one after the other, and count them."""
        stats = self.stats
        number = int(draft.steps.max()) + 1
        steps = torch.arange(number, device=stands.device)[:, None, None]
        mine = draft.steps == steps  # (K, B, C)
        drafted, stood = mine.sum(2).T.tolist(), (mine & stands).sum(2).T.tolist()  # (B, K)
        stats.tested += [0] * (number - len(stats.tested))
        stats.accepted += [0] * (number - len(stats.accepted))
        counts = zip(rows, drafted, stood, filled.sum(1).tolist(), alive.tolist(), strict=True)
        for row, asked, held, committed, decoded in counts:
            if not decoded:
                continue
            made = sum(n > 0 for n in asked)
            whole = 0
            while whole < made and held[whole] == asked[whole]:
                whole += 1
            if made:
                row.record(min(whole + 1, made), whole)
            for step in range(made):
                stats.tested[step] += asked[step]
                stats.accepted[step] += held[step]
            stats.full_rounds += 1
            stats.full_committed += committed
            stats.plain_rounds += not made
            stats.draft_lengths += sum(asked)

    def _quantized(self) -> dict[str, Any]:
        report = quantization_report(self.drafter)
        return super()._quantized() | ({} if report is None else {"drafter": report})
