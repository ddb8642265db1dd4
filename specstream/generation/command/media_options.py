"""The options of `generate.py` that are for diffusion models of media: `--media.steps 50`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MediaOptions:
    """How images, videos and sounds are sampled.

    Args:
        samples: how many, side by side in one file.
        steps: denoising steps of each.
        eta: 0 is the deterministic sampler, 1 the ancestral one; drafts are exact above 0.
        guidance: weight of the prompt; 1 is that of training, more follows it more closely.
        window: steps drafted in a round, at most; none: 8.
        free_draft: draft without a trained drafter, from the target's last estimate of the data or
            its last velocity.
    """

    samples: int = 1
    steps: int = 50
    eta: float = 1.0
    guidance: float = 1.0
    window: int | None = None
    free_draft: Literal["estimate", "velocity"] | None = None

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("steps", self.steps)):
            if not 1 <= value <= 10_000:
                raise ValueError(f"media.{name} must be in 1..10000, got {value}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"media.eta must be in [0, 1], got {self.eta}")
        if self.window is not None and not 0 <= self.window <= 64:
            raise ValueError(f"media.window must be in 0..64, got {self.window}")
