"""Drafts of the target itself by its first block alone, with what its other blocks added last.

A feature cache is published as an approximation: steps are skipped, and what is lost is not looked
at.  As a drafter it loses nothing, as the target judges every step.  What the later blocks add is
kept of the state that the target saw last, row by row (`models.first_block`).

Shapes: R rows, S the shape of a state.
"""

from __future__ import annotations

from torch import Tensor

from specstream.drafters.denoising import StateDrafter
from specstream.models.denoiser import Denoiser, Reads
from specstream.structures import StateContext
from specstream.transitions import StepGrid


class FirstBlockDenoiser(StateDrafter):
    """The target's first block, then what the rest of it added where it spoke last.

    No weights of its own: a drafted step costs a call of one block and of the target's ends.
    Raises ValueError for a target that cannot be run so.
    """

    calls_a_step = True
    reads = Reads.REST

    def __init__(self, target: Denoiser, guidance: float = 1.0) -> None:
        super().__init__()
        target.first_block  # noqa: B018 refused here rather than in the first round
        self._evaluate = target.evaluate  # not a part of this module: its weights are not its own
        self.guidance = guidance

    def check(self, target: Denoiser, guidance: float) -> None:
        if self._evaluate != target.evaluate:
            raise ValueError(
                "first-block: the drafter must be made of the target that it drafts for"
            )
        if self.guidance != guidance:
            raise ValueError(
                f"first-block: drafts of guidance {self.guidance:g} cannot go on from what a "
                f"target says with guidance {guidance:g}"
            )

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        assert context.features is not None, "drafts begin after the target's first word"
        told = (context.condition, self.guidance, self.reads, context.features)
        return self._evaluate(states, steps, grid, *told).estimates
