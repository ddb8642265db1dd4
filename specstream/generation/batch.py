"""The rows of one batch while they decode: committed tokens, growing texts, ends and counts.

It knows when a row is over (end of sequence, stop string, limit) and cuts a committed block there,
so that nothing follows an end and no limit is overshot.  It does not know models.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from specstream.generation.target_pass import Committed
from specstream.processors import TextProcessor, TextStream
from specstream.structures import Context, Origin, Stats, Step


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a row ends: at `max_new_tokens`, a `stop` string (cut off), or end of sequence."""

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many tokens were drafted for a row in a round, reached by verification, and stood."""

    drafted: int
    tested: int
    accepted: int


class Batch:
    """B rows from their prompts to their ends.

    `prompts` are token ids, `indices` the prompts' numbers, which key the noise; `capacity` bounds
    prompt, new tokens and one more draft together; `vocab_size` is given where `seen` is needed.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        capacity: int,
        limits: Limits,
        processor: TextProcessor,
        stats: Stats,
        device: torch.device,
        vocab_size: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.limits, self.processor, self.stats = limits, processor, stats
        self.indices = list(indices)
        self.remaining = [limits.max_new_tokens] * len(prompts)
        self.streams = [TextStream(processor, limits.stop) for _ in prompts]
        tokens = torch.zeros(len(prompts), capacity, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        seen = None
        if vocab_size is not None:
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, torch.tensor(prompt, dtype=torch.long)] = True
        self.context = Context(
            tokens=tokens.to(device),
            lengths=lengths.to(device),
            prompts=torch.tensor(self.indices).to(device),
            active=torch.ones(len(prompts), dtype=torch.bool, device=device),
            seen=None if seen is None else seen.to(device),
            history=[list(prompt) for prompt in prompts],
            compiled=compiled,
        )

    @property
    def rows(self) -> list[int]:
        """The rows that still decode."""
        return [row for row, left in enumerate(self.remaining) if left > 0]

    @property
    def longest(self) -> int:
        """Committed tokens of the longest row."""
        return max(len(tokens) for tokens in self.context.history)

    def commit(
        self, committed: Committed, shortened: Collection[int] = ()
    ) -> tuple[list[Step], list[Outcome]]:
        """Take over what a target pass committed: the rows' steps, and every row's outcome.

        This is the round's one transfer from the device.  `shortened` are the rows that drafted
        less than they would have, because of the limit; such a round is not counted as a full one.
        """
        counts = [committed.drafted, committed.tested, committed.counts]
        packed = torch.cat([torch.stack(counts, 1), committed.tokens], 1).tolist()
        self.context.lengths, self.context.seen = committed.lengths, committed.seen
        outcomes = [Outcome(*counts) for *counts, _ in (row[:4] for row in packed)]
        steps = [
            self._commit_row(
                row, packed[row][3 : 4 + outcomes[row].accepted], outcomes[row], row in shortened
            )
            for row in self.rows
        ]
        if any(step.finished for step in steps):
            self._close_rows()
        return steps, outcomes

    def _close_rows(self) -> None:
        """Take rows that have ended out of the passes, at the length at which they were cut."""
        device = self.context.active.device
        self.context.active = torch.tensor([left > 0 for left in self.remaining]).to(device)
        lengths = [len(tokens) for tokens in self.context.history]
        self.context.lengths = torch.tensor(lengths).to(device)

    def _commit_row(self, row: int, tokens: list[int], outcome: Outcome, shortened: bool) -> Step:
        origins = _origins(outcome)
        kept = self._cut(row, tokens)
        finished = kept is not None
        if not shortened and (kept is None or kept == len(tokens)):
            self._count(outcome)
        tokens, origins = tokens[:kept], origins[:kept]
        self.context.history[row].extend(tokens)
        self.remaining[row] = 0 if finished else self.remaining[row] - len(tokens)
        self.stats.elements += len(tokens)
        stream = self.streams[row]
        if finished:
            stream.close()
        text = stream.take(final=finished)
        return Step(self.indices[row], tokens, origins, text, finished)

    def _cut(self, row: int, tokens: list[int]) -> int | None:
        """Show the tokens to the row's text; return how many stay if the row ends among them."""
        ends = [i for i, token in enumerate(tokens) if token in self.processor.eos_ids]
        cuts = [] if self.limits.ignore_eos else [i + 1 for i in ends[:1]]
        if self.remaining[row] <= len(tokens):
            cuts.append(self.remaining[row])
        visible = tokens[: min(cuts)] if cuts else tokens
        stopped = self.streams[row].push(visible)
        return min([*cuts, stopped]) if stopped is not None else min(cuts, default=None)

    def _count(self, outcome: Outcome) -> None:
        """Count a round of which every token was kept.

        One that an end cut short, or that drafted less because of the limit, is left out; one
        whose very last token ends the row is counted.
        """
        stats, drafted, accepted = self.stats, outcome.drafted, outcome.accepted
        stats.full_rounds += 1
        stats.full_committed += accepted + 1
        stats.draft_lengths += drafted
        stats.plain_rounds += drafted == 0
        missing = drafted - len(stats.tested)
        stats.tested.extend([0] * missing)
        stats.accepted.extend([0] * missing)
        for i in range(outcome.tested):
            stats.tested[i] += 1
            stats.accepted[i] += i < accepted


def _origins(outcome: Outcome) -> list[Origin]:
    """Say of each token of a round where it came from."""
    if outcome.drafted == 0:
        return [Origin.PLAIN]
    last = Origin.BONUS if outcome.accepted == outcome.tested else Origin.CORRECTION
    return [Origin.ACCEPTED] * outcome.accepted + [last]
