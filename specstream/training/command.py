"""What `train.py` does: parse, open the run folder, fit, export."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.tensor import DTensor

import specstream.data.text  # noqa: F401  --help names the data modules that are imported
from specstream.config_errors import ConfigError, OneLineErrors
from specstream.data.loader import TooFewRows
from specstream.training.base import SummedLossModule
from specstream.training.checkpoints import (
    AtomicCheckpointIO,
    RunCheckpoints,
    SaveFailed,
    TrainingStopped,
)
from specstream.training.history import HistoryLogger, plot_losses
from specstream.training.model_blocks import check_model_blocks
from specstream.training.model_card import write_model_card
from specstream.training.progress import StepProgress
from specstream.training.provenance import write_provenance
from specstream.training.run_folder import RunFolder, say
from specstream.training.sharding import is_sharded
from specstream.training.wandb_run import WandbRun, note_run_id

DESCRIPTION = "Train a draft model or a target; configs/train holds complete examples."


class TrainParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with errors of one line."""


class SaveRunConfig(SaveConfigCallback):
    """Opens the run folder with config.yaml and provenance.json.

    Later than Lightning would, when data and models are built and every check of the fit is passed:
    a run that fails before leaves nothing behind.  What it replaces is set aside, and dropped once
    there is a checkpoint.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait for on_train_start."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.open_run(trainer)

    @rank_zero_only
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        run = RunFolder(Path(self.config["run"]))
        if run.replaced.exists() and run.has_saved():
            run.settle()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.open_run(trainer)  # where no step was left to train, but the export is to come

    @rank_zero_only
    def open_run(self, trainer: L.Trainer) -> None:
        """Write what is known of the run, the first time that this is called."""
        if self.already_saved:
            return
        self.already_saved = True
        run = Path(self.config["run"])
        resumed = self.config["ckpt_path"] is not None
        if not resumed:
            RunFolder(run).set_aside()
        run.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, run / "config.yaml", skip_unset=False, overwrite=True)
        facts = write_provenance(run / "provenance.json", self.config["seed_everything"], resumed)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                note_run_id(run, str(logger.version))
            logger.log_hyperparams({"config": self.config.as_dict(), "provenance": facts})


class TrainCLI(LightningCLI):
    """The parser of train.py, and the objects it makes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, required=True, help="run folder, checkpoints/<name>")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace a run")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="resume from last, best or a file"
        )
        parser.add_argument("--checkpoint.every_steps", type=int, default=500, help="0: never")
        parser.add_argument("--checkpoint.every_minutes", type=float, default=5.0, help="0: never")
        parser.add_argument("--wandb", type=WandbRun | None, default=None, help="also log to W&B")
        parser.link_arguments("run", "trainer.default_root_dir")

    def before_instantiate_classes(self) -> None:
        check_devices(self.config["trainer"]["accelerator"], self.config["trainer"]["devices"])
        check_numbers(self.config["trainer"], self.config["checkpoint"])
        self.run_folder = RunFolder(Path(self.config["run"]))
        later_process = bool(getattr(rank_zero_only, "rank", None))  # the first one is writing
        may_exist = self.config["overwrite"] or later_process
        self.resume_from = self.run_folder.open(may_exist, self.config["ckpt_path"])
        rows = self.config["data"].get("init_args", {}).get("sequence_length")
        check_model_blocks(self.config["model"], rows, self.run_folder.path)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ModuleNotFoundError as error:  # of an option that needs a package that is not here
            raise ConfigError(f"config error: {error}") from error
        self.model.run_seed = int(self.config["seed_everything"])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        run = self.run_folder
        configured = self._get(self.config_init, "trainer")
        self.history = HistoryLogger(run.path)
        wandb_run = self._get(self.config_init, "wandb")
        resuming = self.resume_from is not None
        sent = [wandb_run.logger(run.path, resuming)] if wandb_run is not None else []
        given = [x for x in _as_list(configured["logger"]) if not isinstance(x, bool)]
        configured["logger"] = [*given, *sent, self.history]
        writer = AtomicCheckpointIO()
        configured["plugins"] = [*_as_list(configured["plugins"]), writer]
        checkpoint = self._get(self.config_init, "checkpoint")
        keeper = RunCheckpoints(run, writer, checkpoint["every_steps"], checkpoint["every_minutes"])
        bar = [] if configured["enable_progress_bar"] is False else [StepProgress()]
        configured["callbacks"] = [*_as_list(configured["callbacks"]), *bar, keeper]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
            raise ConfigError(f"config error: trainer: {error}") from error

    @property
    def has_opened_run(self) -> bool:
        """Whether this process has begun to write the run folder."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(c, SaveRunConfig) and c.already_saved for c in callbacks)


def check_devices(accelerator: object, devices: object) -> None:
    """Raise ValueError for more processes on a CPU than it has cores: each would start, and wait.

    Of other accelerators Lightning knows how many there are.
    """
    on_cpu = accelerator == "cpu" or (
        accelerator == "auto" and not torch.accelerator.is_available()
    )
    cores = os.cpu_count() or 1
    if on_cpu and str(devices).isdecimal() and int(str(devices)) > cores:
        raise ValueError(
            f"config error: trainer.devices: at most {cores} on this machine's CPU cores, "
            f"got {devices}"
        )


def check_numbers(trainer: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers that Lightning takes and then divides by, and the like."""
    if trainer["fast_dev_run"]:
        raise ValueError(
            "config error: trainer.fast_dev_run: keeps nothing that could be exported; give "
            "max_steps 2, limit_val_batches 1 and another --run"
        )
    for name in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
        value = trainer[name]
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"config error: trainer.{name}: must be above 0, got {value}")
    algorithm = trainer["gradient_clip_algorithm"]
    if algorithm not in (None, "norm"):
        raise ValueError(
            f"config error: trainer.gradient_clip_algorithm: gradients are clipped by norm only, "
            f"not by {getattr(algorithm, 'value', algorithm)}"
        )
    numbers = {"trainer.gradient_clip_val": trainer["gradient_clip_val"]}
    numbers |= {f"checkpoint.{name}": checkpoint[name] for name in ("every_steps", "every_minutes")}
    for name, value in numbers.items():
        if value is not None and not value >= 0:  # nan neither
            raise ValueError(f"config error: {name}: must be 0 or more, got {value}")


def run_training(arguments: list[str]) -> int:
    """Train as the arguments say; return the exit code.  A user's mistake is a ValueError."""
    try:
        return fit_and_export(arguments)
    except TooFewRows:
        if getattr(rank_zero_only, "rank", 0):  # the first process says the same
            return 2
        raise
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        print("another process of this training has ended; it says why", file=sys.stderr)
        return 1


def fit_and_export(arguments: list[str]) -> int:
    """Do what `run_training` does, with Lightning's own exception for wrong trainer options."""
    cli = TrainCLI(
        SummedLossModule,
        L.LightningDataModule,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"enable_model_summary": False, "num_sanity_val_steps": 0},
        seed_everything_default=0,
        parser_class=TrainParser,
        parser_kwargs={"description": DESCRIPTION},
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=arguments,
        run=False,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
    try:
        cli.trainer.fit(
            cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from, weights_only=False
        )
        finish(cli)
    except TrainingStopped as stopped:
        say(f"{stopped}: saved {stopped.checkpoint}; resume with --ckpt_path last")
        return 130 if stopped.signal_number == signal.SIGINT else 143
    except SystemExit:
        if not cli.trainer.interrupted:
            raise
        say(f"stopped at once; what was saved before is in {cli.run_folder.path}")
        return 130
    except SaveFailed as failed:
        say(str(failed))
        return 1
    finally:
        if cli.has_opened_run:
            cli.run_folder.settle()
        if any(isinstance(logger, WandbLogger) for logger in cli.trainer.loggers):
            import wandb

            wandb.finish()
    return 0


def finish(cli: TrainCLI) -> None:
    """Export what was trained, with its loss curve and its card."""
    run, processor = cli.run_folder.path, cli.datamodule.processor
    refuse_diverged(cli)
    if not cli.trainer.is_global_zero:
        if is_sharded(cli.model):  # gathering needs every process; only the first one's files stay
            with TemporaryDirectory() as elsewhere:
                cli.model.export(Path(elsewhere), processor)
        return
    try:
        exported = cli.model.export(run, processor)
        plot_losses(run / "metrics.jsonl", exported / "loss.png")
        write_model_card(run, exported)
    except OSError as error:
        raise SaveFailed(
            f"could not export to {run}: {error.strerror or error}; the training is kept, and "
            "--ckpt_path last exports it again"
        ) from error
    say(f"trained {cli.trainer.global_step} steps; wrote {exported}")


def refuse_diverged(cli: TrainCLI) -> None:
    """Raise SaveFailed, in every process, where a trained weight is no finite number."""
    parameters = [p for p in cli.model.parameters() if p.requires_grad]
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    diverged = not all(bool(shard.isfinite().all()) for shard in shards)
    if is_sharded(cli.model):
        diverged = cli.trainer.strategy.reduce_boolean_decision(diverged, all=False)
    if diverged:
        raise SaveFailed(
            f"training diverged: after {cli.trainer.global_step} steps there are weights that are "
            f"not finite, so nothing is exported; the checkpoints in {cli.run_folder.path} are kept"
        )


def lost_peer(error: RuntimeError) -> bool:
    """Whether another process of the run ended while this one waited for it."""
    return "Connection closed by peer" in str(error)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
