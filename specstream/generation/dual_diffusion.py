"""Draft with a cheap masked model, score the draft with the target, mask again what it doubts.

DualDiffusion (Goyal et al. 2026), with what its code lacks: the target scores the drafter's own
tokens, rows of a batch remask different positions, what is filled further right stays, and a round
that fills nothing hands over to the target.  HEURISTIC: nothing is promised about the law.

Shapes: B rows, C positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from specstream.drafters.base import CanvasDrafter
from specstream.generation.lengths import DraftLength, FixedLength, StepCosts
from specstream.generation.masked import Blocks, MaskedPipeline, Sampler
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.quantization import quantization_report
from specstream.processors import TextProcessor
from specstream.sampling import Noise
from specstream.structures import Canvas, CanvasDraft, Guarantee
from specstream.verification import CanvasVerifier, ConfidenceThreshold


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
        self.costs = costs
        drafter.check_target(target, processor)
        super().__init__(target, processor, sampler, batch_size, compile)

    def _fill(self, canvas: Canvas, given: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        blocks = Blocks.of(canvas.masked, self.sampler.block_tokens)
        rows = [self.lengths.for_row(self.costs) for _ in canvas.lengths]
        cache = self.drafter.new_cache(*canvas.tokens.shape)
        handed_over = torch.zeros(len(rows), dtype=torch.bool, device=canvas.tokens.device)
        calls = 0
        while bool(canvas.masked.any()):
            plain = (handed_over | ~canvas.masked.any(1)).tolist()
            wanted = [0 if plain[i] else row.choose() for i, row in enumerate(rows)]
            if max(wanted):
                self.stats.draft_calls += 1
            draft = self.drafter.propose(canvas, cache, wanted, self.sampler.sampling, noise)
            calls += self.verifier.needs_target or not max(wanted)
            last = self.max_target_calls is not None and calls >= self.max_target_calls
            before = canvas.masked
            kept = self._judge(canvas, blocks, draft, given, noise, last)
            filled = before & ~canvas.masked
            handed_over = before.any(1) & ~filled.any(1)
            self._record(rows, draft, kept)
            yield draft.drafted, filled

    def _judge(
        self,
        canvas: Canvas,
        blocks: Blocks,
        draft: CanvasDraft,
        given: Tensor,
        noise: Noise,
        last: bool,
    ) -> Tensor:
        """Let the target score the draft; fill `canvas` with what stands, returned as (B, C)."""
        guessed = draft.drafted.any(1)  # (B,)
        if not self.verifier.needs_target and bool((guessed | ~canvas.masked.any(1)).all()):
            verdict = self.verifier(draft, draft.probs)
            law = None
        else:
            law = self._score(canvas, draft, given)
            verdict = self.verifier(draft, law)
        stands = verdict.kept
        canvas.tokens = torch.where(stands, verdict.tokens, canvas.tokens)
        canvas.masked = canvas.masked & ~stands
        if law is None:
            return stands
        if last:
            best = law.argmax(-1)
            canvas.tokens = torch.where(canvas.masked, best, canvas.tokens)
            canvas.masked = torch.zeros_like(canvas.masked)
            return stands
        whole = (stands == draft.drafted).all(1) & (torch.tensor(self.copies == 1) | ~guessed)
        own = canvas.masked & whole[:, None]
        if bool(own.any()):
            self._step(canvas, blocks, law, own, noise)
        return stands

    def _score(self, canvas: Canvas, draft: CanvasDraft, given: Tensor) -> Tensor:
        """Return the target's law (B, C, V) at each position of the draft, from one pass."""
        self.stats.target_calls += 1
        if self.copies == 1 or not bool(draft.drafted.any()):
            return self._law(draft.tokens, canvas, given)
        rank = draft.drafted.cumsum(1) - 1  # (B, C)
        turns = torch.arange(self.copies, device=rank.device)[:, None, None]
        hidden = draft.drafted & (rank % self.copies == turns)  # (N, B, C)
        shown = torch.where(hidden, self.target.mask_id, draft.tokens)
        law = self._law(shown.flatten(0, 1), canvas, given).unflatten(0, hidden.shape[:2])
        turn = torch.where(draft.drafted, rank % self.copies, 0)
        return law.take_along_dim(turn[None, :, :, None], 0)[0]

    def _record(self, rows: list[Any], draft: CanvasDraft, kept: Tensor) -> None:
        """Tell each row which of its steps stood whole, one after the other, and count them."""
        number = int(draft.steps.max()) + 1
        if number == 0:
            return
        stats = self.stats
        steps = torch.arange(number, device=kept.device)[:, None, None]
        mine = draft.steps == steps  # (K, B, C)
        drafted = mine.sum(2).T.tolist()  # (B, K)
        stood = (mine & kept).sum(2).T.tolist()
        missing = number - len(stats.tested)
        stats.tested += [0] * missing
        stats.accepted += [0] * missing
        for row, (asked, held) in enumerate(zip(drafted, stood, strict=True)):
            made = sum(n > 0 for n in asked)
            if not made:
                continue
            whole = 0
            while whole < made and held[whole] == asked[whole]:
                whole += 1
            rows[row].record(min(whole + 1, made), whole)
            for step in range(made):
                stats.tested[step] += asked[step]
                stats.accepted[step] += held[step]
            stats.full_rounds += 1
            stats.full_committed += sum(held)
            stats.draft_lengths += sum(asked)

    def _quantized(self) -> dict[str, Any]:
        report = quantization_report(self.drafter)
        return super()._quantized() | ({} if report is None else {"drafter": report})
