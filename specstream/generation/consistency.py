"""Sampling with a student of few steps: a guess at the end, noise again, a better guess.

Multistep consistency sampling (Song et al. 2023, algorithm 1).  The target is not asked, so there
is nothing to promise of its law.  What is given of a sample takes its place in every guess (their
algorithm 4).

Shapes: R rows, S the shape of a state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import FixedLength
from specstream.models.consistency import ConsistencyModel
from specstream.models.denoiser import Denoiser
from specstream.sampling import Noise, Role
from specstream.structures import Guarantee, StateContext
from specstream.transitions import wide


class ConsistencyPipeline(DenoisingSampler):
    """Draws samples with a student alone; its calls are counted as those of a draft.

    Args:
        target: the diffusion model that the student was distilled from, which is not called.
        student: the consistency model.
        num_steps: calls for a sample, 1 to 4 as a rule.
        batch_size: samples drawn together; the result does not depend on it.
    """

    def __init__(
        self, target: Denoiser, student: ConsistencyModel, num_steps: int = 4, batch_size: int = 16
    ) -> None:
        self.student = student
        few = student.few(num_steps)  # what it refuses is refused here
        super().__init__(target, num_steps, 0.0, student.guidance, FixedLength(0), batch_size)
        self.grid = few.to(target.device)

    @property
    def models(self) -> dict[str, nn.Module]:
        return {"drafter": self.student}

    @property
    def guarantee(self) -> Guarantee:
        """HEURISTIC: a student comes as near to the target's samples as its training came."""
        return Guarantee.HEURISTIC

    @property
    def law(self) -> str:
        guided = "" if self.guidance == 1 else f" with guidance {self.guidance:g}"
        return f"the target's{guided}"

    def _round(
        self, context: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> Tensor:
        part, grid = context.rows(index), self.grid
        said = self.student(part.states, part.steps, grid, part.condition)
        said = said if part.known is None else part.known.hold(said)
        self.stats.draft_calls += 1
        normals = noise.normal(part.samples, part.steps, said.shape[1:], Role.DRAFT).to(said)
        alphas, sigmas = grid.alphas[part.steps + 1], grid.sigmas[part.steps + 1]
        context.states[index] = wide(alphas, said) * said + wide(sigmas, said) * normals
        context.estimates[index] = said
        context.steps[index] += 1
        return torch.zeros_like(part.steps)
