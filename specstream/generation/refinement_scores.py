"""How good each part of a drafted medium is: pure functions of its numbers, and the target's word.

`Appearance` is the score of Hackaton-DMX's text-to-video pipeline (2025): change from frame to
frame, sharpness and contrast, with weights for first and last frames.  It asks no model, and so it
takes motion for a fault.  `TargetDisagreement` asks the target once about the whole draft.

Shapes: B rows, C channels, A the axes of a state behind its channels, P parts, G their grid (the
axes that are cut), N numbers of a part.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ask = Callable[[float], Tensor]


@dataclass(frozen=True, slots=True)
class Parts:
    """How states are cut into what is kept or refined as a whole.

    Args:
        shape: of a state, (C, *A).
        sizes: of a part along each axis of A.

    Raises ValueError for sizes that do not divide the state.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        axes = self.shape[1:]
        if len(axes) != len(self.sizes) or any(
            size < 1 or axis % size for axis, size in zip(axes, self.sizes, strict=True)
        ):
            raise ValueError(f"parts of {list(self.sizes)} do not divide states of {list(axes)}")

    @property
    def counts(self) -> tuple[int, ...]:
        """How many parts lie along each axis of A."""
        return tuple(a // s for a, s in zip(self.shape[1:], self.sizes, strict=True))

    @property
    def grid(self) -> tuple[int, ...]:
        """G; (1,) where nothing is cut."""
        return tuple(count for count in self.counts if count > 1) or (1,)

    def cut(self, states: Tensor) -> Tensor:
        """Return the parts of states (B, C, *A), each with its own axes: (B, P, C, *sizes)."""
        axes = len(self.sizes)
        split = [n for pair in zip(self.counts, self.sizes, strict=True) for n in pair]
        folded = states.reshape(*states.shape[:2], *split)
        outer = [2 + 2 * axis for axis in range(axes)]
        inner = [3 + 2 * axis for axis in range(axes)]
        return folded.permute(0, *outer, 1, *inner).flatten(1, axes)

    def spread(self, chosen: Tensor) -> Tensor:
        """Return values (B, *G) of parts as values (B, 1, *A) of every place in them."""
        wide = chosen.reshape(-1, 1, *self.counts)
        for axis, size in enumerate(self.sizes):
            wide = wide.repeat_interleave(size, axis + 2)
        return wide


def usual_parts(shape: Sequence[int]) -> Parts:
    """Return frames of a video, 4 by 4 regions of an image, or 16 segments of a waveform.

    Fewer where they do not divide the state, of `shape` (C, *A).
    """
    _, *axes = shape
    if len(axes) == 3:
        return Parts(tuple(shape), (1, axes[1], axes[2]))
    most = 4 if len(axes) == 2 else 16
    return Parts(tuple(shape), tuple(size // math.gcd(size, most) for size in axes))


class QualityScore(ABC):
    """Scores the parts of a draft, higher is worse; a frozen dataclass of its options."""

    @abstractmethod
    def __call__(self, drafts: Tensor, parts: Parts, ask: Ask) -> Tensor:
        """Return the scores (B, *G) of drafts (B, *S) in -1..1.

        ask(level) gives the target's estimate of the data (B, *S) from the drafts with noise of
        that level, 0 (none) to 1, in one call of the target.
        """


@dataclass(frozen=True)
class TargetDisagreement(QualityScore):
    """The mean squared difference of a draft and what the target makes of it after some noise.

    The one to choose: it knows what the target would change, where a look at the numbers cannot.

    Args:
        level: how much noise, between 0 and 1.
    """

    level: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level must be between 0 and 1, got {self.level}")

    def __call__(self, drafts: Tensor, parts: Parts, ask: Ask) -> Tensor:
        errors = (ask(self.level) - drafts).square()
        return parts.cut(errors).flatten(2).mean(2).view(-1, *parts.grid)


@dataclass(frozen=True)
class Appearance(QualityScore):
    """Change from part to part and blandness, as Hackaton-DMX weighs them; asks no model.

    Regions of an image do not follow one another: only what is in them counts.

    Args:
        first, middle, last: weight of what is in a part; the rest is that of the change from the
            part before it.
    """

    first: float = 1.0
    middle: float = 0.5
    last: float = 0.7

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")

    def __call__(self, drafts: Tensor, parts: Parts, ask: Ask) -> Tensor:
        pieces = parts.cut((drafts.clamp(-1, 1) + 1) / 2).mean(2)  # (B, P, *sizes) in 0..1
        content = content_scores(pieces)
        if len(parts.grid) == 1:
            shares = content_shares(content.shape[1], self.first, self.middle, self.last)
            shares = shares.to(content)
            content = shares * content + (1 - shares) * temporal_scores(pieces.flatten(2))
        return content.view(-1, *parts.grid)


def temporal_scores(pieces: Tensor) -> Tensor:
    """Return how much each part differs from the one before it, (B, P); the first scores 0.

    0.7 * mean squared difference + 0.3 * (1 - correlation) / 2, of parts (B, P, N) in 0..1.
    """
    before, now = pieces[:, :-1], pieces[:, 1:]
    squared = (now - before).square().mean(-1)
    products = (now - now.mean(-1, keepdim=True)) * (before - before.mean(-1, keepdim=True))
    widths = now.std(-1, correction=0) * before.std(-1, correction=0)
    correlation = products.mean(-1) / (widths + 1e-8)
    change = 0.7 * squared + 0.3 * (1 - correlation) / 2
    return torch.cat([torch.zeros_like(pieces[:, :1, 0]), change], 1)


def content_scores(pieces: Tensor) -> Tensor:
    """Return how bland each part is, (B, P): 0.6 * (1 - sharpness) + 0.4 * (1 - contrast).

    Sharpness is the mean of |Laplacian|, at most 1, contrast the standard deviation, of parts
    (B, P, *sizes) in 0..1.
    """
    sharpness = laplacian(pieces).abs().flatten(2).mean(2).clamp(max=1)
    contrast = pieces.flatten(2).std(2, correction=0)
    return 0.6 * (1 - sharpness) + 0.4 * (1 - contrast)


def laplacian(pieces: Tensor) -> Tensor:
    """Return the sum of the neighbours' differences to each number of (B, P, *sizes).

    A number at an edge has none beyond it.
    """
    total = torch.zeros_like(pieces)
    for axis in range(2, pieces.dim()):
        steps = pieces.diff(dim=axis)  # to the next one
        nothing = torch.zeros_like(pieces.narrow(axis, 0, 1))
        total += torch.cat([steps, nothing], axis) - torch.cat([nothing, steps], axis)
    return total


def content_shares(num_parts: int, first: float, middle: float, last: float) -> Tensor:
    """Return the weight of its content in each part's score, (P,); one part alone is a first."""
    shares = torch.full((num_parts,), middle)
    shares[-1], shares[0] = last, first
    return shares
