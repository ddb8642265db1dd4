"""From the measurements of one task to its table of drafters: speed, calls, size and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specstream.benchmark.outputs import compare_greedy, repeated_share
from specstream.benchmark.pair import Pair
from specstream.benchmark.parameters import extra_parameters
from specstream.benchmark.questions import Question
from specstream.benchmark.rows import Agreement, DrafterRow, ExtraParameters, Machine
from specstream.benchmark.runners import PipelineRunner
from specstream.benchmark.speed_rows import Result, bound, counts, describe, interval, ratio
from specstream.benchmark.timing import Measured
from specstream.generation import Limits, SpeculativePipeline
from specstream.metrics import TextQuality
from specstream.sampling import Sampling


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
    """Turns the measurements of one task under one law into rows; `pairs` are keyed by target."""

    task: str
    pairs: dict[str, Pair]
    quality: TextQuality
    sampling: Sampling
    limits: Limits
    machine: Machine
    questions: Sequence[Question]
    prompts: list[list[int]]
    entries: list[Entry]

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
            quality=self.scores(best, entry.target),
            quality_plain=self.scores(baseline, entry.baseline),
            agreement=agreement,
            identical_share=share,
            parameters=self._parameters(entry),
            repeated_4grams=repeated_share(best.tokens),
            machine=self.machine,
        )

    def scores(self, did: Measured, target: str) -> dict[str, float]:
        """Return the task metric of what was decoded."""
        processor = self.pairs[target].processor
        metric = self.quality.clone()
        metric.update(
            [processor.decode(tokens) for tokens in did.tokens],
            [question.references for question in self.questions],
        )
        return {name: float(value) for name, value in metric.compute().items()}

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
