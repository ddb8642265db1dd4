"""Learning-rate schedules and parameter groups: what happens around the optimizer, not inside it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Schedule(ABC):
    """The learning rate of a step as a fraction of the peak one."""

    @abstractmethod
    def scale(self, step: int, total_steps: int) -> float:
        """Fraction in [0, 1] at `step`, counted from 0, of `total_steps` optimizer steps."""


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to `final_fraction` (Loshchilov & Hutter 2017, no restarts).

    warmup_steps: optimizer steps until the peak is reached.
    final_fraction: what is left of the peak after the last step.
    decay_steps: where the cosine ends; null takes the trainer's own number of steps.
    """

    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must lie in [0, 1], got {self.final_fraction}")

    def scale(self, step: int, total_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        end = max(self.decay_steps or total_steps, self.warmup_steps + 1)
        progress = min((step - self.warmup_steps) / (end - self.warmup_steps), 1.0)
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class ConstantRate(Schedule):
    """The peak from the first step to the last, after a linear warm-up."""

    warmup_steps: int = 0

    def scale(self, step: int, total_steps: int) -> float:
        return min((step + 1) / (self.warmup_steps + 1), 1.0)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, and vectors (norms, biases) without weight decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return groups


def divide_gradients(parameters: Iterable[nn.Parameter], divisor: Tensor) -> None:
    """Divide every gradient by the scalar `divisor`, in place and without waiting for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, divisor.to(gradients[0].device))
