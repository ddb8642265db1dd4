"""The ways of a frozen target from noise to data, drawn anew in every batch.

A resumed run so sees what an uninterrupted one sees, and nothing is stored.  Where a trajectory
costs more than what is learned from it, each can be drawn once and kept in memory instead; a
resumed run draws the same ones again.

Shapes: B rows, N steps, P patches of width D, S the shape of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.models.denoiser import Denoiser, Reads
from specstream.sampling import Noise, Role
from specstream.training.base import SummedLossModule
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


@dataclass(frozen=True)
class TargetTrajectories:
    """How trajectories of a target are drawn, and how much is learned from each.

    Args:
        num_steps, eta, guidance: of the sampler to draft for.
        states_per_row: states that are used of each trajectory, none of them twice.
        keep: draw the trajectory of each example in its first epoch only, and keep it in the
            memory of its process: 2 N states each.
    """

    num_steps: int = 50
    eta: float = 1.0
    guidance: float = 1.0
    states_per_row: int = 8
    keep: bool = False

    def __post_init__(self) -> None:
        check_sampler(self.num_steps, self.eta, self.guidance)
        if not 1 <= self.states_per_row < self.num_steps:
            raise ValueError(
                f"states_per_row must be in 1..{self.num_steps - 1}, got {self.states_per_row}"
            )


class TrajectorySource:
    """Where a training has the trajectories of its target from.

    Args:
        target: the frozen model that draws them.
        num_steps, eta, guidance: of its sampler.
        keep: draw those of each example in its first epoch only.
        reads: what is read of the target's thoughts on the way.
    """

    def __init__(
        self,
        target: Denoiser,
        num_steps: int,
        eta: float,
        guidance: float,
        keep: bool = False,
        reads: Reads | None = None,
    ) -> None:
        self.target = target
        self.grid = target.schedule.grid(num_steps)
        self.eta, self.guidance, self.reads = eta, guidance, reads
        self.kept: dict[bool, KeptTrajectories] | None = None
        if keep:
            self.kept = {True: KeptTrajectories(), False: KeptTrajectories()}  # by `training`

    def of(
        self, keys: Tensor, condition: Mapping[str, Tensor], module: SummedLossModule
    ) -> Trajectories:
        """Return those of rows with keys (B,), of this epoch or, where they are kept, the first."""
        noise = module.epoch_noise() if self.kept is None else module.epoch_noise(0)
        grid = self.grid.to(keys.device)

        def draw(chosen: Tensor) -> Trajectories:
            told = {name: value[chosen] for name, value in condition.items()}
            how = (grid, self.eta, self.guidance, noise, self.reads)
            return draw_trajectories(self.target, keys[chosen], told, *how)

        if self.kept is None:
            return draw(torch.arange(len(keys), device=keys.device))
        return self.kept[module.training].of(keys, draw)


def check_sampler(num_steps: int, eta: float, guidance: float) -> None:
    """Raise ValueError for a sampler whose steps cannot be drafted with a law."""
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be above 0 and at most 1 for drafts with a law, got {eta}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance}")
    if num_steps < 3:
        raise ValueError(f"num_steps must be at least 3 for steps to draft, got {num_steps}")


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
