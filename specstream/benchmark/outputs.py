"""What can be said of the decoded tokens: do they repeat themselves, are they the target's own."""

from __future__ import annotations

from collections.abc import Sequence

from specstream.benchmark.rows import Agreement
from specstream.generation.ties import first_difference, logit_gap
from specstream.models import PretrainedLM


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
    repetition_penalty: float = 1.0,
) -> Agreement:
    """Compare greedy outputs with the plain target's, prompt by prompt."""
    ties = differences = 0
    largest, smallest = 0.0, float("inf")
    for prompt, a, b in zip(prompts, ours, plain, strict=True):
        if a == b:
            continue
        place = first_difference(a, b)
        if place is None:  # one text is the beginning of the other: no rounding explains that
            differences += 1
            continue
        before = prompt + b[:place]
        gap = logit_gap(target, before, a[place], b[place], repetition_penalty)
        ties += gap.is_tie
        differences += not gap.is_tie
        largest, smallest = max(largest, gap.size), min(smallest, gap.tolerance)
    tolerance = smallest if smallest < float("inf") else 0.0
    return Agreement(ties + differences == 0, ties, differences, largest, tolerance)
