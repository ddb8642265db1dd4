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

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trained = _trained(pl_module)
        if is_sharded(pl_module):
            raise ValueError("WeightAveraging does not work on sharded models; use strategy ddp")
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in trained.items()}

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
                [p.detach() for p in trained.values()],
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
        average, weights = (self.average, present)
        if self.swapped:
            average, weights = weights, average
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **average}
        checkpoint[OPTIMIZED] = weights

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        trained = _trained(pl_module)
        self.average = {name: checkpoint["state_dict"][name].to(p) for name, p in trained.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(checkpoint[OPTIMIZED][name])

    def swap(self, pl_module: L.LightningModule) -> None:
        """Exchange the module's trained weights and the average."""
        self.swapped = not self.swapped
        with torch.no_grad():
            for name, parameter in _trained(pl_module).items():
                weights = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(weights)


def _trained(module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
