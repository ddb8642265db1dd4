"""Tables of trained drafters: divergences, or kinds of drafters, at one number of steps.

Decoding only, nothing is timed: tau and the acceptances on held-out prompts, and the paired
difference to the baseline (for divergences the drafter trained on the data alone), seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specstream.benchmark.pair import Pair, Task
from specstream.benchmark.prompts import PromptSource, gather
from specstream.benchmark.rows import (
    DistillationRow,
    Machine,
    PairedDifference,
    Row,
    describe_machine,
)
from specstream.benchmark.speed_rows import describe
from specstream.benchmark.study import Study, say
from specstream.benchmark.timing import SAMPLES
from specstream.benchmark.trained_runs import Compared, TrainedRun, find_runs
from specstream.generation import FixedLength, Limits, SpeculativePipeline
from specstream.generation.loading import find_device
from specstream.sampling import Sampling
from specstream.structures import Stats

# 97.5 % points of Student's t, by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


@dataclass(frozen=True)
class Decoded:
    """What one drafter reached: the counts of all prompts, and full rounds prompt by prompt."""

    run: TrainedRun
    stats: Stats
    committed: NDArray[np.float64]  # (P,) tokens in full rounds
    rounds: NDArray[np.float64]  # (P,)

    @property
    def tau(self) -> float:
        """Tokens committed by a target pass."""
        return float(self.committed.sum() / self.rounds.sum())


@dataclass(frozen=True)
class DistillationStudy(Study):
    """Decodes held-out prompts with drafters that were trained differently, or are different.

    Args:
        name: what the table calls the task.
        target: folder of the target.
        runs: pattern of the run folders, such as checkpoints/divergences/*.
        prompts: held-out prompts.
        compared: what tells the runs apart besides their seeds: divergence or drafter.
        baseline: the divergence, or the drafter, that the others are compared with.
        num_prompts: held-out prompts.
        max_new_tokens: tokens a prompt, at most where the end of sequence counts.
        ignore_eos: write on after the end of sequence, so that all outputs have one length.
        drafted: tokens drafted in every round, or the height of a tree; None: each drafter's most.
        samplings: the laws that are decoded.
        batch_size: prompts decoded at once; changes nothing but the time.
        seed: of the draws.
        dtype, device, attn_implementation: of the models.
    """

    name: str
    target: str
    runs: str
    prompts: list[PromptSource]
    compared: Compared = "divergence"
    baseline: str = "CrossEntropy"
    num_prompts: int = 64
    max_new_tokens: int = 128
    ignore_eos: bool = True
    drafted: int | None = 5
    samplings: list[Sampling] = field(default_factory=lambda: [Sampling(), Sampling(temperature=0)])
    batch_size: int = 8
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "sdpa"

    @property
    def task(self) -> Task:
        """The target and its prompts."""
        return Task(self.name, self.target, self.prompts)

    def check(self) -> None:
        if not 1 <= (self.drafted or 1) < self.max_new_tokens:
            raise ValueError(f"drafted must lie in 1..{self.max_new_tokens - 1}")
        self.task.check()
        find_device(self.device)
        self.find_runs()

    def find_runs(self) -> list[TrainedRun]:
        """Return the runs, the baseline's first; ValueError where they cannot be compared."""
        runs = find_runs(self.runs, self.compared)
        if self.baseline not in {run.method for run in runs}:
            raise ValueError(
                f"no run of '{self.runs}' was trained with the baseline {self.baseline}; "
                f"there are {', '.join(sorted({run.method for run in runs}))}"
            )
        steps = {run.steps for run in runs}
        if len(steps) > 1:
            raise ValueError(
                f"the runs of '{self.runs}' were trained for different numbers of steps: "
                f"{', '.join(sorted(map(str, steps)))}"
            )
        others = sorted(Path(run.target).name for run in runs if not self._same_target(run))
        if others:
            raise ValueError(f"a run of '{self.runs}' has another target: '{others[0]}'")
        return sorted(runs, key=lambda run: (run.method != self.baseline, run.method, run.seed))

    def _same_target(self, run: TrainedRun) -> bool:
        return Path(run.target).resolve() == Path(self.target).resolve()

    def run(self, arguments: Sequence[str]) -> Iterator[list[Row]]:
        runs = self.find_runs()
        first = Pair(self.task, self.dtype, self.device, self.attn_implementation)
        prompts = gather(self.prompts, self.num_prompts, self.target, first.processor)
        machine = describe_machine(
            first.place, str(first.target.dtype).removeprefix("torch."), arguments
        )
        for sampling in self.samplings:
            baseline: list[Decoded] = []
            for method in dict.fromkeys(run.method for run in runs):
                found = [
                    self.decode(first, run, prompts, sampling)
                    for run in runs
                    if run.method == method
                ]
                baseline = baseline or found
                yield [self.row(found, baseline, sampling, machine)]

    def decode(
        self, pair: Pair, run: TrainedRun, prompts: list[list[int]], sampling: Sampling
    ) -> Decoded:
        """Decode all prompts with one run's drafter."""
        drafter = pair.load_drafter(run.draft)
        drafted = self.drafted or drafter.max_tokens
        pipeline = SpeculativePipeline(
            pair.target,
            drafter,
            pair.processor,
            lengths=FixedLength(drafted),
            sampling=sampling,
            limits=Limits(self.max_new_tokens, ignore_eos=self.ignore_eos),
            batch_size=self.batch_size,
        )
        written = [0] * len(prompts)
        committed, rounds = np.zeros(len(prompts)), np.zeros(len(prompts))
        for step in pipeline.generate(prompts, seed=self.seed):
            whole = written[step.prompt] + drafted + 1 <= self.max_new_tokens
            if whole and (self.ignore_eos or not step.finished):  # not cut short
                committed[step.prompt] += len(step.tokens)
                rounds[step.prompt] += 1
            written[step.prompt] += len(step.tokens)
        found = Decoded(run, pipeline.stats, committed, rounds)
        say(f"{run.method}, seed {run.seed}, {describe(sampling)}: tau {found.tau:.3f}")
        return found

    def row(
        self,
        found: Sequence[Decoded],
        baseline: Sequence[Decoded],
        sampling: Sampling,
        machine: Machine,
    ) -> DistillationRow:
        """Return the row of one divergence or drafter."""
        difference = paired_difference(found, baseline)
        tested, accepted = (
            np.sum([getattr(d.stats, name) for d in found], axis=0)
            for name in ("tested", "accepted")
        )
        return DistillationRow(
            task=self.name,
            method=found[0].run.method,
            baseline=self.baseline,
            sampling=describe(sampling),
            num_prompts=self.num_prompts,
            max_new_tokens=self.max_new_tokens,
            drafted=self.drafted,
            steps=found[0].run.steps,
            seeds=[d.run.seed for d in found],
            taus=[d.tau for d in found],
            tau=float(np.mean([d.tau for d in found])),
            alpha=float(accepted.sum() / tested.sum()),
            alphas=(accepted / np.maximum(tested, 1)).tolist(),
            difference=difference,
            machine=machine,
        )


def paired_difference(found: Sequence[Decoded], baseline: Sequence[Decoded]) -> PairedDifference:
    """Return tau minus the baseline's tau, over the seeds that both have."""
    others = {d.run.seed: d for d in baseline}
    pairs = [(d, others[d.run.seed]) for d in found if d.run.seed in others]
    if found is baseline or not pairs:
        return PairedDifference()
    differences = [one.tau - other.tau for one, other in pairs]
    mean = statistics.fmean(differences)
    relative = mean / statistics.fmean(other.tau for _, other in pairs)
    if len(pairs) == 1:
        return PairedDifference(1, mean, relative, over_prompts(*pairs[0]), "prompts")
    half = STUDENT[min(len(pairs) - 1, max(STUDENT))] * statistics.stdev(differences)
    half /= math.sqrt(len(pairs))
    return PairedDifference(len(pairs), mean, relative, (mean - half, mean + half), "seeds")


def over_prompts(one: Decoded, other: Decoded, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the difference of taus, prompts drawn in pairs."""
    size = len(one.rounds)
    draws = np.random.default_rng(seed).integers(size, size=(SAMPLES, size))

    def tau(d: Decoded) -> NDArray[np.float64]:
        return np.asarray(d.committed[draws].sum(1) / d.rounds[draws].sum(1))

    low, high = np.percentile(tau(one) - tau(other), [2.5, 97.5])
    return float(low), float(high)
