"""Exponential moving average of the trained weights (Polyak & Juditsky 1992).

The average is what is validated, exported and found in a checkpoint's `state_dict`; the weights
that the optimizer moves are kept beside it, so that resuming is exact.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from specstream.training.base import OPTIMIZED
from specstream.training.sharding import is_sharded


class WeightAveraging(L.Callback):
    """Keeps average <- decay * average + (1 - decay) * weights after every optimizer step.

    In the first steps the decay is lower, (1 + step) / (10 + step), so that the random start is
    forgotten.  Raises ValueError for a decay outside [0, 1) and for sharded models.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.last_step = 0
        self.swapped = False
        self.weights: dict[str, Tensor] = {}  # those the optimizer moves, while swapped

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trained = _trained(pl_module)
        if is_sharded(pl_module):
            raise ValueError("WeightAveraging does not work on sharded models; use strategy ddp")
        if not self.average:
            self.average = {name: kept(p) for name, p in trained.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last_step = trainer.global_step  # restored only now where a run is resumed

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self.last_step:
            return  # gradients are being accumulated
        self.last_step = step
        decay = min(self.decay, (1 + step) / (10 + step))
        trained = _trained(pl_module)
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.average[name] for name in trained],
                [p.detach().to(self.average[name]) for name, p in trained.items()],
                1 - decay,
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.swapped:
            self.swap(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module, for the export.

        RunCheckpoints, which Lightning calls last, saves after this: `swapped` says what is where.
        """
        self.swap(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do what the end of training does, where a resumed run had no step left to train."""
        if not self.swapped:
            self.swap(pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        present = {name: p.detach() for name, p in _trained(pl_module).items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.average}
        checkpoint[OPTIMIZED] = self.weights if self.swapped else present

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        trained = _trained(pl_module)
        saved = checkpoint["state_dict"]
        self.average = {name: kept(saved[name].to(p.device)) for name, p in trained.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(checkpoint[OPTIMIZED][name])

    def swap(self, pl_module: L.LightningModule) -> None:
        """Put the average into the module, or what the optimizer moves back."""
        trained = _trained(pl_module)
        shown = self.weights if self.swapped else self.average
        kept_aside = {} if self.swapped else {n: p.detach().clone() for n, p in trained.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(shown[name])
        self.weights, self.swapped = kept_aside, not self.swapped


def kept(weights: Tensor) -> Tensor:
    """Return a copy in float32, or wider: in fewer digits a small step towards weights is none."""
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32), copy=True)


def _trained(module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
