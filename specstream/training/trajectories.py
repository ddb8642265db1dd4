"""The ways of a frozen target from noise to data, drawn anew in every batch.

A resumed run so sees what an uninterrupted one sees, and nothing is stored.

Shapes: B rows, N steps, P patches of width D, S the shape of a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.models.denoiser import Denoiser
from specstream.sampling import Noise, Role
from specstream.transitions import StepGrid, transition


@dataclass(frozen=True, slots=True)
class Trajectories:
    """What the target went through, without the data at the end."""

    states: Tensor  # (N, B, *S)
    estimates: Tensor  # (N, B, *S)
    features: Tensor | None  # (N, B, P, D) where they were asked for


@torch.no_grad()
def draw_trajectories(
    target: Denoiser,
    keys: Tensor,
    condition: Mapping[str, Tensor],
    grid: StepGrid,
    eta: float,
    guidance: float,
    noise: Noise,
    with_features: bool = False,
) -> Trajectories:
    """Draw a sample of the target for each row's key (B,), and keep the way there."""
    shape = target.shape
    states = noise.normal(keys, torch.zeros_like(keys), shape, Role.START).float()
    kept, said, thought = [], [], []
    for step in range(grid.num_steps):
        steps = torch.full_like(keys, step)
        found = target.evaluate(states, steps, grid, condition, guidance, with_features)
        kept.append(states)
        said.append(found.estimates)
        if found.features is not None:
            thought.append(found.features)
        law = transition(found.estimates, states, steps, grid, eta)
        states = law.sample(noise.normal(keys, steps, shape, Role.DRAFT))
    features = torch.stack(thought) if thought else None
    return Trajectories(torch.stack(kept), torch.stack(said), features)
