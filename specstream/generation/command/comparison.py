"""The plain target beside the pipeline: same prompt, seed and options, alternating timed runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch

from specstream.generation.autoregressive import AutoregressivePipeline
from specstream.generation.base import Prompt, TextPipeline
from specstream.models.cache import bucket
from specstream.sampling import Sampling, probabilities
from specstream.structures import Stats

REPEATS = 3
TIE_STEPS = 4  # rounding steps of the dtype, at the size of the best logit, within which two tie


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


@torch.inference_mode()
def difference(plain: TextPipeline, prompt: Prompt, ours: Run, theirs: Run) -> str:
    """Say where two greedy texts part, and whether the target held the two tokens for equal.

    The target's passes over one token and over several round differently; where its two best
    logits lie within the rounding of their dtype, either is its greedy choice.
    """
    pairs = zip(ours.tokens, theirs.tokens, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return f"{len(ours.tokens)} tokens, the plain target {len(theirs.tokens)}"
    before = plain.processor.encode(prompt, plain.chat) + theirs.tokens[:place]
    tokens = torch.tensor([before], device=plain.target.device)
    capacity = bucket(len(before), len(before) + 10**9)
    cache = plain.target.new_cache(1, capacity)
    zero = torch.zeros(1, dtype=torch.long, device=tokens.device)
    logits = plain.target.extend(tokens, zero, cache, capacity, num_logits=1)[0, -1].float()  # (V,)
    penalty = Sampling(repetition_penalty=plain.sampling.repetition_penalty)
    seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, tokens[0], True)
    law = probabilities(logits.double(), penalty, seen).log()
    gap = abs(float(law[theirs.tokens[place]] - law[ours.tokens[place]]))
    tolerance = TIE_STEPS * torch.finfo(plain.target.dtype).eps * float(logits.abs().max())
    verdict = "a tie in rounding" if gap <= tolerance else "more than rounding explains"
    return f"from token {place + 1}, logit gap {gap:.3g}, tolerance {tolerance:.3g}: {verdict}"
