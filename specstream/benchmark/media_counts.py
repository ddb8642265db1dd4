"""What drawing a sample took: calls of the target one after another, passes of a drafter."""

from __future__ import annotations

from specstream.drafters import FirstBlockDenoiser, StateDrafter
from specstream.generation.consistency import ConsistencyPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.refinement import RefinementPipeline
from specstream.generation.step_caching import StepCachePipeline


def target_rounds(pipeline: DenoisingSampler) -> float:
    """Return the calls of the target, one after another, of a sample of the last run."""
    stats = pipeline.stats
    if isinstance(pipeline, ConsistencyPipeline):
        return 0.0  # a student does not ask it
    if isinstance(pipeline, RefinementPipeline):  # a call sees one state of a sample, guided twice
        return stats.target_rows / (1 if pipeline.guidance == 1 else 2) / stats.prompts
    return stats.full_rounds / stats.prompts


def draft_passes(pipeline: DenoisingSampler) -> float:
    """Return the passes of a drafter's network, one after another, of a sample of the last run.

    A pass is made for each drafted step, or for a whole window; free drafts need none, but for
    those of the target's first block, whose passes count.  A student that samples alone makes one a
    step, and a step cache one for each step that it tries to skip.
    """
    if isinstance(pipeline, ConsistencyPipeline):
        return float(pipeline.grid.num_steps)
    if isinstance(pipeline, RefinementPipeline):
        return float(pipeline.rough.grid.num_steps if pipeline.drafter is not None else 0)
    stats, drafter = pipeline.stats, getattr(pipeline, "drafter", None)
    if isinstance(pipeline, StepCachePipeline):
        return sum(stats.tested) / stats.prompts
    if not isinstance(drafter, StateDrafter):
        return 0.0
    if not list(drafter.parameters()) and not isinstance(drafter, FirstBlockDenoiser):
        return 0.0
    rounds = stats.full_rounds - stats.plain_rounds
    return (stats.draft_lengths if drafter.calls_a_step else rounds) / stats.prompts
