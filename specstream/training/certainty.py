"""Certainty distillation (dParallel, Chen et al. 2025, arXiv 2509.26488): be right, and be sure.

A masked diffusion model fills in one step only what it is sure of, so one that is right but unsure
takes many steps.

Shapes: N scored positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specstream.divergences import Divergence, DPace, EndToEndTV, ForwardKL

LEAST = -1e4  # log probabilities below it are of nothing; keeps 0 log 0 finite


@dataclass(frozen=True)
class Certainty(Divergence):
    """Another divergence, plus `weight` times the draft's entropy where it is right already.

    Right is where the likeliest token is the label.  The entropy is taken at `temperature`, which
    below 1 leaves alone what is nearly sure; the divergence inside has its own.  Choose it for a
    drafter whose guesses mostly stand, but which makes few a step: best on rows that the target
    wrote, where certainty is of what the target says.
    Raises `ValueError` for a negative weight or a nested block loss.
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    weight: float = 2.0
    temperature: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be 0 or positive, got {self.weight}")
        if isinstance(self.divergence, EndToEndTV | DPace):
            raise ValueError(
                "Certainty adds to a divergence of single positions, got one of blocks"
            )

    @property
    def needs_target(self) -> bool:
        """Whether the divergence reads the target's logits."""
        return self.divergence.needs_target

    def __call__(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the inner divergence and what certainty adds to it, (N,)."""
        assert labels is not None
        value = self.divergence(target_logits, draft_logits, labels)
        right = draft_logits.argmax(-1) == labels
        return value + self.weight * torch.where(right, self._entropy(draft_logits), 0.0)

    def _entropy(self, logits: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_q = (logits / self.temperature).log_softmax(-1).clamp(min=LEAST)
        return -(log_q.exp() * log_q).sum(-1)  # (N,)
