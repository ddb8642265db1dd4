"""Self-speculation as a pipeline: prompts in, canvases filled by a trunk and its causal head."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from specstream.generation.canvases import OpenRows
from specstream.generation.masked import MaskedPipeline, Round, Sampler
from specstream.generation.self_speculative import SelfSpeculativeSampler
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.self_speculative import SelfSpeculativeHead
from specstream.processors import TextProcessor
from specstream.sampling import Noise
from specstream.structures import Canvas
from specstream.verification import TokenVerifier


class SelfSpeculativePipeline(MaskedPipeline):
    """Fills canvases under the sequential law of `target` and `head` (see `self_speculative`).

    `num_windows` trunk passes fill a canvas; `speculate` False draws one token a causal pass, the
    same law.  Of `sampler` the positions that a step fills have no meaning here: the order is
    random.  Raises ValueError for guidance and blocks.
    """

    def __init__(
        self,
        target: PretrainedMaskedLM,
        head: SelfSpeculativeHead,
        processor: TextProcessor,
        num_windows: int = 4,
        verifier: TokenVerifier | None = None,
        speculate: bool = True,
        sampler: Sampler | None = None,
        batch_size: int = 1,
    ) -> None:
        self.num_windows = num_windows
        super().__init__(target, processor, sampler, batch_size)
        if self.sampler.guidance or self.sampler.block_tokens is not None:
            raise ValueError("self-speculation takes neither guidance nor block_tokens")
        self.head, self.speculate = head, speculate
        self.verifier = verifier
        self.guarantee = self._new_filler().guarantee
        self.stats = self._new_stats()

    @property
    def law(self) -> str:
        return f"the sequential law in {self.num_windows} windows"

    @property
    def models(self) -> list[nn.Module]:
        return [self.target, self.head]

    def _new_filler(self) -> SelfSpeculativeSampler:
        return SelfSpeculativeSampler(
            self.target,
            self.head,
            self.sampler.sampling,
            self.num_windows,
            self.verifier,
            self.speculate,
        )

    def _fill(self, canvas: Canvas, given: Tensor, noise: Noise, rows: OpenRows) -> Iterator[Round]:
        filler = self._new_filler()
        stats = self.stats
        rounds = filler.fill(canvas.tokens, canvas.masked, canvas.lengths, canvas.prompts, noise)
        calls, passes = stats.target_calls, self.full_passes
        for found in rounds:
            canvas.tokens = found.tokens
            canvas.masked = canvas.masked & ~found.filled
            counts = filler.counts
            stats.target_calls = calls + counts.trunk_calls
            stats.draft_calls += self.speculate
            self.full_passes = passes + filler.full_row_passes
            self._count(found.tested, found.stood)
            yield Round(found.filled, found.accepted)
        stats.target_rows += filler.counts.trunk_rows * canvas.tokens.shape[1]

    def _count(self, tested: list[int], accepted: list[int]) -> None:
        """Count a round's drafts by their place in the window that was left."""
        stats = self.stats
        missing = max(tested) - len(stats.tested)
        stats.tested += [0] * missing
        stats.accepted += [0] * missing
        for asked, held in zip(tested, accepted, strict=True):
            for place in range(asked):
                stats.tested[place] += 1
                stats.accepted[place] += place < held
            if asked:
                stats.full_rounds += 1
                stats.full_committed += held + (held < asked)
                stats.draft_lengths += asked
