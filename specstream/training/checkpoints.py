"""When a run is saved, and why a failed save loses nothing.

`last.ckpt` is written every so many steps or minutes, `best.ckpt` when the validation loss has
fallen.  A checkpoint is written under a temporary name and then renamed, so the one before survives
a full disk; a folder of shards (FSDP2), which Lightning writes itself, does not.  Ctrl-C and
SIGTERM save at the next step boundary, where resuming is exact, and end the run.
"""

from __future__ import annotations

import os
import pickle
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

from specstream.training.history import HistoryLogger
from specstream.training.run_folder import RunFolder, say

DAMAGED = (
    RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError, ImportError,
    pickle.UnpicklingError,
)  # fmt: skip


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to `<name>.part` and renames: a reader never sees half a checkpoint.

    A failed write is noted in `failure` instead of raised, because it happens in one process while
    the others wait; `RunCheckpoints` tells them all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure = ""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        part = path.with_name(path.name + ".part")
        self.failure = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__ or error
            self.failure = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        try:
            checkpoint = super().load_checkpoint(path, map_location, weights_only)
        except DAMAGED as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            others = RunFolder(Path(path).parent).other_checkpoints(Path(path))
            offer = f"; resume from {others[0]} instead" if others else ""
            raise ValueError(f"checkpoint {path} is damaged ({reason}){offer}") from error
        if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
            raise ValueError(f"{path} is not the checkpoint of a training run")
        return checkpoint


class TrainingStopped(Exception):
    """Raised at a step boundary after a signal, once `last.ckpt` is written."""

    def __init__(self, signal_number: int, checkpoint: Path, step: int) -> None:
        super().__init__(f"{signal.Signals(signal_number).name} at step {step}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint


class SaveFailed(Exception):
    """The last save of a run did not succeed; the message is one line."""


class RunCheckpoints(Checkpoint):
    """Keeps `last.ckpt` and `best.ckpt` in the run folder.

    `every_steps` or `every_minutes`, whichever comes first; 0 switches one off.  The lowest value
    of `monitor` makes `best.ckpt`.
    """

    def __init__(
        self,
        run: RunFolder,
        writer: AtomicCheckpointIO,
        every_steps: int = 500,
        every_minutes: float = 5.0,
        monitor: str = "val/loss",
    ) -> None:
        super().__init__()
        self.run = run
        self.writer = writer
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
        for logger in trainer.loggers:
            if isinstance(logger, HistoryLogger):
                logger.forget_from(trainer.global_step)
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous_handlers[number] = signal.signal(number, self._note_signal)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = trainer.strategy.reduce_boolean_decision(self.signal_number != 0, all=False)
        if stop:
            self._save(trainer, self.run.last, required=True)
            log_step(trainer)
            number = self.signal_number or signal.SIGTERM
            raise TrainingStopped(number, self.run.last, trainer.global_step)
        if self._is_due(trainer):
            self._save(trainer, self.run.last)
            self.saved_step, self.saved_time = trainer.global_step, time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or trainer.state.fn != "fit":
            return
        if float(value) < self.best:
            self.best = float(value)
            self._save(trainer, self.run.best)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, self.run.last, required=True)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _is_due(self, trainer: L.Trainer) -> bool:
        by_steps = self.every_steps and trainer.global_step - self.saved_step >= self.every_steps
        seconds = time.monotonic() - self.saved_time
        by_time = self.every_minutes and seconds >= 60 * self.every_minutes
        return trainer.strategy.reduce_boolean_decision(bool(by_steps or by_time), all=False)

    def _save(self, trainer: L.Trainer, path: Path, required: bool = False) -> None:
        trainer.save_checkpoint(path, weights_only=False)
        failure = trainer.strategy.broadcast(self.writer.failure)
        if not failure:
            return
        kept = f"the {path.name} before it is kept" if path.exists() else "there is none before it"
        line = f"could not write {path} at step {trainer.global_step}: {failure}; {kept}"
        if required:
            raise SaveFailed(line)
        say(f"{line}; training goes on")

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        name = signal.Signals(number).name
        say(f"\n{name}: saving at the end of this step (Ctrl-C again: stop at once)")

    def _restore_handlers(self) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}


def log_step(trainer: L.Trainer) -> None:
    """Log the step just done, as Lightning would have done after this hook."""
    values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, trainer.global_step - 1)
