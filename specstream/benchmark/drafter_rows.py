"""From the measurements of one task to its table of drafters: speed, calls, size and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specstream.benchmark.drafter_records import DrafterRow, ExtraParameters, JudgedText
from specstream.benchmark.outputs import compare_greedy, repeated_share
from specstream.benchmark.pair import Pair
from specstream.benchmark.parameters import extra_parameters
from specstream.benchmark.questions import Question
from specstream.benchmark.rows import Agreement, Machine
from specstream.benchmark.runners import PipelineRunner
from specstream.benchmark.speed_rows import Result, bound, counts, describe, interval, ratio
from specstream.benchmark.target_quality import AnswerScores, judge_tokens
from specstream.benchmark.timing import Measured
from specstream.generation import Limits, SpeculativePipeline
from specstream.metrics import TextQuality
from specstream.sampling import Sampling
from specstream.structures import Guarantee

EXACT = {Guarantee.EXACT_LAW.value, Guarantee.EXACT_GREEDY.value}


@dataclass(frozen=True)
class Entry:
    """What a method did, whose text it decodes, and whose plain decoding it is compared with."""

    result: Result
    target: str
    baseline: str

    @property
    def is_plain(self) -> bool:
        """Whether it is plain decoding of its target."""
        return self.result.method.role == "plain"


@dataclass(frozen=True)
class DrafterRowMaker:
    """Turns the measurements of one task under one law into rows; `pairs` are keyed by target.

    `judged`, keyed alike, are the scores of the targets on more questions; empty, the timed answers
    are all that is judged.
    """

    task: str
    pairs: dict[str, Pair]
    quality: TextQuality
    sampling: Sampling
    limits: Limits
    machine: Machine
    questions: Sequence[Question]
    prompts: list[list[int]]
    entries: list[Entry]
    judged: dict[str, AnswerScores]

    def plain(self, target: str) -> Measured:
        """Return plain decoding of a target, the fastest variant."""
        return next(e.result.best for e in self.entries if e.is_plain and e.target == target)

    def row(self, entry: Entry) -> DrafterRow:
        """Return the row of one method."""
        method, best, baseline = entry.result.method, entry.result.best, self.plain(entry.baseline)
        speedup = ratio(baseline, best)
        assert speedup is not None
        main = next(iter(self.pairs))
        named = entry.is_plain and entry.target != main
        agreement, share = self._agreement(entry)
        return DrafterRow(
            task=self.task,
            method=f"{method.label}, {entry.target}" if named else method.label,
            role=method.role,
            target=entry.target,
            baseline=entry.baseline,
            variant=best.runner.variant,
            variants={m.runner.variant: m.total for m in entry.result.variants},
            sampling=describe(self.sampling),
            num_prompts=len(self.prompts),
            prompt_tokens=float(np.mean([len(p) for p in self.prompts])),
            max_new_tokens=self.limits.max_new_tokens,
            repeats=len(best.seconds),
            elements=best.elements,
            seconds=best.total,
            tokens_per_second=best.elements / best.total,
            speedup_vs_plain=speedup,
            speedup_interval=None if best is baseline else interval(baseline, best),
            calls_per_token=calls_per_token(best),
            call_reduction=calls_per_token(baseline) / calls_per_token(best),
            counts=counts(best),
            bound=bound(best, speedup),
            judged=self._judged(entry, agreement),
            agreement=agreement,
            identical_share=share,
            parameters=self._parameters(entry),
            repeated_4grams=repeated_share(best.tokens),
            machine=self.machine,
        )

    def _judged(self, entry: Entry, agreement: Agreement) -> JudgedText:
        """Return the task metric of a method: its target's, where it promises its target's text."""
        main = next(iter(self.pairs))
        promised = entry.is_plain or (
            counts(entry.result.best).guarantee in EXACT and agreement.identical is not False
        )
        if self.judged and promised:
            own, plain, base = (self.judged[t] for t in (entry.target, entry.baseline, main))
        else:
            own, plain, base = (
                self._timed(did, target)
                for did, target in (
                    (entry.result.best, entry.target),
                    (self.plain(entry.baseline), entry.baseline),
                    (self.plain(main), main),
                )
            )
        size = len(own.values)
        if promised and entry.target == main:
            return JudgedText(own.means, plain.means, size)
        gaps = own.minus(base)
        means = {name: gap.mean for name, gap in gaps.items()}
        intervals = {name: gap.interval for name, gap in gaps.items()}
        return JudgedText(own.means, plain.means, size, means, intervals)

    def _timed(self, did: Measured, target: str) -> AnswerScores:
        """Judge what was decoded on the clock."""
        processor = self.pairs[target].processor
        return judge_tokens(self.quality, processor, self.questions, did.tokens)

    def _agreement(self, entry: Entry) -> tuple[Agreement, float | None]:
        """Compare greedy text with plain decoding of the same target; drawn text may differ."""
        best, plain = entry.result.best, self.plain(entry.target)
        if entry.is_plain or not self.sampling.greedy:
            return Agreement(), None
        same = [ours == own for ours, own in zip(best.tokens, plain.tokens, strict=True)]
        target, penalty = self.pairs[entry.target].target, self.sampling.repetition_penalty
        found = compare_greedy(target, self.prompts, best.tokens, plain.tokens, penalty)
        return found, sum(same) / len(same)

    def _parameters(self, entry: Entry) -> ExtraParameters:
        runner = entry.result.best.runner
        assert isinstance(runner, PipelineRunner)
        if not isinstance(runner.pipeline, SpeculativePipeline):
            return ExtraParameters()
        return extra_parameters(runner.pipeline.drafter, runner.pipeline.target)


def calls_per_token(did: Measured) -> float:
    """Return the target calls for each emitted token."""
    assert did.stats is not None, "our own pipelines count"
    return did.stats.target_calls / did.stats.elements
