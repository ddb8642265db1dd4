"""What every training module of specstream shares: sums for losses, and one exact division.

A loss is returned as a SUM over scored elements with their count.  Gradients of sums are
accumulated over micro-batches and devices, and divided once, just before clipping and the
optimizer step, by the global count.  So two devices, or accumulated micro-batches with unequal
numbers of scored tokens, give the very gradient of one large batch.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from specstream.processors import TextProcessor
from specstream.sampling import Noise
from specstream.training.optimization import (
    Schedule,
    WarmupCosine,
    average_replicated_gradients,
    clip_gradients,
    divide_gradients,
    parameter_groups,
)

Batch = Mapping[str, Tensor]
VALIDATION = -1  # stands for the epoch: validation draws the same noise every time
OPTIMIZED = "optimized_weights"  # key in checkpoints whose `state_dict` is a moving average


@dataclass(frozen=True)
class LossSum:
    """A loss summed over the scored elements of one micro-batch.

    `total` () carries the gradient, `count` () is how many elements were summed; `metrics` are
    further sums () over the same elements, without gradient, logged divided by the count.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class SummedLossModule(L.LightningModule, ABC):
    """A LightningModule whose loss is a sum, divided once per optimizer step by the global count.

    `optimizer` is given the parameter groups; `schedule` scales its learning rate by the step.
    Logits exist for `chunk_tokens` tokens at once.
    Only parameters that require gradients are saved in checkpoints, and exactly those must be in
    one that is loaded.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        chunk_tokens: int = 1024,
    ) -> None:
        super().__init__()
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        self.chunk_tokens = chunk_tokens
        self.build_optimizer = optimizer
        self.schedule = schedule if schedule is not None else WarmupCosine()
        self.run_seed = 0  # train.py gives its seed_everything; it keys what training draws itself
        self.sums: dict[str, Tensor] = {}
        self.step_began = time.perf_counter()
        self.val_means = torch.nn.ModuleDict()
        self.strict_loading = False  # frozen tensors are not in checkpoints: see on_load_checkpoint

    @abstractmethod
    def loss(self, batch: Batch) -> LossSum:
        """Return the loss of one micro-batch."""

    @abstractmethod
    def export(self, run: Path, processor: TextProcessor) -> Path:
        """Write what generation loads into the run folder; returns the folder written."""

    def epoch_noise(self, epoch: int | None = None) -> Noise:
        """Return the noise of this or another epoch, or of validation; keys are what rows hold."""
        epoch = self.current_epoch if epoch is None else epoch
        epoch = epoch if self.training else VALIDATION
        return Noise(self.run_seed * 1_000_003 + epoch, self.device)

    def training_loss(self, batch: Batch, batch_idx: int) -> LossSum:
        """Return the loss to train on; a subclass may change the batch first."""
        return self.loss(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch, batch_idx)
        for name, value in {"loss": loss.total, "count": loss.count, **loss.metrics}.items():
            value = value.detach().to(torch.float64 if self.device.type == "cpu" else torch.float32)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        # Lightning divides by the number of accumulated micro-batches; ours comes later
        return loss.total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name] for name in names])
        # DDP and FSDP average gradients over devices, so the counts are averaged just the same
        sums = self.trainer.strategy.reduce(sums, reduce_op="mean")
        means = dict(zip(names, sums.unbind(), strict=True))
        count = means.pop("count").clamp(min=1e-9)
        average_replicated_gradients(self.parameters())
        divide_gradients(self.parameters(), count.float())
        values = {f"train/{name}": (value / count).float() for name, value in means.items()}
        values["train/learning_rate"] = torch.tensor(optimizer.param_groups[0]["lr"])
        now = time.perf_counter()
        values["train/tokens_per_second"] = (
            count * self.trainer.world_size / (now - self.step_began)
        )
        self.log_dict({name: value.float() for name, value in values.items()})
        self.sums, self.step_began = {}, now

    def on_train_epoch_start(self) -> None:
        self.step_began = time.perf_counter()

    def on_validation_end(self) -> None:
        self.step_began = time.perf_counter()  # validation is not counted as training

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(
                f"gradients are clipped by norm only, not by {gradient_clip_algorithm}"
            )
        norm = clip_gradients(self.parameters(), gradient_clip_val or None)
        self.log("train/gradient_norm", norm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(batch)
        count = loss.count.clamp(min=1)
        for name, value in {"loss": loss.total, **loss.metrics}.items():
            if name not in self.val_means:
                self.val_means[name] = MeanMetric().to(self.device)
            self.val_means[name].update(value.detach() / count, weight=loss.count)

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.items():
            assert isinstance(mean, MeanMetric)
            # torchmetrics has summed over processes; sync_dist only tells Lightning so
            self.log(f"val/{name}", mean.compute(), sync_dist=True)
            mean.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "trainer: training has no end that a schedule could plan for; give max_steps or "
                "max_epochs"
            )
        total_steps = int(steps)
        optimizer = self.build_optimizer(parameter_groups(self))
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.scale(step, total_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def trained_names(self) -> set[str]:
        """Return the names of the parameters that are trained, and so saved."""
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state, trained = checkpoint["state_dict"], self.trained_names()
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" not in checkpoint:
            return  # a sharded folder: torch.distributed.checkpoint compares names itself
        averaging = any(type(c).__name__ == "WeightAveraging" for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        if (OPTIMIZED in checkpoint) != averaging:
            raise ValueError("resume with WeightAveraging if and only if the run began with it")
        state, trained = checkpoint["state_dict"], self.trained_names()
        found = set(state)
        if found != trained:
            missing, extra = sorted(trained - found), sorted(found - trained)
            raise ValueError(
                f"the checkpoint is of another model: it lacks {len(missing)} trained tensors "
                f"{missing[:2]} and holds {len(extra)} that are not trained here {extra[:2]}"
            )
        for name, parameter in self.named_parameters():
            if name in trained and state[name].shape != parameter.shape:
                raise ValueError(
                    f"the checkpoint is of another model: {name} is {tuple(state[name].shape)} in "
                    f"it and {tuple(parameter.shape)} here"
                )
