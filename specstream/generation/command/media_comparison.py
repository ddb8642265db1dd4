"""Samples of a diffusion model beside the plain target's: from the same noise, in alternating runs.

What promises no law is held beside the target with as many steps as it took rounds, of the same
solver and of a better one, and all of them beside the solution in all steps.

Shapes: B samples, S the shape of a state.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from specstream.generation.accept_by_error import AcceptByErrorPipeline
from specstream.generation.command.comparison import REPEATS
from specstream.generation.consistency import ConsistencyPipeline
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.media_given import Asked
from specstream.generation.picard import PicardPipeline
from specstream.generation.refinement import RefinementPipeline
from specstream.generation.solvers import AdamsBashforth2, SolverPipeline
from specstream.generation.step_caching import StepCachePipeline
from specstream.metrics.media import psnr
from specstream.structures import Guarantee, Stats

BETTER = "adams-bashforth"  # the solver that is always shown, by its name on the command line
NAMES = {
    RefinementPipeline: "refined",
    StepCachePipeline: "cached",
    ConsistencyPipeline: "student",
}


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one way of sampling gave.

    `seconds` are a median where it was repeated; `psnr` is the distance in dB of its media from
    those of the row that is `solution`, None where they are not samples of one equation.
    """

    name: str
    samples: Tensor  # (B, *S)
    stats: Stats
    seconds: float
    psnr: float | None = None
    solution: str = ""


def is_plain(pipeline: DenoisingSampler) -> bool:
    """Whether every round of a sampler is one step of the target's own."""
    undrafted = isinstance(pipeline, DenoisingPipeline) and pipeline.drafter is None
    return undrafted or isinstance(pipeline, SolverPipeline)


def is_approximate(pipeline: DenoisingSampler) -> bool:
    """Whether samples are to be judged beside the plain target's with fewer steps."""
    return pipeline.guarantee in (Guarantee.BOUNDED_ERROR, Guarantee.HEURISTIC)


def compare(
    pipeline: DenoisingSampler,
    asked: Asked,
    num_samples: int,
    num_steps: int,
    seed: int,
    media: Callable[[Tensor], Tensor],
    repeats: int = REPEATS,
) -> list[Sampled]:
    """Sample in all ways in turns, by a pipeline that has just sampled: it is the first row.

    The second is the plain target.

    num_steps: of the plain target in all steps.  media: makes states (B, *S) media.
    """

    def sampled(way: DenoisingSampler) -> Tensor:
        return way.complete(num_samples, asked.condition, seed=seed, known=asked.known)

    ways, solution = ways_beside(pipeline, num_samples, num_steps)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name] = sampled(way)
            seconds[name].append(way.stats.seconds)
    right = media(found[solution]) if solution else None
    return [
        Sampled(
            name,
            found[name],
            way.stats,
            statistics.median(seconds[name]),
            None if right is None else psnr(media(found[name]), right),
            solution,
        )
        for name, way in ways.items()
    ]


def ways_beside(
    pipeline: DenoisingSampler, num_samples: int, num_steps: int
) -> tuple[dict[str, DenoisingSampler], str]:
    """Return the pipeline, which has just sampled, and what it is to be held beside, by name.

    And the name of what all of them try to solve; "" where each draws samples of its own.
    """
    calls = pipeline.stats.target_calls
    if isinstance(pipeline, ConsistencyPipeline):
        calls, num_steps = pipeline.stats.draft_calls, pipeline.student.num_steps
    rounds = max(1, round(calls / max(1, -(-num_samples // pipeline.batch_size))))
    target, guidance, size = pipeline.target, pipeline.guidance, pipeline.batch_size
    ways: dict[str, DenoisingSampler] = {NAMES.get(type(pipeline), "drafted"): pipeline}
    for number in (num_steps, rounds):
        plain = DenoisingPipeline(target, number, pipeline.eta, guidance, batch_size=size)
        ways[f"plain, {number} steps"] = plain
    if pipeline.eta or not is_approximate(pipeline):
        return ways, ""
    better = AdamsBashforth2()
    numbers, solution = [rounds], f"plain, {num_steps} steps"
    if isinstance(pipeline, AcceptByErrorPipeline | PicardPipeline) and pipeline.solver == better:
        numbers, solution = [rounds, num_steps], f"{BETTER}, {num_steps} steps"
    for number in numbers:
        solver = SolverPipeline(target, number, better, guidance, size)
        ways[f"{BETTER}, {number} steps"] = solver
    return ways, solution


def comparison_report(rows: list[Sampled]) -> list[str]:
    """Return a line for each way of sampling, and what they are to one another."""
    ours = rows[0]
    width = max(len(row.name) for row in rows) + 2
    heads = f"{'rounds':>8}{'rows':>8}{'seconds':>10}"
    lines = [f"{'':<{width}}{heads}{'dB':>8}" if ours.solution else f"{'':<{width}}{heads}"]
    for row in rows:
        stats = row.stats
        rounds = stats.target_calls or stats.draft_calls  # of a student, which is asked alone
        near = "" if row.psnr is None or math.isinf(row.psnr) else f"{row.psnr:>8.1f}"
        counts = f"{rounds:>8}{stats.target_rows:>8}{row.seconds:>10.3f}"
        lines.append(f"{row.name:<{width}}{counts}{near}")
    if ours.solution:
        lines.append(f"dB: how near the same noise comes to {ours.solution} (PSNR)")
    if ours.stats.guarantee is Guarantee.HEURISTIC:
        lines.append(
            f"{ours.name} samples have no law that is promised: judge them by what they are"
        )
    elif ours.stats.guarantee is Guarantee.EXACT_LAW:
        lines.append(
            "the drafted samples have the law of the plain ones with as many steps; each run draws "
            "its own"
        )
    return lines


def comparison_facts(rows: list[Sampled]) -> dict[str, object]:
    """Return the keys that a comparison adds to `--stats`."""
    if not rows:
        return {}
    ours, plain = rows[:2]
    facts: dict[str, object] = {
        "baseline_seconds": plain.seconds,
        "baseline_target_calls": plain.stats.target_calls,
        "speedup": plain.seconds / ours.seconds,
        "identical": None,
    }
    if is_judged(rows):
        facts["compared"] = [
            {
                "name": row.name,
                "target_calls": row.stats.target_calls,
                "seconds": row.seconds,
                "psnr": None if row.psnr is None or math.isinf(row.psnr) else row.psnr,
            }
            for row in rows
        ]
    return facts


def is_judged(rows: list[Sampled]) -> bool:
    """Whether the first row promises no law, so that the others say what it is worth."""
    return rows[0].stats.guarantee is not Guarantee.EXACT_LAW
