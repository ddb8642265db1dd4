"""Alternating runs: every decoder meets every block of prompts in turn, and medians count.

What happens to the machine meanwhile happens to all of them alike.  A block is decoded by all
decoders, in an order that rotates, before the next one; the clock covers all that `run` does,
prompt processing included, and on a GPU it waits for the device on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from specstream.benchmark.runners import Runner
from specstream.generation import StepCosts
from specstream.structures import Stats

SAMPLES = 2000  # of the bootstrap


@dataclass
class Measured:
    """What one decoder did: R repeats over N blocks of prompts."""

    runner: Runner
    seconds: NDArray[np.float64]  # (R, N), NaN where interrupted
    tokens: list[list[int]]  # of each prompt, first repeat
    stats: Stats | None = None  # first repeat
    costs: list[StepCosts] = field(default_factory=list)  # one table before and after each repeat
    share_model: float = 1.0

    @property
    def block_seconds(self) -> NDArray[np.float64]:
        """Median over the repeats, (N,)."""
        return np.median(self.seconds, axis=0)

    @property
    def total(self) -> float:
        """Seconds for all prompts: the sum of the blocks' medians."""
        return float(self.block_seconds.sum())

    @property
    def elements(self) -> int:
        """Tokens decoded in one repeat."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True)
class Plan:
    """How often what is decoded, and on which device."""

    prompts: list[list[int]]
    blocks: list[list[int]]  # numbers of the prompts in each
    repeats: int
    warmups: int  # blocks decoded by everyone before anything is timed
    seed: int
    device: str


def alternate(
    runners: Sequence[Runner], plan: Plan, advance: Callable[[], None] = lambda: None
) -> tuple[list[Measured], bool]:
    """Time `runners` on the plan's blocks; returns what was measured and whether all of it was.

    After Ctrl-C the repeats that were complete are returned; with none, KeyboardInterrupt passes.
    `advance` is called after each block.
    """
    shape = (plan.repeats, len(plan.blocks))
    found = [Measured(r, np.full(shape, np.nan), [[] for _ in plan.prompts]) for r in runners]
    warm_up(found, plan)
    complete = 0
    try:
        for repeat in range(plan.repeats):
            for number in range(len(plan.blocks)):
                for measured in _rotated(found, repeat + number):
                    _time_block(measured, plan, repeat, number)
                advance()
            for measured in found:
                _measure_costs(measured)
            complete += 1
    except KeyboardInterrupt:
        if not complete:
            raise
    for measured in found:
        measured.seconds = measured.seconds[:complete]
    return found, complete == plan.repeats


def warm_up(found: Sequence[Measured], plan: Plan) -> None:
    """Measure costs and decode blocks of all lengths, longest first, so that shapes were met."""
    longest = sorted(
        range(len(plan.blocks)),
        key=lambda n: -max(len(plan.prompts[i]) for i in plan.blocks[n]),
    )
    gaps = max(plan.warmups - 1, 1)
    chosen = [longest[i * (len(longest) - 1) // gaps] for i in range(plan.warmups)]
    for measured in found:
        _measure_costs(measured)
        for number in dict.fromkeys(chosen):
            indices = plan.blocks[number]
            measured.runner.warm([plan.prompts[i] for i in indices], indices, plan.seed)
        measured.runner.restart_counts()


def _time_block(measured: Measured, plan: Plan, repeat: int, number: int) -> None:
    indices = plan.blocks[number]
    prompts = [plan.prompts[i] for i in indices]
    synchronize(plan.device)
    started = time.perf_counter()
    tokens = measured.runner.run(prompts, indices, plan.seed)
    synchronize(plan.device)
    measured.seconds[repeat, number] = time.perf_counter() - started
    if repeat:
        return
    for index, row in zip(indices, tokens, strict=True):
        measured.tokens[index] = row
    measured.stats = add_stats(measured.stats, measured.runner.take_stats())
    measured.share_model = measured.runner.share_model()


def _measure_costs(measured: Measured) -> None:
    costs = measured.runner.measure()
    if costs is not None:
        measured.costs.append(costs)


def _rotated(found: Sequence[Measured], by: int) -> list[Measured]:
    first = by % len(found)
    return [*found[first:], *found[:first]]


def add_stats(one: Stats | None, two: Stats | None) -> Stats | None:
    """Return the counts of both."""
    if one is None or two is None:
        return two if one is None else one
    for name in (
        "prompts",
        "elements",
        "target_calls",
        "target_rows",
        "draft_calls",
        "seconds",
        "full_rounds",
        "full_committed",
        "plain_rounds",
        "draft_lengths",
    ):
        setattr(one, name, getattr(one, name) + getattr(two, name))
    for name in ("tested", "accepted"):
        longer, shorter = sorted((getattr(one, name), getattr(two, name)), key=len, reverse=True)
        padded = [*shorter, *[0] * (len(longer) - len(shorter))]
        setattr(one, name, [a + b for a, b in zip(longer, padded, strict=True)])
    return one


def median_costs(tables: Sequence[StepCosts]) -> StepCosts:
    """Return the table of medians."""
    verify = np.median([t.verify for t in tables], axis=0)
    draft = np.median([t.draft for t in tables], axis=0)
    return StepCosts(float(np.median([t.plain for t in tables])), tuple(verify), tuple(draft))


def ratio_interval(
    above: NDArray[np.float64], below: NDArray[np.float64], seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of sum(above) / sum(below), blocks drawn in pairs."""
    draws = np.random.default_rng(seed).integers(len(above), size=(SAMPLES, len(above)))
    ratios = above[draws].sum(1) / below[draws].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
