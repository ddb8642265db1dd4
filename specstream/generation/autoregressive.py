"""Plain decoding: the target alone, one token a pass.  The baseline of every comparison."""

from __future__ import annotations

from collections.abc import Iterator

from specstream.generation.base import TextPipeline, prefill
from specstream.generation.batch import Batch
from specstream.generation.target_pass import empty_draft
from specstream.models.cache import SlotCache, bucket
from specstream.sampling import Noise
from specstream.structures import Step
from specstream.verification import TokenRejection


class AutoregressivePipeline(TextPipeline):
    """Draws each token from the target's law: a target pass that verifies an empty draft."""

    def _decode(self, batch: Batch, cache: SlotCache, noise: Noise) -> Iterator[list[Step]]:
        context, stats = batch.context, self.stats
        prefill(self.target, batch, cache)
        draft = empty_draft(len(batch.indices), self.target.device)
        while batch.rows:
            view = bucket(batch.longest, cache.capacity)
            committed = self._pass(
                self.target, TokenRejection(), self.sampling, noise, context, cache, draft, view
            )
            stats.target_calls += 1
            stats.target_rows += len(batch.rows)
            steps, _ = batch.commit(committed)
            yield steps
