"""Selective refinement: a cheap draft, of which the target does again only the parts that look bad.

Hackaton-DMX (2025) drafted a video, scored its frames and had a larger model draw the bad ones
anew, each alone and from another seed.  Here they are refined indeed: the draft is noised
(SDEdit, Meng et al. 2022) and the target denoises the parts that fail beside the parts that are
kept, which are put back at every level with that level's noise (RePaint, Lugmayr et al. 2022).  The
kept parts of a sample are its draft's to the last bit.  No law is preserved: HEURISTIC, always.

Shapes: B rows, S the shape of a state, G the grid of its parts, N steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

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
from specstream.structures import Guarantee, StateContext, StateStep
from specstream.transitions import transition, wide
from specstream.verification.quality import AdaptiveThreshold


@dataclass(slots=True)
class RefinementContext(StateContext):
    """The states of a batch, the draft they come from, and what of it is refined."""

    pure: Tensor  # (B, *S) the noise that the draft was drawn from
    drafts: Tensor  # (B, *S)
    masks: Tensor  # (B, 1, *A) bool, what is refined


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
    def guarantee(self) -> Guarantee:
        """HEURISTIC: what is kept was never the target's own, and parts depend on one another."""
        return Guarantee.HEURISTIC

    @property
    def total_steps(self) -> int:
        """Denoising steps of a sample, those of its draft included."""
        return self.rough.grid.num_steps + self.refined_steps

    def _start(
        self, indices: Sequence[int], condition: dict[str, Tensor], noise: Noise
    ) -> RefinementContext:
        plain = super()._start(indices, condition, noise)
        held = {field.name: getattr(plain, field.name) for field in fields(plain)}
        nothing = torch.zeros_like(plain.states[:, :1], dtype=torch.bool)
        return RefinementContext(
            **held, pure=plain.states.clone(), drafts=plain.states.clone(), masks=nothing
        )

    def _rounds(self, context: StateContext, noise: Noise) -> Iterator[list[StateStep]]:
        assert isinstance(context, RefinementContext)
        numbers, rest = context.samples.tolist(), self.refined_steps
        for step in self.rough.generate(
            len(numbers), context.condition, seed=noise.seed, indices=numbers
        ):
            self.stats.elements += 1
            yield [StateStep(step.sample, 0, 0, step.done, False)]
        self._count_draft()
        context.drafts.copy_(self.rough.samples)
        self._select(context)
        refined = context.masks.flatten(1).any(1).tolist()
        yield [
            StateStep(number, rest - 1, rest - 1, self.total_steps, True)
            for number, is_refined in zip(numbers, refined, strict=True)
            if not is_refined
        ]
        active = [row for row, is_refined in enumerate(refined) if is_refined]
        index = torch.tensor(active, dtype=torch.long, device=context.steps.device)
        drafted = self.total_steps - rest
        for done in range(1, rest + 1 if active else 1):
            self._round(context, index, [0] * len(active), noise)
            self.stats.elements += len(active)
            yield [StateStep(numbers[row], 0, 0, drafted + done, done == rest) for row in active]

    def _round(
        self, context: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> Tensor:
        """Denoise the rows `index` (R,) by a step, and put back what is kept of their drafts."""
        assert isinstance(context, RefinementContext)
        part, nothing = context.rows(index), torch.zeros_like(index)
        states = part.states[:, None]
        estimates = self._evaluate(part, states, nothing, 0)
        law = transition(estimates[:, 0], part.states, part.steps, self.grid, self.eta)
        normals = noise.normal(part.samples, part.drawn, self.target.shape, Role.CORRECT)
        drafts, pure = context.drafts[index], context.pure[index]
        kept = self._noised(drafts, pure, part.steps + 1)
        following = torch.where(context.masks[index], law.sample(normals), kept)
        self._commit(context, index, nothing, states, estimates, following)
        context.drawn[index] += 1
        return nothing

    def _select(self, context: RefinementContext) -> None:
        """Choose what is refined, and noise the drafts for it."""
        drafts = context.drafts

        def ask(level: float) -> Tensor:
            context.steps.fill_(self._nearest(level))
            states = self._noised(drafts, context.pure, context.steps)[:, None]
            return self._evaluate(context, states, torch.zeros_like(context.steps), 0)[:, 0]

        chosen = self.threshold(self.score(drafts, self.parts, ask))
        context.masks.copy_(self.parts.spread(chosen).to(context.masks.device))
        self._count_parts(chosen)
        start = self.grid.num_steps - self.refined_steps
        context.steps.fill_(start)
        # numbers of the draft's steps are spent
        context.drawn.fill_(self.rough.grid.num_steps)
        noised = self._noised(drafts, context.pure, context.steps)
        begun = noised if start else torch.where(context.masks, context.pure, noised)
        refined = context.masks.flatten(1).any(1)
        context.states.copy_(drafts)
        context.states[refined] = begun[refined]

    def _nearest(self, level: float) -> int:
        """Return the step whose share of noise is nearest to `level`."""
        share = self.grid.sigmas / (self.grid.alphas + self.grid.sigmas)
        return int((share[:-1] - level).abs().argmin())

    def _noised(self, drafts: Tensor, pure: Tensor, steps: Tensor) -> Tensor:
        """Return drafts with the noise of `steps` (B,): at the last they are what they were."""
        alphas, sigmas = self.grid.alphas[steps], self.grid.sigmas[steps]
        return wide(alphas, drafts) * drafts + wide(sigmas, drafts) * pure

    def _count_draft(self) -> None:
        """Add the draft's calls: to the target's, where it drafts for itself."""
        stats, drafted = self.stats, self.rough.stats
        if self.drafter is not None:
            stats.draft_calls += drafted.target_calls
            return
        stats.target_calls += drafted.target_calls
        stats.target_rows += drafted.target_rows

    def _count_parts(self, chosen: Tensor) -> None:
        """Add the parts of a batch (B, *G): acceptance is the share that is kept."""
        stats = self.stats
        tested, kept = stats.tested or [0], stats.accepted or [0]
        stats.tested = [tested[0] + chosen.numel()]
        stats.accepted = [kept[0] + int((~chosen).sum())]
