"""What can be said of the decoded tokens: do they repeat themselves, are they the target's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specstream.benchmark.rows import Agreement
from specstream.models import PretrainedLM
from specstream.models.cache import bucket

TIE_STEPS = 4  # rounding steps of the dtype, at the size of the best logit, within which two tie


def repeated_share(rows: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Return the share of n-grams that occurred before in the same output; None without any."""
    total = distinct = 0
    for row in rows:
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else None


def compare_greedy(
    target: PretrainedLM,
    prompts: Sequence[list[int]],
    ours: Sequence[list[int]],
    plain: Sequence[list[int]],
) -> Agreement:
    """Compare greedy outputs with the plain target's, prompt by prompt."""
    ties = differences = 0
    largest, smallest = 0.0, float("inf")
    for prompt, a, b in zip(prompts, ours, plain, strict=True):
        if a == b:
            continue
        place = next((i for i, pair in enumerate(zip(a, b, strict=False)) if len({*pair}) > 1), -1)
        if place < 0:  # one text is the beginning of the other: no rounding explains that
            differences += 1
            continue
        gap, tolerance = logit_gap(target, prompt + b[:place], a[place], b[place])
        ties += gap <= tolerance
        differences += gap > tolerance
        largest, smallest = max(largest, gap), min(smallest, tolerance)
    tolerance = smallest if smallest < float("inf") else 0.0
    return Agreement(ties + differences == 0, ties, differences, largest, tolerance)


@torch.inference_mode()
def logit_gap(target: PretrainedLM, before: list[int], one: int, other: int) -> tuple[float, float]:
    """Return how far apart two tokens' logits are after `before`, and the tolerance for a tie."""
    tokens = torch.tensor([before], device=target.device)
    capacity = bucket(len(before), len(before) + 10**9)
    cache = target.new_cache(1, capacity)
    zero = torch.zeros(1, dtype=torch.long, device=tokens.device)
    logits = target.extend(tokens, zero, cache, capacity, num_logits=1)[0, -1].float()  # (V,)
    step = torch.finfo(target.dtype).eps * float(logits.abs().max())
    return abs(float(logits[one] - logits[other])), TIE_STEPS * step
