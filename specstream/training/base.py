"""What every training module of specstream shares: sums for losses, one exact division, one optimizer.

A loss is returned as a SUM over scored elements with their count.  Gradients of sums are accumulated over
micro-batches and devices, and divided once, just before clipping and the optimizer step, by the global count.
So two devices, or two accumulated micro-batches with unequal numbers of scored tokens, give the very gradient
of one large batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from specstream.training.optimization import (
    Schedule,
    WarmupCosine,
    divide_gradients,
    parameter_groups,
)

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class LossSum:
    """A loss summed over the scored elements of one micro-batch.

    total: () float, with gradient.  count: () how many elements were summed.
    metrics: name -> () sums over the same elements, without gradient, logged divided by the count.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class SummedLossModule(L.LightningModule, ABC):
    """A LightningModule whose loss is a sum, divided once per optimizer step by the global count."""

    def __init__(self, optimizer: OptimizerCallable = AdamW, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.build_optimizer = optimizer
        self.schedule = schedule if schedule is not None else WarmupCosine()
        self.sums: dict[str, Tensor] = {}
        self.val_means = torch.nn.ModuleDict()

    @abstractmethod
    def loss(self, batch: Batch) -> LossSum:
        """The training loss of one micro-batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        for name, value in {"loss": loss.total, "count": loss.count, **loss.metrics}.items():
            value = value.detach().to(torch.float64 if value.device.type == "cpu" else torch.float32)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        # Lightning divides by the number of accumulated micro-batches; the exact division comes later.
        return loss.total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name] for name in names])
        # mean over devices: DDP and FSDP average gradients, so the sums are averaged just the same
        sums = self.trainer.strategy.reduce(sums, reduce_op="mean")
        averages = dict(zip(names, sums.unbind(), strict=True))
        count = averages.pop("count").clamp(min=1)
        divide_gradients(self.parameters(), count.float())
        self.log_dict(
            {f"train/{name}": (value / count).float() for name, value in averages.items()}, prog_bar=True
        )
        self.sums = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(batch)
        count = loss.count.clamp(min=1)
        for name, value in {"loss": loss.total, **loss.metrics}.items():
            if name not in self.val_means:
                self.val_means[name] = MeanMetric().to(self.device)
            self.val_means[name].update(value.detach() / count, weight=loss.count)

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.items():
            self.log(f"val/{name}", mean.compute(), prog_bar=name == "loss", rank_zero_only=False)
            mean.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        total_steps = int(self.trainer.estimated_stepping_batches)
        optimizer = self.build_optimizer(parameter_groups(self))
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.scale(step, total_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
