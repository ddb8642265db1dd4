"""The ways of a frozen target from noise to data, drawn anew in every batch.

A resumed run so sees what an uninterrupted one sees, and nothing is stored.  Where a trajectory
costs more than what is learned from it, each can be drawn once and kept in memory instead; a
resumed run draws the same ones again.

Shapes: B rows, N steps, P patches of width D, S the shape of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.models.denoiser import Denoiser, Reads
from specstream.sampling import Noise, Role
from specstream.transitions import StepGrid, transition


@dataclass(frozen=True, slots=True)
class Trajectories:
    """What the target went through, without the data at the end."""

    states: Tensor  # (N, B, *S)
    estimates: Tensor  # (N, B, *S)
    features: Tensor | None  # (N, B, P, D) where they were asked for

    def row(self, place: int) -> Trajectories:
        """Return one row, in the computer's own memory."""
        parts = (self.states, self.estimates, self.features)
        kept = (None if part is None else part[:, place].cpu().clone() for part in parts)
        return Trajectories(*kept)  # type: ignore[arg-type]


class KeptTrajectories:
    """Trajectories that are drawn once for each key."""

    def __init__(self) -> None:
        self.rows: dict[int, Trajectories] = {}

    def of(self, keys: Tensor, draw: Callable[[Tensor], Trajectories]) -> Trajectories:
        """Return the trajectories of keys (B,); `draw` makes those of an index (R,) into them."""
        numbers = keys.tolist()
        missing = [place for place, number in enumerate(numbers) if number not in self.rows]
        if missing:
            drawn = draw(torch.tensor(missing, device=keys.device))
            for row, place in enumerate(missing):
                self.rows[numbers[place]] = drawn.row(row)
        rows = [self.rows[number] for number in numbers]
        features = [row.features for row in rows if row.features is not None]
        return Trajectories(
            torch.stack([row.states for row in rows], 1).to(keys.device),
            torch.stack([row.estimates for row in rows], 1).to(keys.device),
            torch.stack(features, 1).to(keys.device) if features else None,
        )


@torch.no_grad()
def draw_trajectories(
    target: Denoiser,
    keys: Tensor,
    condition: Mapping[str, Tensor],
    grid: StepGrid,
    eta: float,
    guidance: float,
    noise: Noise,
    reads: Reads | None = None,
) -> Trajectories:
    """Draw a sample of the target for each row's key (B,), and keep the way there."""
    shape = target.shape
    states = noise.normal(keys, torch.zeros_like(keys), shape, Role.START).float()
    kept, said, thought = [], [], []
    for step in range(grid.num_steps):
        steps = torch.full_like(keys, step)
        found = target.evaluate(states, steps, grid, condition, guidance, reads)
        kept.append(states)
        said.append(found.estimates)
        if found.features is not None:
            thought.append(found.features)
        law = transition(found.estimates, states, steps, grid, eta)
        states = law.sample(noise.normal(keys, steps, shape, Role.DRAFT))
    features = torch.stack(thought) if thought else None
    return Trajectories(torch.stack(kept), torch.stack(said), features)
