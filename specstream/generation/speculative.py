"""Speculative decoding (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2).

A drafter guesses K tokens, the target scores them in one pass, a verifier keeps a prefix (of a
tree, a path) and adds one token of the target's.  Drafters that read the target's features, or
send states of their own along in its pass, are told after it what it showed.  Rows have lengths of
their own, so a batch with ragged prompts and ragged acceptance is the same loop as batch 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specstream.drafters import Drafter
from specstream.generation.base import Prompt, TextPipeline, prefill
from specstream.generation.batch import Batch, Limits
from specstream.generation.costs import stored_costs
from specstream.generation.lengths import CostModelLength, DraftLength, EachInTurn, StepCosts
from specstream.generation.target_pass import (
    Committed,
    empty_draft,
    observation,
    pad_draft,
    path_width,
)
from specstream.models.cache import SlotCache, bucket
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.quantization import quantization_report
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import Context, Guarantee, Step, TokenDraft
from specstream.verification import TokenRejection, TokenVerifier, TreeRejection, depths


class SpeculativePipeline(TextPipeline):
    """Decodes `target` with `drafter`'s guesses, under `verifier`'s rule.

    `lengths` says how many tokens to draft (of a tree, how deep); the cost model goes no further
    than the drafter can.  A policy that needs costs has them measured at the first run and kept in
    the user's cache folder, unless `costs` are given.  Raises ValueError when the verifier cannot
    judge this drafter's law or trees, or the vocabularies differ.
    """

    def __init__(
        self,
        target: PretrainedLM,
        drafter: Drafter,
        processor: TextProcessor,
        verifier: TokenVerifier | None = None,
        lengths: DraftLength | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        batch_size: int = 1,
        compile: bool = False,
        chat: bool = False,
        costs: StepCosts | None = None,
    ) -> None:
        self.drafter = drafter
        self.verifier = verifier or (TreeRejection() if drafter.trees else TokenRejection())
        self.lengths = _within(lengths or CostModelLength(), drafter)
        self.costs = costs
        self.headroom = drafter.num_slots(self.lengths.max_tokens)
        if drafter.trees and not self.verifier.trees:
            raise ValueError(
                f"{type(self.verifier).__name__} judges chains; {type(drafter).__name__} drafts "
                "trees, which TreeRejection judges"
            )
        if drafter.trees and any(target.windows.values()):
            raise ValueError(
                f"{type(drafter).__name__} drafts trees, which the target's sliding-window layers "
                "do not support"
            )
        if drafter.law not in self.verifier.needs:
            names = ", ".join(sorted(law.value for law in self.verifier.needs))
            raise ValueError(
                f"{type(self.verifier).__name__} judges drafts that are {names}; "
                f"{type(drafter).__name__}'s are {drafter.law.value}"
            )
        drafter.check_target(target, processor)
        self.guarantee = Guarantee.combine([self.verifier.guarantee])
        super().__init__(target, processor, sampling, limits, batch_size, compile, chat)

    def prepare(self) -> None:
        if self.lengths.needs_costs and self.costs is None:
            self.costs = stored_costs(self)

    def _decode(self, batch: Batch, cache: SlotCache, noise: Noise) -> Iterator[list[Step]]:
        rows = [self.lengths.for_row(self.costs) for _ in batch.indices]
        state = self.drafter.new_cache(len(rows), cache.capacity)
        reads = self.drafter.feature_layers
        prefill(
            self.target,
            batch,
            cache,
            reads,
            (lambda features, first: self.drafter.read_prompt(features, first, state))
            if reads
            else None,
        )
        while alive := batch.rows:
            chosen = {row: rows[row].choose() for row in alive}
            wanted = [0] * len(rows)
            for row in alive:  # one token of a row's last is the target's own
                wanted[row] = min(chosen[row], batch.remaining[row] - 1)
            shortened = {row for row in alive if wanted[row] < chosen[row]}
            draft = self.draft(batch.context, state, wanted, noise)
            committed = self.verify(batch.context, cache, draft, noise, riding=max(wanted) > 0)
            self.stats.target_calls += 1
            self.stats.target_rows += len(alive) * self._width(draft, max(wanted) > 0)
            steps, outcomes = batch.commit(committed, shortened)
            self.stats.draft_calls += max(wanted) > 0
            if max(wanted) or reads:
                accepted = [outcome.accepted for outcome in outcomes]
                self.drafter.observe(observation(committed, accepted, batch.context.wanted), state)
            for row in alive:
                rows[row].record(outcomes[row].tested, outcomes[row].accepted)
            yield steps

    def meet_shapes(self, prompts: Sequence[Prompt]) -> None:
        """Decode `prompts` with every draft length in turn, so that all passes are compiled.

        A policy that chooses may come to a length late, and a pass that compiles then stops the
        text for as long as that takes.
        """
        policy = self.lengths
        self.lengths = EachInTurn(policy)
        try:
            self.complete(prompts)
        finally:
            self.lengths = policy

    def draft(self, context: Context, state: Any, wanted: list[int], noise: Noise) -> TokenDraft:
        """Have the drafter guess as many tokens as the neediest row wants, none beyond a row's own.

        Where every row wants 0 the drafter is not run at all.
        """
        num_tokens = max(wanted)
        context.wanted = None
        if num_tokens == 0:
            return empty_draft(len(wanted), context.tokens.device)
        if self.compiled:  # near a limit a longer draft, cut below, instead of one more graph
            num_tokens = min(k for k in self.lengths.choices if k >= num_tokens)
        context.wanted = torch.tensor(wanted).to(context.lengths.device)
        draft = self.drafter.propose(context, state, num_tokens, self.sampling, noise)
        if min(wanted) < num_tokens:
            own = _nodes(draft, context.wanted)
            draft = replace(draft, lengths=torch.minimum(draft.lengths, own))
        if self.compiled and draft.tokens.shape[1]:
            draft = pad_draft(draft, self.lengths.max_tokens)
        return draft

    def verify(
        self,
        context: Context,
        cache: SlotCache,
        draft: TokenDraft,
        noise: Noise,
        riding: bool = False,
    ) -> Committed:
        """Run one target pass over the last committed token and the draft.

        `riding` says whether what the drafter attaches goes along.
        """
        longest = max(len(tokens) for tokens in context.history)
        rider = self.drafter.attach() if riding else None
        return self._pass(
            self.target,
            self.verifier,
            self.sampling,
            noise,
            context,
            cache,
            draft,
            bucket(longest - 1 + self._width(draft, riding), cache.capacity),
            self.drafter.feature_layers,
            rider,
        )

    def _width(self, draft: TokenDraft, riding: bool) -> int:
        """Return how many positions of a row a pass evaluates, what rides along included."""
        if riding and self.drafter.attach() is not None:
            return self.drafter.num_slots(path_width(draft))
        return draft.tokens.shape[1] + 1

    def _quantized(self) -> dict[str, Any]:
        report = quantization_report(self.drafter)
        return super()._quantized() | ({} if report is None else {"drafter": report})


def _within(lengths: DraftLength, drafter: Drafter) -> DraftLength:
    """Let a policy that chooses choose among what the drafter can; ValueError for another."""
    if lengths.max_tokens <= drafter.max_tokens:
        return lengths
    if isinstance(lengths, CostModelLength):
        return replace(lengths, max_tokens=drafter.max_tokens)
    raise ValueError(
        f"max_tokens {lengths.max_tokens} is more than the {drafter.max_tokens} that this "
        f"{type(drafter).__name__} drafts"
    )


def _nodes(draft: TokenDraft, heights: Tensor) -> Tensor:
    """Return how many nodes (B,) of each row lie no deeper than its height (B,)."""
    if draft.parents is None:
        return heights
    return (depths(draft.parents) <= heights[:, None]).sum(1)
