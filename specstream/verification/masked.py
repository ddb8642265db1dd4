"""Rules that say which drafted tokens of a masked diffusion model's canvas stand.

Reading order: `CanvasVerifier` (the interface), `KeepOrRemask` and the four rules that judge each
position by the target's law there, then the two that judge nothing.

The target sees the whole draft at once and from both sides, so what it says of a position depends
on guesses that may fall themselves.  None of these rules keeps a law, and all say so.  Shapes: B
batch rows, C positions of the canvas, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specstream.structures import CanvasDraft, CanvasVerdict, Guarantee

SMALLEST_Q = 1e-12  # a drafter's zero is read as this in a divergence


class CanvasVerifier(ABC):
    """A rule of acceptance for a canvas: a frozen dataclass of its thresholds, without state.

    `needs_target` says whether it looks at the target's laws at all, `needs_draft_law` whether at
    the drafter's.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    needs_target: ClassVar[bool] = True
    needs_draft_law: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, draft: CanvasDraft, p: Tensor | None) -> CanvasVerdict:
        """Return which of the drafted positions are kept, and the canvas.

        p (B, C, V), float32 or float64: the target's law of each position given the draft; None
        is enough for a rule that does not need the target.  What p holds at positions that were
        not drafted does not matter.  A row may keep nothing: the caller sees to its progress.
        """


class KeepOrRemask(CanvasVerifier):
    """A rule that keeps a drafted token as it is or masks its position again."""

    def __call__(self, draft: CanvasDraft, p: Tensor | None) -> CanvasVerdict:
        """Return the drafted positions that stand; the canvas is the draft's."""
        assert p is not None
        return CanvasVerdict(draft.drafted & self.stands(draft, p), draft.tokens)

    @abstractmethod
    def stands(self, draft: CanvasDraft, p: Tensor) -> Tensor:
        """Return where (B, C) bool the target agrees, drafted or not."""


@dataclass(frozen=True)
class ExactMatch(KeepOrRemask):
    """A drafted token stands where it is the target's most probable one.

    Goyal et al. 2026, DualDiffusion (arXiv 2604.05250).  The strictest rule for a greedy target;
    a drafted token that the target finds as good as its own best one falls all the same.
    """

    def stands(self, draft: CanvasDraft, p: Tensor) -> Tensor:
        """Return where the drafted token is the target's best."""
        return p.argmax(-1) == draft.tokens


@dataclass(frozen=True)
class ConfidenceThreshold(KeepOrRemask):
    """A drafted token stands where the target gives it at least `threshold`.

    Goyal et al. 2026, DualDiffusion (arXiv 2604.05250).  Above one half, what stands is also the
    target's most probable token.  Choose it where a wrong token costs more than a round.

    Raises `ValueError` for a threshold outside (0, 1].
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")

    def stands(self, draft: CanvasDraft, p: Tensor) -> Tensor:
        """Return where the target gives the drafted token enough."""
        return p.gather(-1, draft.tokens.unsqueeze(-1)).squeeze(-1) >= self.threshold


@dataclass(frozen=True)
class DisagreementWithConfidence(KeepOrRemask):
    """A drafted token falls only where the target prefers another by at least `threshold`.

    After Goyal et al. 2026, DualDiffusion (arXiv 2604.05250); here the threshold is the
    probability of the target's own best token: where the target is unsure, the drafter is
    believed.  Threshold 0 is `ExactMatch`, and 1 lets through all that the target is not certain
    about.  Choose it where drafter and target are of similar quality.

    Raises `ValueError` for a threshold outside [0, 1].
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")

    def stands(self, draft: CanvasDraft, p: Tensor) -> Tensor:
        """Return where the target agrees or is not sure enough to object."""
        best = p.max(-1)
        return (best.indices == draft.tokens) | (best.values < self.threshold)


@dataclass(frozen=True)
class KLThreshold(KeepOrRemask):
    """A drafted token stands where KL(p || q), in nats, is at most `threshold`.

    It compares the laws and not the token: where they agree an unlikely draw of the drafter
    stands, as it must for sampled output to keep its variety.  q is the drafter's law when it drew
    the token, from a canvas with more masks than the one the target sees: some of the divergence
    is what the later tokens taught.  A q of zero (top-k, top-p, a greedy drafter) is read as
    `SMALLEST_Q`: it costs 28 nats times what p holds there, instead of infinitely many.

    Raises `ValueError` for a negative threshold.
    """

    threshold: float
    needs_draft_law: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}")

    def stands(self, draft: CanvasDraft, p: Tensor) -> Tensor:
        """Return where the drafter's law is close to the target's."""
        # The ratio first: equal laws give log 1 = 0 exactly, term by term.
        ratios = p / draft.probs.clamp(min=SMALLEST_Q)  # (B, C, V)
        return torch.xlogy(p, ratios).sum(-1) <= self.threshold


@dataclass(frozen=True)
class TrustVerifier(CanvasVerifier):
    """Every drafted position stands, with the target's most probable token in it.

    Goyal et al. 2026, DualDiffusion (arXiv 2604.05250); the rule its evaluation code runs with.
    The draft is a context for one parallel step of the target, whose tokens are then taken
    without regard to each other: each round finishes what was drafted, however bad.
    """

    def __call__(self, draft: CanvasDraft, p: Tensor | None) -> CanvasVerdict:
        """Return all of the draft, in the target's words."""
        assert p is not None
        return CanvasVerdict(draft.drafted, torch.where(draft.drafted, p.argmax(-1), draft.tokens))


@dataclass(frozen=True)
class NoVerification(CanvasVerifier):
    """Every drafted token stands: the drafter alone, the baseline of the other rules."""

    needs_target: ClassVar[bool] = False

    def __call__(self, draft: CanvasDraft, p: Tensor | None) -> CanvasVerdict:
        """Return all of the draft as it is."""
        return CanvasVerdict(draft.drafted, draft.tokens)
