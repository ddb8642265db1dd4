"""Which parts of a draft are refined: those that score far worse than the rest of their own draft.

The adaptive threshold of Hackaton-DMX's text-to-video pipeline (2025).  No law is preserved, so the
decision is judged by the quality of what comes out alone.

Shapes: B rows, G the grid of a draft's parts: (F,) frames of a video or segments of a sound, (Y, X)
regions of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specstream.structures import Guarantee


@dataclass(frozen=True)
class AdaptiveThreshold:
    """Refines the parts whose score exceeds the mean of their row by so many deviations.

    Args:
        refinement_threshold: lambda of mean + lambda * standard deviation; less refines more.
        neighbours: parts up to so far from such a part are refined with it.
        always_ends: the first and the last part are refined whatever they score; the regions of an
            image have no ends.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC

    refinement_threshold: float = 0.7
    neighbours: int = 1
    always_ends: bool = True

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise ValueError(f"neighbours must be at least 0, got {self.neighbours}")
        if not math.isfinite(self.refinement_threshold):
            raise ValueError(
                f"refinement_threshold must be a finite number, got {self.refinement_threshold}"
            )

    def __call__(self, scores: Tensor, made: Tensor | None = None) -> Tensor:
        """Return the parts to refine, bool (B, *G), for scores (B, *G): higher is worse.

        made bool (B, *G): the parts that are not given; only these count in mean and deviation,
        and only from these refinement spreads.
        """
        flat = scores.double().flatten(1)
        counted = torch.ones_like(flat) if made is None else made.flatten(1).to(flat)
        total = counted.sum(1).clamp(min=1)
        means = (flat * counted).sum(1) / total
        squares = ((flat - means[:, None]).square() * counted).sum(1) / total
        limits = means + self.refinement_threshold * squares.sqrt()
        chosen = scores.double() > limits.view(-1, *[1] * (scores.dim() - 1))
        if made is not None:
            chosen &= made
        for axis in range(1, scores.dim()):
            chosen = widened(chosen, axis, self.neighbours)
        if self.always_ends and scores.dim() == 2:
            chosen[:, 0] = chosen[:, -1] = True
        return chosen


def widened(chosen: Tensor, axis: int, distance: int) -> Tensor:
    """Return chosen parts and those up to `distance` from one along `axis`, bool (B, *G)."""
    parts = chosen.shape[axis]
    places = torch.arange(parts, device=chosen.device)
    near = (places[:, None] - places).abs() <= distance  # (parts, parts)
    moved = chosen.movedim(axis, -1)[..., None, :] & near
    return moved.any(-1).movedim(-1, axis)
