"""The plain target beside the pipeline: same prompt, seed and options, alternating timed runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from specstream.generation.autoregressive import AutoregressivePipeline
from specstream.generation.base import Prompt, TextPipeline
from specstream.generation.ties import first_difference, logit_gap
from specstream.structures import Stats

REPEATS = 3


@dataclass(frozen=True, slots=True)
class Run:
    """One decoding of a prompt."""

    tokens: list[int]
    stats: Stats


@dataclass(frozen=True, slots=True)
class Comparison:
    """What decoding cost with and without drafts; `seconds` are medians of three runs each.

    `speedup` is the ratio of medians, for each token where the two texts differ in length.
    `identical` is None where tokens are drawn at random; `difference` explains a False.
    """

    seconds: float
    baseline_seconds: float
    baseline_elements: int
    baseline_target_calls: int
    speedup: float
    identical: bool | None
    difference: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return the keys that `--compare` adds to `--stats`."""
        return {
            "baseline_seconds": self.baseline_seconds,
            "baseline_target_calls": self.baseline_target_calls,
            "speedup": self.speedup,
            "identical": self.identical,
        }


def decode(pipeline: TextPipeline, prompt: Prompt, seed: int) -> Run:
    """Decode one prompt silently."""
    tokens = [token for step in pipeline.generate([prompt], seed=seed) for token in step.tokens]
    return Run(tokens, replace(pipeline.stats))


def compare(pipeline: TextPipeline, first: Run, prompt: Prompt, seed: int) -> Comparison:
    """Time `pipeline` and the plain target on one prompt; `first` was the pipeline's warm-up."""
    plain = AutoregressivePipeline(
        pipeline.target,
        pipeline.processor,
        pipeline.sampling,
        pipeline.limits,
        pipeline.batch_size,
        pipeline.compiled,
        pipeline.chat,
    )
    baseline = decode(plain, prompt, seed)  # warm-up
    ours, theirs = [], []
    for _ in range(REPEATS):
        theirs.append(decode(plain, prompt, seed).stats.seconds)
        ours.append(decode(pipeline, prompt, seed).stats.seconds)
    seconds, baseline_seconds = statistics.median(ours), statistics.median(theirs)
    identical = first.tokens == baseline.tokens if pipeline.sampling.greedy else None
    ratio = baseline_seconds / seconds
    return Comparison(
        seconds=seconds,
        baseline_seconds=baseline_seconds,
        baseline_elements=baseline.stats.elements,
        baseline_target_calls=baseline.stats.target_calls,
        speedup=ratio * first.stats.elements / baseline.stats.elements,
        identical=identical,
        difference="" if identical in (True, None) else difference(plain, prompt, first, baseline),
    )


def difference(plain: TextPipeline, prompt: Prompt, ours: Run, theirs: Run) -> str:
    """Say where two greedy texts part, and whether the target held the two tokens for equal."""
    place = first_difference(ours.tokens, theirs.tokens)
    if place is None:
        return f"{len(ours.tokens)} tokens, the plain target {len(theirs.tokens)}"
    gap = logit_gap(
        plain.target,
        plain.processor.encode(prompt, plain.chat) + theirs.tokens[:place],
        ours.tokens[place],
        theirs.tokens[place],
        plain.sampling.repetition_penalty,
    )
    verdict = "a tie in rounding" if gap.is_tie else "more than rounding explains"
    return (
        f"from token {place + 1}, logit gap {gap.size:.3g}, tolerance {gap.tolerance:.3g}: "
        f"{verdict}"
    )
