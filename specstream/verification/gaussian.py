"""Which drafted denoising steps stand: the maximal coupling of two Gaussians by reflection.

Algorithm 2 of Accelerated Diffusion Models via Speculative Sampling (De Bortoli et al. 2025).  A
state drawn from the draft's Gaussian is kept with the probability that makes the output's law the
target's; where it is not kept, its noise is mirrored, so that no new draw is needed.  Of all ways
to couple two Gaussians of one width this keeps the draft most often: 2 Phi(-|delta| / 2), delta the
distance of the means in standard deviations.

Shapes: B rows, K drafted steps, S the shape of a state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specstream.structures import Guarantee, Law, StateDraft, StateVerdict


class StateVerifier(ABC):
    """Judges drafted states by the Gaussians of draft and target; a frozen dataclass, stateless."""

    guarantee: ClassVar[Guarantee]
    needs: ClassVar[frozenset[Law]]

    @abstractmethod
    def __call__(
        self, draft: StateDraft, means: Tensor, stds: Tensor, uniforms: Tensor, normals: Tensor
    ) -> StateVerdict:
        """Return what of `draft` stands and the state that follows it.

        means (B, K+1, *S) and stds (B, K+1): the target's Gaussians after the first i drafted
        states, i = 0..K.  uniforms (B, K) in [0, 1) and normals (B, *S), used once.
        """


@dataclass(frozen=True)
class ReflectionCoupling(StateVerifier):
    """Keeps a drafted state with probability min(1, p / q), and reflects the first that falls.

    The widths of both Gaussians must agree, as they do where both come from one step of one grid.
    """

    guarantee = Guarantee.EXACT_LAW
    needs = frozenset({Law.GAUSSIAN})

    def __call__(
        self, draft: StateDraft, means: Tensor, stds: Tensor, uniforms: Tensor, normals: Tensor
    ) -> StateVerdict:
        batch, num_drafted = draft.states.shape[:2]
        p_means = means.flatten(2).double()  # (B, K+1, d)
        chosen = p_means[:, -1] + stds[:, -1:].double() * normals.flatten(1).double()
        if not num_drafted:
            accepted = torch.zeros(batch, 0, dtype=torch.bool, device=means.device)
            return StateVerdict(accepted, chosen.view_as(normals).to(means.dtype))
        width = stds[:, :-1].double().clamp(min=1e-300)[..., None]
        noise = (draft.states.flatten(2).double() - draft.means.flatten(2).double()) / width
        delta = (draft.means.flatten(2).double() - p_means[:, :-1]) / width  # (B, K, d)
        log_ratio = -(noise * delta).sum(-1) - 0.5 * delta.square().sum(-1)  # log p / q
        real = torch.arange(num_drafted, device=means.device) < draft.lengths[:, None]
        stands = (uniforms.log() <= log_ratio) & real
        accepted = stands.to(torch.uint8).cumprod(1).bool()
        count = accepted.sum(1)

        def at(values: Tensor, index: Tensor) -> Tensor:
            return values[torch.arange(batch, device=values.device), index]

        fresh = at(p_means, count) + at(stds, count).double()[:, None] * normals.flatten(1).double()
        fallen = count.clamp(max=num_drafted - 1)
        z, along = at(noise, fallen), at(delta, fallen)
        mirrored = (
            z
            - 2 * along * ((z * along).sum(-1) / along.square().sum(-1).clamp(min=1e-300))[:, None]
        )
        reflected = at(p_means, fallen) + at(stds, fallen).double()[:, None] * mirrored
        whole = (count == draft.lengths)[:, None]
        chosen = torch.where(whole, fresh, reflected)
        return StateVerdict(accepted, chosen.view_as(normals).to(means.dtype))


def step_acceptance(delta: Tensor) -> Tensor:
    """Return the probability (...) that a drafted step stands: 1 - TV = 2 Phi(-|delta| / 2).

    delta (...): the distance of the two means in standard deviations.
    """
    probability: Tensor = torch.special.erfc(delta / (2 * 2**0.5))
    return probability
