"""The options of `generate.py` that are for masked diffusion models: `--canvas.steps 16`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specstream.generation.batch import Limits
from specstream.generation.masked import Sampler
from specstream.sampling import Sampling
from specstream.unmasking import StaticSchedule, Unmasking


@dataclass(frozen=True)
class CanvasOptions:
    """How canvases of a masked diffusion model are filled.

    Args:
        steps: denoising steps of the static schedule, in each block.
        order: which positions that schedule fills first.
        unmasking: instead of the schedule, a rule (class_path and init_args), such as Threshold.
        block_tokens: fill from left to right in blocks of so many positions; none: all at once.
        guidance: of classifier-free guidance; 0 is off.
        nested_steps: verify so many of the schedule's steps in one pass (FreeDave); 0 is off.  With
            `--draft_tokens auto` up to so many.
        copies: canvases that the target scores a draft on; 1 shows it the whole draft; none: 1 for
            a target trained with corruption, else 2.
        windows: passes of the trunk that fill a canvas by self-speculation.
        max_target_calls: after so many passes the rest is filled at once; none: never.
        sure: the drafter leaves guesses less probable than this to the target; none: as it was
            built.
    """

    steps: int = 32
    order: Literal["confidence", "random", "margin", "entropy"] = "confidence"
    unmasking: Unmasking | None = None
    block_tokens: int | None = None
    guidance: float = 0.0
    nested_steps: int = 0
    copies: int | None = None
    windows: int = 4
    max_target_calls: int | None = None
    sure: float | None = None

    def __post_init__(self) -> None:
        if self.nested_steps < 0:
            raise ValueError(f"canvas.nested_steps must not be negative, got {self.nested_steps}")
        if self.unmasking is not None and (self.steps, self.order) != (32, "confidence"):
            raise ValueError("canvas.unmasking replaces the schedule of canvas.steps and order")

    def check_room(self, positions: int) -> None:
        """Raise ValueError for a number that means nothing on canvases of so many positions."""
        for name in ("steps", "copies", "windows", "max_target_calls"):
            value = getattr(self, name)
            if value not in (None, getattr(CanvasOptions, name)) and value > positions:
                raise ValueError(
                    f"canvas.{name} must be at most {positions}, the positions of the canvas, "
                    f"not {value}"
                )

    def sampler(self, sampling: Sampling, limits: Limits) -> Sampler:
        """Return how the target fills canvases."""
        rule = self.unmasking or StaticSchedule(self.steps, self.order)
        return Sampler(rule, sampling, limits, self.block_tokens, self.guidance)
