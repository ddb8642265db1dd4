"""From the measurements of one task to its table of fillings: quality, costs, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specstream.benchmark.masked_judge import CausalJudge
from specstream.benchmark.masked_methods import (
    Filling,
    FillingRunner,
    MaskedMethod,
    PlainSampling,
)
from specstream.benchmark.masked_prompts import CanvasQuestion
from specstream.benchmark.pareto import Point, fewest_steps, lies_above
from specstream.benchmark.rows import (
    FillingCosts,
    Machine,
    MaskedRow,
    PlainComparison,
    SampleQuality,
)
from specstream.benchmark.speed_rows import describe
from specstream.benchmark.timing import Measured, ratio_interval
from specstream.metrics import DistinctN, JudgeNLL, Solved, TextQuality, TokenEntropy
from specstream.processors import TextProcessor
from specstream.structures import Stats


@dataclass(frozen=True)
class Filled:
    """What one method did, and how good that is."""

    method: MaskedMethod
    measured: Measured
    samples: SampleQuality
    costs: FillingCosts

    @property
    def is_plain(self) -> bool:
        """Whether it is the target alone."""
        return isinstance(self.method, PlainSampling)

    @property
    def score(self) -> float:
        """The number that decides, higher is better: the first of the task's, or the judge's."""
        if self.samples.quality:
            return next(iter(self.samples.quality.values()))
        assert self.samples.judge_nll is not None, "the study's check asks for one of them"
        return -self.samples.judge_nll

    @property
    def by_calls(self) -> Point:
        """Quality at its target calls."""
        return Point(self.costs.target_calls, self.score)

    @property
    def by_seconds(self) -> Point:
        """Quality at its seconds."""
        return Point(self.costs.seconds, self.score)


@dataclass(frozen=True)
class MaskedRowMaker:
    """Turns the measurements of one task under one law into rows."""

    task: str
    target: str
    processor: TextProcessor
    questions: Sequence[CanvasQuestion]
    quality: Solved | TextQuality | None
    judge: CausalJudge | None
    filling: Filling
    machine: Machine

    def rows(
        self, methods: Sequence[MaskedMethod], measured: Sequence[Measured]
    ) -> list[MaskedRow]:
        """Return a row for each method; the first plain one is the reference of all."""
        found = [
            Filled(method, did, self.samples(did), filling_costs(did, method.weighs_calls))
            for method, did in zip(methods, measured, strict=True)
        ]
        plain = [each for each in found if each.is_plain]
        best = plain[fewest_steps([each.by_calls for each in plain], reference=0)]
        return [self._row(each, plain, best) for each in found]

    def samples(self, did: Measured) -> SampleQuality:
        """Judge what was filled."""
        ends = self.processor.eos_ids
        rows = [[token for token in tokens if token not in ends] for tokens in did.tokens]
        texts = [self.processor.decode(tokens) for tokens in did.tokens]
        prompts = [question.text for question in self.questions]
        entropy, distinct = TokenEntropy(), DistinctN(2)
        entropy.update(rows)
        distinct.update(rows)
        judged: dict[str, float] = {}
        if self.judge is not None:
            surprise = JudgeNLL(self.judge)
            surprise.update(prompts, texts)
            judged = {name: float(value) for name, value in surprise.compute().items()}
        return SampleQuality(
            quality=self._scores(prompts, texts),
            judge_nll=judged.get("judge_nll"),
            judge_bits_per_character=judged.get("judge_bits_per_character"),
            entropy=float(entropy.compute()),
            distinct_2=float(distinct.compute()),
        )

    def _scores(self, prompts: list[str], texts: list[str]) -> dict[str, float]:
        """Return the task metric, by name."""
        if self.quality is None:
            return {}
        metric = self.quality.clone()
        if isinstance(metric, Solved):
            metric.update(prompts, texts)
        else:
            metric.update(texts, [question.references for question in self.questions])
        return {name: float(value) for name, value in metric.compute().items()}

    def _row(self, each: Filled, plain: Sequence[Filled], best: Filled) -> MaskedRow:
        stats = stats_of(each.measured)
        return MaskedRow(
            task=self.task,
            target=self.target,
            method=each.method.name,
            kind=each.method.kind,
            guarantee=stats.guarantee.value,
            sampling=describe(self.filling.sampling),
            batch_size=self.filling.batch_size,
            num_prompts=len(self.questions),
            prompt_tokens=float(np.mean([len(q.tokens) for q in self.questions])),
            max_new_tokens=self.filling.limits.max_new_tokens,
            repeats=len(each.measured.seconds),
            samples=each.samples,
            costs=each.costs,
            comparison=self._comparison(each, plain, best),
            acceptance=stats.acceptance,
            mean_drafted=stats.mean_length or None,  # 0: not counted, or nothing was drafted
            machine=self.machine,
        )

    def _comparison(self, each: Filled, plain: Sequence[Filled], best: Filled) -> PlainComparison:
        reference = plain[0]
        above = above_seconds = None
        if not each.is_plain:
            above = lies_above(each.by_calls, [other.by_calls for other in plain])
            above_seconds = lies_above(each.by_seconds, [other.by_seconds for other in plain])
        outputs = zip(each.measured.tokens, reference.measured.tokens, strict=True)
        same = [ours == theirs for ours, theirs in outputs]
        return PlainComparison(
            reference=reference.method.name,
            call_ratio=call_ratio(reference, each),
            speedup=reference.costs.seconds / each.costs.seconds,
            speedup_interval=speedup_interval(reference, each),
            best_plain=each is best,
            best_plain_method=best.method.name,
            call_ratio_vs_best=call_ratio(best, each),
            speedup_vs_best=best.costs.seconds / each.costs.seconds,
            speedup_vs_best_interval=speedup_interval(best, each),
            above_plain=above,
            above_plain_seconds=above_seconds,
            identical_share=sum(same) / len(same) if self.filling.sampling.greedy else None,
        )


def filling_costs(did: Measured, weighs_calls: bool) -> FillingCosts:
    """Return what a canvas took, from the counts of the first repeat and the medians of all."""
    assert isinstance(did.runner, FillingRunner)
    stats, num_batches = stats_of(did), len(did.block_seconds)
    prompts = np.full(num_batches, stats.prompts / num_batches)
    full_passes = did.runner.full_passes / stats.prompts
    return FillingCosts(
        target_calls=full_passes if weighs_calls else stats.target_calls / num_batches,
        full_passes=full_passes,
        draft_calls=stats.draft_calls / num_batches,
        seconds=did.total / stats.prompts,
        seconds_interval=ratio_interval(did.block_seconds, prompts),
    )


def stats_of(did: Measured) -> Stats:
    """Return what a pipeline counted."""
    assert did.stats is not None, "our own pipelines count"
    return did.stats


def call_ratio(slow: Filled, fast: Filled) -> float | None:
    """Return how many times fewer target calls; None where there is none."""
    calls = fast.costs.target_calls
    return slow.costs.target_calls / calls if calls else None


def speedup_interval(slow: Filled, fast: Filled) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the ratio of seconds over batches of prompts."""
    return ratio_interval(slow.measured.block_seconds, fast.measured.block_seconds)
