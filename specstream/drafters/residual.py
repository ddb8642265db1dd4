"""Residual drafters: the target's last estimate of the data, corrected by a small network.

guess = estimate + gate * network(state, estimate, time, time of the estimate); the gate is 0 where
no time has passed, and the network's last layer is 0 before training, so that it starts as
`FrozenEstimate` and training can only leave it where the acceptance says so.

How the estimate moves depends on the noise that was drawn since it was made.  In the state that
noise is a small part, hard to find for a small network; with 3 C channels it is told the noise
itself, beside the estimate and the state of which the target made it.

The network may also read what the target thought when it made the estimate, its last hidden states,
as EAGLE's and DFlash's drafters of text do.

Shapes: R rows, K drafted steps, S the shape of a state, P patches, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specstream.drafters.denoising import StateDrafter
from specstream.models.denoiser import Denoiser, Reads
from specstream.models.patch_transformer import PatchTransformer
from specstream.models.text_conditions import short_condition
from specstream.structures import StateContext
from specstream.transitions import SMALLEST, StepGrid, wide


class CorrectingDrafter(StateDrafter):
    """What residual drafters share: a network that is told where the target's word was spoken.

    Args:
        network: from 2 C channels (state beside estimate) or 3 C (noise drawn since the estimate,
            estimate, state that it was made of), told two times.
        guidance: of the target that it is trained for.
        num_steps: how many steps it guesses in a call.
    """

    def __init__(self, network: nn.Module, guidance: float = 1.0, num_steps: int = 1) -> None:
        super().__init__()
        self.network = network
        self.trained_guidance = guidance
        self.num_steps = num_steps
        self.told_noise = False
        if isinstance(network, PatchTransformer):
            self.reads = Reads.HIDDEN if network.feature_size else None
            sizes = network.options
            self.told_noise = sizes["in_channels"] * num_steps == 3 * sizes["out_channels"]

    def check(self, target: Denoiser, guidance: float) -> None:
        if not self.reads:
            return
        own, network = self.network, target.network
        assert isinstance(own, PatchTransformer)
        if not isinstance(network, PatchTransformer):
            raise ValueError(
                "feature_size must be 0: the hidden states of a "
                f"{type(network).__name__} cannot be read, only those of a PatchTransformer"
            )
        if len(target.devices) > 1:
            raise ValueError("a drafter that reads hidden states has its target on one device")
        if own.feature_size != network.hidden_size:
            raise ValueError(
                f"feature_size is {own.feature_size}, but the target's hidden states are "
                f"{network.hidden_size} wide"
            )
        if own.patch != network.patch:
            raise ValueError(
                f"patch is {list(own.patch)}, but a drafter that reads its target's hidden states "
                f"has the target's, {list(network.patch)}"
            )

    def said(self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid) -> Tensor:
        """Return what the network says, float32 (R, ...), of states (R, *S) at `steps` (R,)."""
        seen = context.seen_steps.clamp(min=0)
        times = torch.stack([grid.times[steps], grid.times[seen]], -1).float()
        shown = [states, context.estimates]
        if self.told_noise:
            drawn = noise_since(states, steps, context, grid)
            shown = [drawn.to(states), context.estimates, context.seen]
        told = dict(short_condition(context.condition))
        if self.reads:
            assert context.features is not None, "drafts begin after the target's first word"
            told["features"] = context.features
        dtype = next(self.network.parameters()).dtype
        said = self.network(torch.cat(shown, 1).to(dtype), times, **told)
        assert isinstance(said, Tensor)
        return said.float()


class ResidualDenoiser(CorrectingDrafter):
    """A residual drafter that sees every drafted state: its network has C channels out."""

    calls_a_step = True

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        seen = context.seen_steps.clamp(min=0)
        gate = (grid.sigmas[seen] - grid.sigmas[steps]).clamp(min=0).sqrt()
        change = self.said(states, steps, context, grid)
        return context.estimates + gate.to(change).view(-1, *[1] * (change.dim() - 1)) * change


class WindowDenoiser(CorrectingDrafter):
    """A residual drafter that guesses a whole window in one pass, from the state it starts at.

    Cheaper than `ResidualDenoiser` by a factor of the window, where a call costs what it takes to
    start it; blinder, as it does not see the noise that the drafted states have drawn.

    Args:
        network: from 2 C or 3 C channels to L * C, told two times.
        num_steps: L, the longest window.
        guidance: of the target that it is trained for.
    """

    def __init__(self, network: nn.Module, num_steps: int, guidance: float = 1.0) -> None:
        super().__init__(network, guidance, num_steps)

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        raise AssertionError("guesses are made for a window at once")

    def window(self, context: StateContext, grid: StepGrid, num_steps: int) -> Tensor:
        if num_steps > self.num_steps:
            raise ValueError(
                f"this drafter guesses at most {self.num_steps} steps at once, not {num_steps}"
            )
        seen, start = context.seen_steps.clamp(min=0), context.steps
        said = self.said(context.states, start, context, grid)
        change = said.unflatten(1, (self.num_steps, -1))[:, :num_steps]  # (R, K, *S)
        ahead = torch.arange(num_steps, device=start.device)
        steps = (start[:, None] + ahead).clamp(max=grid.num_steps - 1)
        gate = (grid.sigmas[seen][:, None] - grid.sigmas[steps]).clamp(min=0).sqrt()
        gate = gate.to(change).view(*gate.shape, *[1] * (change.dim() - 2))
        return context.estimates[:, None] + gate * change


def noise_since(states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid) -> Tensor:
    """Return the noise (R, *S) drawn between the target's word and states (R, *S) at `steps` (R,).

    The part of a state's noise that the noise of the seen state does not explain, in standard
    deviations of it: of a trajectory of the ancestral sampler (eta 1) a unit normal, but for the
    error of the estimate.  Given parts (`place_known`) draw all of theirs anew at every step.
    """
    seen = context.seen_steps.clamp(min=0)
    now, before = grid.alphas[steps], grid.alphas[seen]
    share = (before * grid.sigmas[steps] / (now * grid.sigmas[seen]).clamp(min=SMALLEST)).clamp(
        max=1
    )

    def noise_in(found: Tensor, at: Tensor) -> Tensor:
        data = wide(grid.alphas[at], found) * context.estimates
        return (found - data) / wide(grid.sigmas[at].clamp(min=SMALLEST), found)

    held = noise_in(states, steps)
    new = held - wide(share, states) * noise_in(context.seen, seen)
    new = new / wide((1 - share.square()).clamp(min=1e-4).sqrt(), new)
    return new if context.known is None else torch.where(context.known.given, held, new)
