"""When a run is saved, and why a failed save loses nothing.

`last.ckpt` is written every so many steps or minutes, `best.ckpt` when the validation loss has fallen.  A
checkpoint is first written under a temporary name and then renamed, so the one before survives a full disk.
Ctrl-C and SIGTERM save at the next step boundary, where resuming is exact, and end the run.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to `<name>.part` and renames: a reader never sees half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


class TrainingStopped(Exception):  # noqa: N818  (an end that was asked for, not an error)
    """Raised at a step boundary after a signal, once `last.ckpt` is written."""

    def __init__(self, signal_number: int, checkpoint: Path, step: int) -> None:
        super().__init__(f"{signal.Signals(signal_number).name} at step {step}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint
        self.step = step


class RunCheckpoints(Checkpoint):
    """Keeps `last.ckpt` and `best.ckpt` in the run folder.

    every_steps, every_minutes: whichever comes first; 0 switches one off.
    monitor: metric whose lowest value makes `best.ckpt`.
    """

    def __init__(
        self, run: Path, every_steps: int = 500, every_minutes: float = 5.0, monitor: str = "val/loss"
    ) -> None:
        super().__init__()
        self.run = run
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.monitor = monitor
        self.best = float("inf")
        self.saved_step = -1
        self.saved_time = time.monotonic()
        self.signal_number = 0
        self.previous_handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous_handlers[number] = signal.signal(number, self._note_signal)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = trainer.strategy.reduce_boolean_decision(self.signal_number != 0, all=False)
        if stop or self._is_due(trainer):
            self._save(trainer, "last.ckpt")
        if stop:
            raise TrainingStopped(self.signal_number or signal.SIGTERM, self.run / "last.ckpt", trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or trainer.state.fn != "fit":
            return
        if float(value) < self.best:
            self.best = float(value)
            trainer.save_checkpoint(self.run / "best.ckpt")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, "last.ckpt")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _is_due(self, trainer: L.Trainer) -> bool:
        by_steps = self.every_steps and trainer.global_step - self.saved_step >= self.every_steps
        by_time = self.every_minutes and time.monotonic() - self.saved_time >= 60 * self.every_minutes
        return trainer.strategy.reduce_boolean_decision(bool(by_steps or by_time), all=False)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        if trainer.global_step == self.saved_step and (self.run / name).exists():
            return
        trainer.save_checkpoint(self.run / name)
        self.saved_step, self.saved_time = trainer.global_step, time.monotonic()

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        print(f"\n{signal.Signals(number).name}: saving after this step (again: stop at once)", flush=True)

    def _restore_handlers(self) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}
