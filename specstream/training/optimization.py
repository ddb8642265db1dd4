"""Around the optimizer: schedules, parameter groups, the one division of gradients, their clipping.

Gradients may be DTensors (sharded by FSDP2) beside plain tensors (replicated); each function here
works on the local part and sums over processes where a number of the whole is needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Schedule(ABC):
    """The learning rate of a step as a fraction of the peak one."""

    @abstractmethod
    def scale(self, step: int, total_steps: int) -> float:
        """Return the fraction in [0, 1] at `step`, counted from 0, of `total_steps` steps."""


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down (Loshchilov & Hutter 2017, without restarts).

    `warmup_steps` optimizer steps lead to the peak; `final_fraction` of it is left after the last
    step; the cosine ends at `decay_steps`, by default the trainer's own number of steps.
    Raises ValueError for a negative warm-up, a fraction outside [0, 1] and no `decay_steps` at all.
    """

    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must be in [0, 1], got {self.final_fraction}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps must be at least 1, got {self.decay_steps}")

    def scale(self, step: int, total_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        end = max(self.decay_steps or total_steps, self.warmup_steps + 1)
        progress = min((step - self.warmup_steps) / (end - self.warmup_steps), 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.final_fraction + (1 - self.final_fraction) * cosine


@dataclass(frozen=True)
class ConstantRate(Schedule):
    """The peak from the first step to the last, after a linear warm-up."""

    warmup_steps: int = 0

    def scale(self, step: int, total_steps: int) -> float:
        return min((step + 1) / (self.warmup_steps + 1), 1.0)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters: matrices, and vectors (norms, biases) without weight decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if p.ndim >= 2]}]
    vectors = [p for p in trained if p.ndim < 2]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return groups


def divide_gradients(parameters: Iterable[nn.Parameter], divisor: Tensor) -> None:
    """Divide every gradient by the scalar `divisor`, without waiting for the device."""
    gradients = _local_gradients(parameters)
    if gradients:
        torch._foreach_div_(gradients, divisor.to(gradients[0].device))


def average_replicated_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over processes the gradients that FSDP2 does not: those of unsharded parameters."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            dist.all_reduce(gradient)
            gradient.div_(dist.get_world_size())


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float | None) -> Tensor:
    """Scale gradients down to a joint L2 norm of `largest_norm`; return the norm before, ()."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    square = _square_norm(whole)
    if sharded:
        part = _square_norm(sharded)
        dist.all_reduce(part)
        square = square.to(part.device) + part
    norm = square.sqrt()
    if largest_norm is not None and gradients:
        factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(sharded + whole, factor.to((sharded + whole)[0].device))
    return norm


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def _square_norm(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(tensors)).float().square().sum()
