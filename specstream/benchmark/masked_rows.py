"""From the measurements of one task to its table of fillings: quality, costs, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from specstream.benchmark.masked_judge import CausalJudge
from specstream.benchmark.masked_methods import (
    Filling,
    FillingRunner,
    MaskedMethod,
    PlainSampling,
    SelfSpeculative,
)
from specstream.benchmark.masked_prompts import CanvasQuestion
from specstream.benchmark.masked_scores import Judged, matched
from specstream.benchmark.paired_scores import Scores, Verdict, difference, text_scores
from specstream.benchmark.pareto import Point, fewest_steps, lies_above, on_curve
from specstream.benchmark.rows import (
    FillingCosts,
    Machine,
    MaskedRow,
    MatchedQuality,
    PlainComparison,
    SampleQuality,
)
from specstream.benchmark.speed_rows import describe
from specstream.benchmark.timing import Measured, ratio_interval
from specstream.metrics import DistinctN, JudgeNLL, Solved, TextQuality, TokenEntropy
from specstream.processors import TextProcessor
from specstream.structures import Stats
from specstream.unmasking import StaticSchedule


@dataclass(frozen=True)
class Filled:
    """What one method did, and how good that is."""

    method: MaskedMethod
    measured: Measured
    samples: SampleQuality
    scores: Scores
    costs: FillingCosts

    @property
    def is_plain(self) -> bool:
        """Whether it is the target alone."""
        return isinstance(self.method, PlainSampling)

    @property
    def is_random(self) -> bool:
        """Whether it is the target alone, on a schedule in random order."""
        rule = self.method.unmasking if isinstance(self.method, PlainSampling) else None
        return isinstance(rule, StaticSchedule) and rule.order == "random"

    @property
    def score(self) -> float:
        """The number that decides, higher is better: the first of the task's, or the judge's."""
        return self.scores.mean

    @property
    def judged(self) -> Judged:
        """What it costs and what the judge says."""
        assert self.samples.judge_nll is not None
        return Judged(self.costs.full_passes, self.samples.judge_nll, self.samples.entropy)

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
            Filled(method, did, *self.samples(did), filling_costs(did, method.weighs_calls))
            for method, did in zip(methods, measured, strict=True)
        ]
        plain = [each for each in found if each.is_plain]
        best = plain[fewest_steps([each.by_calls for each in plain], reference=0)]
        return [self._row(each, plain, best) for each in found]

    def samples(self, did: Measured) -> tuple[SampleQuality, Scores]:
        """Judge what was filled, all of it and prompt by prompt."""
        ends = self.processor.eos_ids
        rows = [[token for token in tokens if token not in ends] for tokens in did.tokens]
        texts = [self.processor.decode(tokens) for tokens in did.tokens]
        prompts = [question.text for question in self.questions]
        entropy, distinct = TokenEntropy(), DistinctN(2)
        entropy.update(rows)
        distinct.update(rows)
        found, judged = self._scores(prompts, texts), {}
        decides = None if found is None else Scores(found[:, 0], np.ones(len(texts)))
        if self.judge is not None:
            said = [self.judge(*pair) for pair in zip(prompts, texts, strict=True)]
            if not any(len(each) for each in said):
                raise ValueError(
                    f"task '{self.task}': a method left every text empty, so that the judge has "
                    "nothing to read; ask for more prompts or longer texts"
                )
            surprise = JudgeNLL(told_again(said))
            surprise.update(prompts, texts)
            judged = {name: float(value) for name, value in surprise.compute().items()}
            if decides is None:
                sums = np.array([float(each.double().sum()) for each in said])
                decides = Scores(sums, np.array([float(len(each)) for each in said]))
        assert decides is not None, "the study's check asks for a quality or a judge"
        names = () if self.quality is None else self.quality.names
        means = () if found is None else found.mean(0).tolist()
        quality = SampleQuality(
            quality=dict(zip(names, means, strict=True)),
            judge_nll=judged.get("judge_nll"),
            judge_bits_per_character=judged.get("judge_bits_per_character"),
            entropy=float(entropy.compute()),
            distinct_2=float(distinct.compute()),
        )
        return quality, decides

    def _scores(self, prompts: list[str], texts: list[str]) -> NDArray[np.float64] | None:
        """Return the task's scores of each prompt, (N, names)."""
        metric = self.quality
        if metric is None:
            return None
        if isinstance(metric, Solved):
            pairs = zip(prompts, texts, strict=True)
            return np.array([[float(metric.checker(prompt, text))] for prompt, text in pairs])
        return text_scores(metric, texts, [question.references for question in self.questions])

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
            matched=self._matched(each, plain),
            acceptance=stats.acceptance,
            mean_drafted=stats.mean_length or None,  # 0: not counted, or nothing was drafted
            machine=self.machine,
        )

    def _comparison(self, each: Filled, plain: Sequence[Filled], best: Filled) -> PlainComparison:
        reference = plain[0]
        above, above_seconds = (Above(None), Above(None))
        if not each.is_plain:
            above = lies_surely_above(each, plain, lambda filled: filled.by_calls)
            above_seconds = lies_surely_above(each, plain, lambda filled: filled.by_seconds)
        gap = None if each is reference else difference(each.scores, [(reference.scores, 1.0)])
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
            above_plain=above.verdict,
            above_plain_seconds=above_seconds.verdict,
            identical_share=sum(same) / len(same) if self.filling.sampling.greedy else None,
            quality_difference=None if gap is None else gap.mean,
            quality_interval=None if gap is None else gap.interval,
            above_plain_interval=above.interval,
            above_plain_seconds_interval=above_seconds.interval,
        )

    def _matched(self, each: Filled, plain: Sequence[Filled]) -> MatchedQuality:
        """Compare self-speculation with plain sampling in random order, where a judge decides."""
        random = [other.judged for other in plain if other.is_random] if self.judge else []
        if self.quality is not None or not random or not isinstance(each.method, SelfSpeculative):
            return MatchedQuality()
        return matched(each.judged, random)


@dataclass(frozen=True, slots=True)
class Above:
    """Whether a method lies above the curve of plain sampling, and by how much at least."""

    verdict: Verdict
    interval: tuple[float, float] | None = None


def lies_surely_above(
    each: Filled, plain: Sequence[Filled], place: Callable[[Filled], Point]
) -> Above:
    """Say whether `each` lies above the curve of the plain ones, if prompts can tell."""
    points = {place(other): other.scores for other in reversed(plain)}  # of equals the first
    here = place(each)
    if lies_above(here, list(points)) is None:
        return Above(None)
    curve = on_curve(here.cost, list(points))
    found = difference(each.scores, [(points[point], share) for point, share in curve])
    return Above(found.is_above, found.interval)


def told_again(said: Sequence[Tensor]) -> Callable[[str, str], Tensor]:
    """Return a judge that says again, in this order, what it has said before."""
    words = iter(said)
    return lambda prompt, text: next(words)


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
