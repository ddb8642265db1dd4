"""Sampling a diffusion model, plainly or with drafted steps that its target verifies in one call.

The loop of De Bortoli et al. (2025), algorithm 3, on rows that each stand at a step of their own:
the drafter draws up to K next states of each row, the target evaluates the row's state and the
drafted ones in one call, the verifier keeps a prefix and gives the state that follows it.  Nothing
drafted is the plain sampler.  What the target said last of a row is what free drafts go on with:
after a rejection it is the estimate at the state before (a lazy restart, without a call for the
reflected state).

Shapes: B rows, K drafted steps, S the shape of a state, N steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specstream.drafters.denoising import StateDrafter
from specstream.generation.drafting_sampler import DraftingSampler
from specstream.generation.lengths import DraftLength, FixedLength, StepCosts
from specstream.models.denoiser import Denoiser
from specstream.sampling import Noise, Role
from specstream.structures import Guarantee, StateContext, StateDraft, StateVerdict
from specstream.transitions import place_known, step_stds, transition
from specstream.verification.gaussian import ReflectionCoupling, StateVerifier


class DenoisingPipeline(DraftingSampler[StateDraft]):
    """Draws samples of a diffusion model; `samples` and `stats` hold those of the last run.

    Args:
        target: the diffusion model.
        num_steps: denoising steps of a sample, N.
        eta: 0 is the deterministic sampler (DDIM; Euler's method on a flow), 1 the ancestral one.
        guidance: weight of the condition (Ho and Salimans 2022); 1 is none.
        drafter: guesses steps; None: the plain sampler.
        lengths: how many steps to draft, at most.
        verifier: what keeps drafted steps.
        batch_size: samples drawn together; the result does not depend on it.
        costs: for `lengths` that are chosen by costs; None: measured at the first run, of as many
            samples as are drawn together, and kept.  Which samples are drawn depends on them.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int = 50,
        eta: float = 1.0,
        guidance: float = 1.0,
        drafter: StateDrafter | None = None,
        lengths: DraftLength | None = None,
        verifier: StateVerifier | None = None,
        batch_size: int = 16,
        costs: StepCosts | None = None,
    ) -> None:
        if drafter is not None and eta == 0:
            raise ValueError(
                "eta 0 is a deterministic sampler: its steps have no law that a draft could be "
                "drawn from, so no drafted step is ever the target's; use eta above 0, or a "
                "sampler with a bounded error"
            )
        if drafter is None and lengths is not None and lengths.max_tokens:
            raise ValueError("there is no drafter: lengths have no use")
        verifier = verifier or ReflectionCoupling()
        if drafter is not None and drafter.law not in verifier.needs:
            raise ValueError(
                f"{type(verifier).__name__} is exact for {[law.value for law in verifier.needs]} "
                f"drafts, and {type(drafter).__name__}'s are {drafter.law.value}"
            )
        self.drafter = drafter
        self.reads = None if drafter is None else drafter.reads
        if drafter is not None:
            drafter.check(target, guidance)
        self.verifier = verifier
        lengths = lengths or FixedLength(0 if drafter is None else 8)
        super().__init__(target, num_steps, eta, guidance, lengths, batch_size, costs)
        self.last_drawn = int((step_stds(self.grid, eta) > 0).sum())  # steps that have a law

    @property
    def models(self) -> dict[str, nn.Module]:
        return super().models | ({} if self.drafter is None else {"drafter": self.drafter})

    @property
    def guarantee(self) -> Guarantee:
        """What a run promises of its samples' law, relative to the plain sampler's."""
        return Guarantee.EXACT_LAW if self.drafter is None else self.verifier.guarantee

    def _room(self, step: int) -> int:
        if self.drafter is None or (self.drafter.needs_estimate and step == 0):
            return 0
        return min(self.grid.num_steps - 1, self.last_drawn) - step

    @property
    def drafter_parts(self) -> tuple[object, ...]:
        drafter = self.drafter
        if drafter is None:
            return ()
        weights = list(drafter.parameters())
        return (
            str(drafter),
            sum(weight.numel() for weight in weights),
            sorted({str(weight.dtype) for weight in weights}),
            type(self.verifier).__name__,
        )

    def _judge(
        self,
        context: StateContext,
        part: StateContext,
        index: Tensor,
        draft: StateDraft,
        wanted: Sequence[int],
        noise: Noise,
    ) -> Tensor:
        states = torch.cat([part.states[:, None], draft.states], 1)  # (B, K+1, *S)
        said = self._ask(part, states, draft.lengths, sum(wanted), self.reads)
        estimates, features = said.estimates, said.features
        verdict = self._verify(part, draft, states, estimates, noise)
        counts = verdict.accepted.sum(1)
        following = verdict.correction
        self._commit(context, index, counts, states, estimates, following, noise, features)
        context.drawn[index] = part.drawn + draft.lengths + 1
        return counts

    def _propose(
        self, part: StateContext, index: Tensor, wanted: Sequence[int], noise: Noise
    ) -> StateDraft:
        if self.drafter is None or not max(wanted):
            empty = part.states[:, None][:, :0]
            return StateDraft(empty, empty, torch.zeros_like(part.steps))
        return self.drafter.propose(part, wanted, self.grid, self.eta, noise)

    def _verify(
        self,
        part: StateContext,
        draft: StateDraft,
        states: Tensor,
        estimates: Tensor,
        noise: Noise,
    ) -> StateVerdict:
        """Judge a draft by what the target said of the states (B, K+1, *S) of a round."""
        batch, places = states.shape[:2]
        ahead = torch.arange(places, device=part.steps.device)
        steps = (part.steps[:, None] + ahead).clamp(max=self.grid.num_steps - 1).flatten()
        law = transition(estimates.flatten(0, 1), states.flatten(0, 1), steps, self.grid, self.eta)
        means, stds = law.means.view_as(states), law.stds.view(batch, places)
        if part.known is not None:
            after = (steps + 1).view(batch, places).unbind(1)
            placed = [
                place_known(mean, part, step, self.grid, self.eta, noise)
                for mean, step in zip(means.unbind(1), after, strict=True)
            ]
            means = torch.stack(placed, 1)
        elements = part.drawn[:, None] + ahead[:-1]
        uniforms = noise.uniform(part.samples, elements, Role.ACCEPT)
        normals = noise.normal(part.samples, part.drawn, states.shape[2:], Role.CORRECT)
        # what follows a draft that stands as a whole lies at its own length
        return self.verifier(draft, means, stds, uniforms, normals)
