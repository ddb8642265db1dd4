"""Draft with a cheap masked model, score the draft with the target, mask again what it doubts.

DualDiffusion (Goyal et al. 2026), with what its code lacks: the target scores the drafter's own
tokens, rows of a batch remask different positions, what is filled further right stays, and a round
that fills nothing hands over to the target.  HEURISTIC: nothing is promised about the law.

Shapes: B rows, C positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from specstream.drafters.base import CanvasDrafter
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
class DraftedRow:
    """How many steps a row drafts, how often it has asked the target, and whose turn it is.

    A round of which nothing stands hands the row over to the target for one round, the next such
    for two, and so on: a drafter that is of no use costs little.
    """

    length: RowLength
    calls: int = 0  # target passes that it has needed
    wait: int = 0  # rounds that are the target's alone
    patience: int = 1

    def asked_last(self, limit: int | None) -> bool:
        """Count a pass of the target; whether it may not have another."""
        self.calls += 1
        return limit is not None and self.calls >= limit

    def choose(self) -> int:
        """Return how many steps are drafted in the coming round."""
        return 0 if self.wait else self.length.choose()

    def learn(self, drafted: bool, kept: bool) -> None:
        """Learn whether a round drafted anything, and whether any of that holds a token now."""
        self.wait = max(self.wait - 1, 0)
        if drafted and not kept:
            self.wait, self.patience = self.patience, 2 * self.patience
        elif kept:
            self.patience = 1


class DualDiffusionPipeline(MaskedPipeline):
    """Fills canvases with `drafter`'s guesses that `verifier` lets stand.

    `lengths` says how many denoising steps the drafter makes in a round, 0 is a plain step of the
    target.  The target scores a draft in one pass: `copies` 1 shows it whole, to a target trained
    with `corruption`, which was asked about tokens it sees; more copies of the canvas mask each
    drafted position in one of them, and the others' tokens stay.  None is 1 for such a target and
    2 for any other.  Where all of a draft stands that was shown whole, the target makes a step of
    its own in the same pass.  After `max_target_calls` what is masked is filled at once.
    """

    guarantee = Guarantee.HEURISTIC

    def __init__(
        self,
        target: PretrainedMaskedLM,
        drafter: CanvasDrafter,
        processor: TextProcessor,
        verifier: CanvasVerifier | None = None,
        lengths: DraftLength | None = None,
        copies: int | None = None,
        max_target_calls: int | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 1,
        compile: bool = False,
        costs: StepCosts | None = None,
    ) -> None:
        self.copies = choose_copies(target, copies)
        if max_target_calls is not None and max_target_calls < 1:
            raise ValueError(f"max_target_calls must be at least 1, got {max_target_calls}")
        self.drafter = drafter
        self.verifier = verifier if verifier is not None else ConfidenceThreshold(0.5)
        self.lengths = lengths if lengths is not None else FixedLength(4)
        self.max_target_calls = max_target_calls
        self.costs = self.given_costs = costs
        self.measured: dict[int, StepCosts] = {}  # by the width of canvases
        check_costs(self.lengths, costs)
        if self.lengths.needs_costs and self.copies > 1:
            raise ValueError(
                "the cost model counts a step of the target's own in each round, which it makes "
                "with copies 1 only, for a target trained with corruption"
            )
        drafter.check_target(target, processor)
        if self.verifier.needs_draft_law and not drafter.reports_law:
            raise ValueError(
                f"{type(self.verifier).__name__} compares laws, and {type(drafter).__name__} "
                "reports none over the target's tokens"
            )
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

    def _fill(self, canvas: Canvas, given: Tensor, noise: Noise, rows: OpenRows) -> Iterator[Round]:
        blocks = Blocks.of(canvas.masked, self.sampler.block_tokens)
        states = [DraftedRow(self.lengths.for_row(self.costs)) for _ in rows.lengths]
        cache = self.drafter.new_cache(*canvas.tokens.shape)
        while rows.masks:
            before, masks = canvas.masked, dict(rows.masks)
            wanted = [s.choose() if row in masks else 0 for row, s in enumerate(states)]
            draft = self._draft(canvas, blocks, cache, wanted, noise)
            drafted = _by_step(draft, draft.drafted).tolist()  # decides who asks the target
            asks = [row for row in masks if self.verifier.needs_target or not any(drafted[row])]
            logits = None
            if asks:
                logits = self._score(canvas, draft, any(map(any, drafted)), given, rows)
            stands, replaced = self._judge(canvas, draft, logits)
            judged = torch.stack([_by_step(draft, stands), _by_step(draft, stands | replaced)])
            stood, kept = judged.tolist()  # decides who goes on, and what is drafted next
            last = {row for row in asks if states[row].asked_last(self.max_target_calls)}
            if logits is not None:
                whole = [row for row in asks if stood[row] == drafted[row]]
                own = [row for row in whole if self.copies == 1 or not any(drafted[row])]
                self._finish(canvas, last.intersection(whole), logits, noise)
                self._go_on(canvas, blocks, [r for r in own if r not in last], logits, noise)
            yield Round(before & ~canvas.masked, draft.drafted, replaced)
            for row in masks:
                committed = masks[row] - rows.masks.get(row, 0)
                states[row].learn(any(drafted[row]), any(kept[row]))
                self._record(states[row].length, drafted[row], stood[row], committed)
            if logits is not None and last.intersection(rows.masks):
                yield Round(self._finish(canvas, last, logits, noise))

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
        self, canvas: Canvas, blocks: Blocks, rows: Collection[int], logits: Tensor, noise: Noise
    ) -> None:
        """Let the target make a step of its own in `rows`, of which `logits` (B, C, V) speak."""
        if rows:
            self._step(canvas, blocks, logits, canvas.masked & _only(rows, canvas), noise)

    def _finish(
        self, canvas: Canvas, rows: Collection[int], logits: Tensor, noise: Noise
    ) -> Tensor:
        """Fill what is masked in `rows` all at once; return what that was, (B, C)."""
        rest = canvas.masked & _only(rows, canvas)
        if rows:
            canvas.tokens = torch.where(rest, self._draw(canvas, logits, noise), canvas.tokens)
            canvas.masked = canvas.masked & ~rest
        return rest

    def _score(
        self, canvas: Canvas, draft: CanvasDraft, is_drafted: bool, given: Tensor, rows: OpenRows
    ) -> Tensor:
        """Return the target's logits (B, C, V) at each position of the draft, from one pass."""
        if self.copies == 1 or not is_drafted:
            return self._look(draft.tokens, canvas, given, rows)
        rank = draft.drafted.cumsum(1) - 1  # (B, C)
        turns = torch.arange(self.copies, device=rank.device)[:, None, None]
        hidden = draft.drafted & (rank % self.copies == turns)  # (N, B, C)
        shown = torch.where(hidden, self.target.mask_id, draft.tokens)
        said = self._look(shown.flatten(0, 1), canvas, given, rows)
        said = said.unflatten(0, hidden.shape[:2])
        turn = torch.where(draft.drafted, rank % self.copies, 0)
        return said.take_along_dim(turn[None, :, :, None], 0)[0]

    def _record(
        self, length: RowLength, drafted: list[int], stood: list[int], committed: int
    ) -> None:
        """Tell a row which of its steps stood whole, one after the other, and count them."""
        stats = self.stats
        made = sum(n > 0 for n in drafted)
        whole = 0
        while whole < made and stood[whole] == drafted[whole]:
            whole += 1
        if made:
            length.record(min(whole + 1, made), whole)
        stats.tested += [0] * (made - len(stats.tested))
        stats.accepted += [0] * (made - len(stats.accepted))
        for step in range(made):
            stats.tested[step] += drafted[step]
            stats.accepted[step] += stood[step]
        stats.full_rounds += 1
        stats.full_committed += committed
        stats.plain_rounds += not made
        stats.draft_lengths += sum(drafted)

    def _quantized(self) -> dict[str, Any]:
        report = quantization_report(self.drafter)
        return super()._quantized() | ({} if report is None else {"drafter": report})


def choose_copies(target: PretrainedMaskedLM, copies: int | None) -> int:
    """Return on how many copies of a canvas `target` scores a draft, the fewest where None.

    Raises ValueError for a number that it cannot.
    """
    if copies is None:
        return 1 if target.form.corruption else 2
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    if copies == 1 and not target.form.corruption:
        raise ValueError(
            "copies 1 shows the target all of a draft, and it was not trained with corruption to "
            "score tokens it sees: give 2 or more"
        )
    return copies


def _by_step(draft: CanvasDraft, marks: Tensor) -> Tensor:
    """Count the marks (B, C) of each row among what each step has drafted, (B, C steps)."""
    steps = torch.where(marks, draft.steps, draft.steps.shape[1])
    counts = marks.new_zeros(len(marks), draft.steps.shape[1] + 1, dtype=torch.long)
    return counts.scatter_add(1, steps, marks.long())[:, :-1]


def _only(rows: Collection[int], canvas: Canvas) -> Tensor:
    """Return which rows these are, (B, 1) bool."""
    chosen = [[row in rows] for row in range(len(canvas.tokens))]
    return torch.tensor(chosen, device=canvas.tokens.device)
