"""From the measurements of one setting to its rows: ratios, the bound, and agreement with plain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specstream.benchmark.methods import Method
from specstream.benchmark.outputs import compare_greedy, repeated_share
from specstream.benchmark.pair import Pair
from specstream.benchmark.rows import Agreement, Bound, Counts, Machine, SpeedRow, Speedups
from specstream.benchmark.runners import PipelineRunner
from specstream.benchmark.timing import Measured, median_costs, ratio_interval
from specstream.generation import Limits, SpeculativePipeline
from specstream.models.quantization import bytes_ratio
from specstream.sampling import Sampling


@dataclass(frozen=True)
class Result:
    """A method and what its variants did."""

    method: Method
    variants: list[Measured]

    @property
    def best(self) -> Measured:
        """The fastest variant, by the token."""
        return min(self.variants, key=lambda m: m.total / max(m.elements, 1))


@dataclass(frozen=True)
class RowMaker:
    """Turns the measurements of one setting into rows."""

    pair: Pair
    setting: str
    sampling: Sampling
    limits: Limits
    machine: Machine
    prompts: list[list[int]]
    results: list[Result]

    def reference(self, role: str, batch_size: int) -> Measured | None:
        """Return the best of a role at a batch size, None if it was not measured."""
        found = [
            result.best
            for result in self.results
            if result.method.role == role and result.method.batch_size == batch_size
        ]
        return min(found, key=lambda m: m.total) if found else None

    def row(self, result: Result) -> SpeedRow:
        """Return the row of one method."""
        method, best = result.method, result.best
        speedups = self._speedups(method, best)
        return SpeedRow(
            task=self.pair.task.name,
            setting=self.setting,
            method=method.label,
            role=method.role,
            variant=best.runner.variant,
            variants={m.runner.variant: m.total for m in result.variants},
            batch_size=method.batch_size,
            sampling=describe(self.sampling),
            num_prompts=len(self.prompts),
            prompt_tokens=float(np.mean([len(p) for p in self.prompts])),
            max_new_tokens=self.limits.max_new_tokens,
            repeats=len(best.seconds),
            elements=best.elements,
            seconds=best.total,
            tokens_per_second=best.elements / best.total,
            speedups=speedups,
            counts=counts(best),
            bound=bound(best, speedups.speedup_vs_plain),
            agreement=self._agreement(method, best),
            quality=None,
            repeated_4grams=repeated_share(best.tokens),
            machine=self.machine,
        )

    def _speedups(self, method: Method, best: Measured) -> Speedups:
        size = method.batch_size
        plain = self.reference("plain", size)
        assert plain is not None, "Setting asks for a plain method of each batch size"
        assisted = self.reference("transformers assisted", 1) if size == 1 else None
        return Speedups(
            speedup_vs_plain=ratio(plain, best),
            speedup_interval=None if best is plain else interval(plain, best),
            speedup_vs_hf=ratio(self.reference("transformers", size), best),
            speedup_vs_hf_assisted=ratio(assisted, best),
            speedup_vs_batch_1=ratio(self.reference("plain", 1), best) if size > 1 else None,
        )

    def _agreement(self, method: Method, best: Measured) -> Agreement:
        """Say how greedy outputs agree with the plain target's; drawn ones are not expected to."""
        plain = self.reference("plain", method.batch_size)
        if not self.sampling.greedy or plain is None or best is plain:
            return Agreement()
        return compare_greedy(
            self.pair.target,
            self.prompts,
            best.tokens,
            plain.tokens,
            self.sampling.repetition_penalty,
        )


def counts(best: Measured) -> Counts:
    """Return what the pipeline counted; a peer does not count."""
    stats = best.stats
    if stats is None:
        return Counts()
    return Counts(
        tau=stats.accepted_length,
        alpha=stats.acceptance,
        alphas=stats.alphas,
        mean_length=stats.mean_length,
        share_plain=stats.share_plain,
        target_calls=stats.target_calls,
        draft_calls=stats.draft_calls,
        guarantee=stats.guarantee.value,
        bytes_ratio=bytes_ratio(stats.quantized),
    )


def bound(best: Measured, speedup: float | None) -> Bound:
    """Return tau T(1) / (T(K+1) + K T_draft), with the times of this run, and what was reached.

    K is the mean over the rounds that drafted; rounds that did not cost T(1), and rounds in which
    every row copied cost no draft model.
    """
    stats = best.stats
    if not best.costs or stats is None or stats.accepted_length is None or speedup is None:
        return Bound()
    assert isinstance(best.runner, PipelineRunner)
    assert isinstance(best.runner.pipeline, SpeculativePipeline)
    costs = median_costs(best.costs)
    plain_rounds = stats.share_plain or 0.0
    drafted, verify, draft = 0.0, costs.plain, 0.0
    if plain_rounds < 1:
        choices = list(best.runner.pipeline.lengths.choices)
        drafted = (stats.mean_length or 0.0) / (1 - plain_rounds)
        verify = float(np.interp(drafted, choices, [costs.verify[k] for k in choices]))
        draft = float(np.interp(drafted, choices, [costs.draft[k] for k in choices]))
        draft *= best.share_model
    seconds = plain_rounds * costs.plain + (1 - plain_rounds) * (verify + draft)
    reachable = stats.accepted_length * costs.plain / seconds
    return Bound(
        drafted=drafted,
        t_plain=costs.plain,
        t_verify=verify,
        t_draft=draft,
        bound=reachable,
        efficiency=speedup / reachable,
        eta=speedup / stats.accepted_length,
    )


def ratio(slow: Measured | None, fast: Measured) -> float | None:
    """Return how many times faster by the token; None without the slower one."""
    if slow is None:
        return None
    return (slow.total / slow.elements) / (fast.total / fast.elements)


def interval(slow: Measured, fast: Measured) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of `ratio` over blocks of prompts."""
    scale = fast.elements / slow.elements
    low, high = ratio_interval(slow.block_seconds, fast.block_seconds)
    return low * scale, high * scale


def describe(sampling: Sampling) -> str:
    """Return a law in a few characters: `greedy`, `T=1`, `T=0.7 top_k=20`."""
    if sampling.greedy:
        return "greedy"
    parts = [f"T={sampling.temperature:g}"]
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        value = getattr(sampling, name)
        if value != getattr(Sampling(), name):
            parts.append(f"{name}={value:g}")
    return " ".join(parts)
