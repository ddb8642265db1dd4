"""What a person sees of a training: one bar counted in optimizer steps, one line a validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

SHOWN = ("loss", "tau", "alpha_1", "acceptance_expected", "speedup")
NOTES = {"speedup": " (rough)"}


class StepProgress(ProgressBar):
    """A rich bar where the screen is a terminal; elsewhere only the lines of validations."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.console = Console()
        self.bar: Progress | None = None

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (self.enabled and trainer.is_global_zero and self.console.is_terminal):
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
        )
        total = int(trainer.estimated_stepping_batches)
        self.bar.add_task("training", total=total, completed=trainer.global_step, values="")
        self.bar.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.bar is not None:
            loss = trainer.callback_metrics.get("train/loss")
            values = "" if loss is None else f"train/loss {float(loss):.4g}"
            self._update(completed=trainer.global_step, values=values)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._update(description="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._update(description="training")
        if self.enabled and trainer.is_global_zero and trainer.state.fn == "fit":
            line = f"step {trainer.global_step}: {summary(trainer.callback_metrics)}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _update(self, **values: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], **values)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def summary(metrics: Mapping[str, Tensor]) -> str:
    """One line of the validation metrics that are worth a look."""
    found = {name: metrics[f"val/{name}"] for name in SHOWN if f"val/{name}" in metrics}
    return ", ".join(f"val/{n} {float(v):.4g}{NOTES.get(n, '')}" for n, v in found.items())
