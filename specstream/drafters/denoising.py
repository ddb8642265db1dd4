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

from specstream.models.consistency import ConsistencyModel
from specstream.models.denoiser import Denoiser
from specstream.models.text_conditions import short_condition
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
    another its drafts are as exact, but fewer may stand; None: it is for any.
    """

    law: ClassVar[Law] = Law.GAUSSIAN
    needs_estimate: ClassVar[bool] = True
    calls_a_step: ClassVar[bool] = False  # whether a network runs for every drafted step
    trained_guidance: float | None = None

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
    """

    needs_estimate = False
    calls_a_step = True

    def __init__(self, denoiser: Denoiser, guidance: float = 1.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.guidance = guidance
        if isinstance(denoiser, ConsistencyModel):
            self.trained_guidance = denoiser.guidance

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        return self.denoiser(states, steps, grid, context.condition, self.guidance)


class ResidualDenoiser(StateDrafter):
    """The target's last estimate, corrected by a small network that is told where it was made.

    guess = estimate + gate * network(state, estimate, time, time of the estimate); the gate is 0
    where no time has passed, and the network's last layer is 0 before training, so that it starts
    as `FrozenEstimate` and training can only leave it where the acceptance says so.

    Args:
        network: from 2 C channels (state beside estimate) to C, told two times.
        guidance: of the target that it is trained for.
    """

    calls_a_step = True

    def __init__(self, network: nn.Module, guidance: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.trained_guidance = guidance

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        seen = context.seen_steps.clamp(min=0)
        times = torch.stack([grid.times[steps], grid.times[seen]], -1).float()
        gate = (grid.sigmas[seen] - grid.sigmas[steps]).clamp(min=0).sqrt()
        both = torch.cat([states, context.estimates], 1)
        dtype = next(self.network.parameters()).dtype
        told = short_condition(context.condition)
        change = self.network(both.to(dtype), times, **told).float()
        return context.estimates + gate.to(change).view(-1, *[1] * (change.dim() - 1)) * change


class WindowDenoiser(StateDrafter):
    """A residual drafter that guesses a whole window in one pass, from the state it starts at.

    Cheaper than `ResidualDenoiser` by a factor of the window, where a call costs what it takes to
    start it; blinder, as it does not see the noise that the drafted states have drawn.

    Args:
        network: from 2 C channels to L * C, told two times.
        num_steps: L, the longest window.
        guidance: of the target that it is trained for.
    """

    def __init__(self, network: nn.Module, num_steps: int, guidance: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.num_steps = num_steps
        self.trained_guidance = guidance

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        raise AssertionError("guesses are made for a window at once")

    def window(self, context: StateContext, grid: StepGrid, num_steps: int) -> Tensor:
        if num_steps > self.num_steps:
            raise ValueError(
                f"this drafter guesses at most {self.num_steps} steps at once, not {num_steps}"
            )
        seen = context.seen_steps.clamp(min=0)
        start = context.steps
        times = torch.stack([grid.times[start], grid.times[seen]], -1).float()
        both = torch.cat([context.states, context.estimates], 1)
        dtype = next(self.network.parameters()).dtype
        told = short_condition(context.condition)
        said = self.network(both.to(dtype), times, **told).float()
        change = said.unflatten(1, (self.num_steps, -1))[:, :num_steps]  # (R, K, *S)
        ahead = torch.arange(num_steps, device=start.device)
        steps = (start[:, None] + ahead).clamp(max=grid.num_steps - 1)
        gate = (grid.sigmas[seen][:, None] - grid.sigmas[steps]).clamp(min=0).sqrt()
        gate = gate.to(change).view(*gate.shape, *[1] * (change.dim() - 2))
        return context.estimates[:, None] + gate * change
