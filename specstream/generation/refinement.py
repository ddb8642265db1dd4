"""Selective refinement: a cheap draft, of which the target does again only the parts that look bad.

Hackaton-DMX (2025) drafted a video, scored its frames and had a larger model draw the bad ones
anew, each alone and from another seed.  Here they are refined indeed: the draft is noised
(SDEdit, Meng et al. 2022) and the target denoises the parts that fail beside the parts that are
kept, which are to it what is given of a sample (see `denoising_sampler`).  The kept parts of a
sample are its draft's to the last bit.  No law is preserved: HEURISTIC, always.

Shapes: B rows, S the shape of a state, A its axes, G the grid of its parts, N steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import FixedLength
from specstream.generation.refinement_scores import (
    Parts,
    QualityScore,
    TargetDisagreement,
    usual_parts,
)
from specstream.models.denoiser import Denoiser
from specstream.sampling import Noise, Role
from specstream.structures import Guarantee, KnownParts, StateContext, StateStep
from specstream.transitions import noised, place_known, transition
from specstream.verification.quality import AdaptiveThreshold


class RefinementPipeline(DenoisingSampler):
    """Drafts media in few steps and has the target refine the parts of them that score badly.

    With strength 1 and every part refined a sample is the plain sampler's own (eta 0).

    Args:
        target: the diffusion model that refines.
        drafter: a smaller one that drafts; None: the target drafts for itself.
        draft_steps: denoising steps of the draft.
        main_steps: N; the target does the last `strength` of them.
        score: how bad a part is; TargetDisagreement unless said.
        threshold: which parts are refined, by their scores; AdaptiveThreshold unless said.
        strength: share of the way back to noise that refinement starts from, above 0 and up to 1.
        guidance: weight of the condition; 1 is none.
        batch_size: samples drawn together; the result does not depend on it.
        eta: 0 is the deterministic sampler, 1 the ancestral one.
        parts: what is kept or refined as a whole; frames of a video, regions of an image or
            segments of a sound unless said.
    """

    def __init__(
        self,
        target: Denoiser,
        drafter: Denoiser | None = None,
        draft_steps: int = 8,
        main_steps: int = 20,
        score: QualityScore | None = None,
        threshold: AdaptiveThreshold | None = None,
        strength: float = 0.6,
        guidance: float = 1.0,
        batch_size: int = 16,
        eta: float = 0.0,
        parts: Parts | None = None,
    ) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
        if drafter is not None and drafter.shape != target.shape:
            raise ValueError(
                f"the drafter's states are {list(drafter.shape)}, the target's {list(target.shape)}"
            )
        self.drafter = drafter
        self.score = score or TargetDisagreement()
        self.threshold = threshold or AdaptiveThreshold()
        self.parts = usual_parts(target.shape) if parts is None else parts
        super().__init__(target, main_steps, eta, guidance, FixedLength(0), batch_size)
        self.rough = DenoisingPipeline(
            drafter or target, draft_steps, eta, guidance, batch_size=batch_size
        )
        self.refined_steps = max(1, round(strength * main_steps))

    @property
    def models(self) -> dict[str, nn.Module]:
        return super().models | ({} if self.drafter is None else {"drafter": self.drafter})

    @property
    def guarantee(self) -> Guarantee:
        """HEURISTIC: what is kept was never the target's own, and parts depend on one another."""
        return Guarantee.HEURISTIC

    @property
    def total_steps(self) -> int:
        """Denoising steps of a sample, those of its draft included."""
        return self.rough.grid.num_steps + self.refined_steps

    def _rounds(self, context: StateContext, noise: Noise) -> Iterator[list[StateStep]]:
        numbers, rest = context.samples.tolist(), self.refined_steps
        for step in self.rough.generate(
            len(numbers), context.condition, seed=noise.seed, indices=numbers, known=context.known
        ):
            self.stats.elements += 1
            yield [StateStep(step.sample, 0, 0, step.done, False, step.estimate)]
        self._count_draft()
        drafts = self.rough.samples.to(context.states)
        refined = self._select(context, drafts, noise)
        said = context.estimates.unbind()
        yield [
            StateStep(numbers[row], rest - 1, rest - 1, self.total_steps, True, said[row])
            for row, is_refined in enumerate(refined)
            if not is_refined
        ]
        active = [row for row, is_refined in enumerate(refined) if is_refined]
        index = torch.tensor(active, dtype=torch.long, device=context.steps.device)
        drafted = self.total_steps - rest
        for done in range(1, rest + 1 if active else 1):
            self._round(context, index, [0] * len(active), noise)
            self.stats.elements += len(active)
            yield [
                StateStep(numbers[row], 0, 0, drafted + done, done == rest, said[row])
                for row in active
            ]

    def _round(
        self, context: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> Tensor:
        """Denoise the rows `index` (R,) by a step."""
        part, nothing = context.rows(index), torch.zeros_like(index)
        states = part.states[:, None]
        estimates = self._evaluate(part, states, nothing, 0)
        law = transition(estimates[:, 0], part.states, part.steps, self.grid, self.eta)
        normals = noise.normal(part.samples, part.drawn, self.target.shape, Role.CORRECT)
        self._commit(context, index, nothing, states, estimates, law.sample(normals), noise)
        context.drawn[index] += 1
        return nothing

    def _select(self, context: StateContext, drafts: Tensor, noise: Noise) -> list[bool]:
        """Choose what is refined of drafts (B, *S), noise them for it, and make the rest known.

        The noise is what they were drawn from.  Returns of which rows something is refined.
        """
        pure = self._pure(context.samples, noise)

        def ask(level: float) -> Tensor:
            context.steps.fill_(self._nearest(level))
            states = noised(drafts, pure, context.steps, self.grid)[:, None]
            return self._evaluate(context, states, torch.zeros_like(context.steps), 0)[:, 0]

        scores = self.score(drafts, self.parts, ask)
        free = torch.ones_like(drafts[:, :1], dtype=torch.bool)
        if context.known is not None:
            free = ~context.known.given
        made = self.parts.cut(free).flatten(2).any(2).view(scores.shape)
        masks = self.parts.spread(self.threshold(scores, made)).to(drafts.device) & free
        self._count_parts(free, masks)
        start = self.grid.num_steps - self.refined_steps
        context.steps.fill_(start)
        # numbers of the draft's steps are spent
        context.drawn.fill_(self.rough.grid.num_steps)
        begun = noised(drafts, pure, context.steps, self.grid) if start else pure
        refined = masks.flatten(1).any(1)
        context.known = KnownParts(drafts, ~masks)
        held = place_known(begun, context, context.steps, self.grid, self.eta, noise)
        context.states.copy_(drafts)
        context.estimates.copy_(drafts)
        context.states[refined] = held[refined]
        return refined.tolist()

    def _nearest(self, level: float) -> int:
        """Return the step whose share of noise is nearest to `level`."""
        share = self.grid.sigmas / (self.grid.alphas + self.grid.sigmas)
        return int((share[:-1] - level).abs().argmin())

    def _count_draft(self) -> None:
        """Add the draft's calls: to the target's, where it drafts for itself."""
        stats, drafted = self.stats, self.rough.stats
        if self.drafter is not None:
            stats.draft_calls += drafted.target_calls
            return
        stats.target_calls += drafted.target_calls
        stats.target_rows += drafted.target_rows

    def _count_parts(self, free: Tensor, refined: Tensor) -> None:
        """Add the parts of a batch: acceptance is the share that is kept.

        free and refined (B, 1, *A) or (B, *S): what is not given, and what is done again.  A part
        that is given as a whole is neither kept nor refined.
        """
        stats = self.stats
        tested, fallen = (int(self.parts.cut(x).flatten(2).any(2).sum()) for x in (free, refined))
        stats.tested = [sum(stats.tested) + tested]
        stats.accepted = [sum(stats.accepted) + tested - fallen]
