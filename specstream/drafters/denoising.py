"""Drafters of denoising steps: each guesses the data, and draws states as the target would.

A drafter says where it believes the data lie; the Gaussian of a drafted step follows from that as
the target's does from its own estimate, with the same width, so that any of them can be verified
exactly.  Two of them cost nothing: they go on with what the target said last (autospeculation, Hu
et al. 2025, and the frozen drafts of De Bortoli et al. 2025).

Shapes: R rows, K drafted steps, S the shape of a state, N steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from specstream.models.denoiser import Denoiser, Reads
from specstream.sampling import Noise, Role
from specstream.structures import Law, StateContext, StateDraft
from specstream.transitions import (
    Prediction,
    StepGrid,
    data_estimate,
    network_output,
    place_known,
    transition,
)


class StateDrafter(nn.Module, ABC):
    """Guesses the next denoising states of each row; stateless, its memory is the context's.

    `needs_estimate` says that it goes on from what the target said last: until there is such an
    estimate, the rows wait.  `trained_guidance` is that of the target it was trained for: with
    another its drafts are as exact, but fewer may stand; None: it is for any.  `reads` is what it
    reads of the target's thoughts where it spoke last.
    """

    law: ClassVar[Law] = Law.GAUSSIAN
    needs_estimate: ClassVar[bool] = True
    calls_a_step: ClassVar[bool] = False  # whether a network runs for every drafted step
    trained_guidance: float | None = None
    reads: Reads | None = None

    def check(self, target: Denoiser, guidance: float) -> None:
        """Raise ValueError for a target that it cannot draft for, or not with this guidance."""

    @abstractmethod
    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        """Return the guess at the data (R, *S) for states (R, *S) that stand at `steps` (R,)."""

    def window(self, context: StateContext, grid: StepGrid, num_steps: int) -> Tensor | None:
        """Return the guesses (R, K, *S) of all steps at once; None: they are made one by one."""
        return None

    def propose(
        self,
        context: StateContext,
        lengths: Sequence[int],
        grid: StepGrid,
        eta: float,
        noise: Noise,
    ) -> StateDraft:
        """Draw `lengths` next states of each row of the context, from this drafter's Gaussians."""
        most, wanted = max(lengths), torch.tensor(lengths, device=context.steps.device)
        elements = context.drawn[:, None] + torch.arange(most, device=wanted.device)
        shape = context.states.shape[1:]
        normals = noise.normal(context.samples, elements, shape, Role.DRAFT)  # (R, K, *S)
        states, means, current = [], [], context.states
        ahead = self.window(context, grid, most)
        for place in range(most):
            steps = (context.steps + place).clamp(max=grid.num_steps - 1)
            if ahead is None:
                guess = self.estimate(current, steps, context, grid)
            else:
                guess = ahead[:, place]
            law = transition(guess, current, steps, grid, eta)
            drawn, after = law.sample(normals[:, place]), (steps + 1, grid, eta, noise)
            current = place_known(drawn, context, *after)
            means.append(place_known(law.means, context, *after))
            states.append(current)
        return StateDraft(torch.stack(states, 1), torch.stack(means, 1), wanted)


class FrozenEstimate(StateDrafter):
    """Goes on with the target's last estimate of the data: free, and no worse in high dimension."""

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        return context.estimates


class FrozenVelocity(StateDrafter):
    """Goes on with the target's last velocity, the frozen draft of De Bortoli et al. (2025).

    Free too; weaker than `FrozenEstimate` as the velocity moves with the noise of the state.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        flow = denoiser.prediction is Prediction.FLOW
        self.prediction = Prediction.FLOW if flow else Prediction.VELOCITY

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        seen = context.seen_steps.clamp(min=0)
        velocity = network_output(
            context.estimates, context.seen, grid.alphas[seen], grid.sigmas[seen], self.prediction
        )
        alphas, sigmas = grid.alphas[steps], grid.sigmas[steps]
        return data_estimate(velocity, states, alphas, sigmas, self.prediction)


class IndependentDenoiser(StateDrafter):
    """A smaller diffusion model of the same states, which may have its own way of prediction.

    It may be a student of few steps: its guess is then where the deterministic sampler would end,
    which is the target's own estimate only where little noise is left.

    `guidance` is the weight of its condition, where its weights do not hold that of its target.
    """

    needs_estimate = False
    calls_a_step = True

    def __init__(self, denoiser: Denoiser, guidance: float = 1.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.guidance = guidance
        self.trained_guidance = denoiser.guidance

    def check(self, target: Denoiser, guidance: float) -> None:
        if self.denoiser.shape != target.shape:
            raise ValueError(
                f"the drafter's states are {list(self.denoiser.shape)}, the target's "
                f"{list(target.shape)}"
            )

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        return self.denoiser(states, steps, grid, context.condition, self.guidance)
