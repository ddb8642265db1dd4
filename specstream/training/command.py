"""What `train.py` does: parse, open the run folder, fit, export."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from specstream.config_errors import OneLineErrors
from specstream.training.base import SummedLossModule
from specstream.training.checkpoints import AtomicCheckpointIO, RunCheckpoints, TrainingStopped
from specstream.training.history import HistoryLogger, plot_losses
from specstream.training.model_card import write_model_card
from specstream.training.provenance import write_provenance
from specstream.training.run_folder import RunFolder


class TrainParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with errors of one line."""


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml and provenance.json into the run folder, and nowhere else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        run = Path(self.config["run"])
        run.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, run / "config.yaml", skip_none=False, overwrite=True)
        facts = write_provenance(run / "provenance.json", self.config["seed_everything"])
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": self.config.as_dict(), "provenance": facts})


class TrainCLI(LightningCLI):
    """The parser of train.py, and the objects it makes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, required=True, help="run folder, checkpoints/<name>")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace a run that exists")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="resume from: last, best or a file"
        )
        parser.add_argument("--checkpoint.every_steps", type=int, default=500, help="0: not by steps")
        parser.add_argument("--checkpoint.every_minutes", type=float, default=5.0, help="0: not by time")
        parser.link_arguments("run", "trainer.default_root_dir")

    def before_instantiate_classes(self) -> None:
        self.run_folder = RunFolder(Path(self.config["run"]))
        self.resume_from = None
        if rank_zero_only.rank in (None, 0):
            self.resume_from = self.run_folder.open(self.config["overwrite"], self.config["ckpt_path"])
        elif self.config["ckpt_path"] is not None:
            self.resume_from = self.run_folder.open(False, self.config["ckpt_path"])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        run = self.run_folder.path
        configured = self._get(self.config_init, "trainer")
        loggers = configured["logger"]
        if isinstance(loggers, bool) or loggers is None:
            loggers = []
        elif not isinstance(loggers, list):
            loggers = [loggers]
        self.history = HistoryLogger(run)
        configured["logger"] = [*loggers, self.history]
        configured["plugins"] = [*_as_list(configured["plugins"]), AtomicCheckpointIO()]
        checkpoint = self._get(self.config_init, "checkpoint")
        keeper = RunCheckpoints(run, checkpoint["every_steps"], checkpoint["every_minutes"])
        configured["callbacks"] = [*_as_list(configured["callbacks"]), keeper]
        return super().instantiate_trainer(**kwargs)


def run_training(arguments: list[str]) -> int:
    """Train as the arguments say; returns the exit code.  Raises ValueError for a user's mistake."""
    cli = TrainCLI(
        SummedLossModule,
        L.LightningDataModule,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"enable_model_summary": False, "num_sanity_val_steps": 0},
        seed_everything_default=0,
        parser_class=TrainParser,
        parser_kwargs={"description": train_description()},
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=arguments,
        run=False,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from, weights_only=False)
    except TrainingStopped as stopped:
        say(f"stopped by {stopped}, saved {stopped.checkpoint}; resume with: --ckpt_path last")
        return 130 if stopped.signal_number == signal.SIGINT else 143
    finish(cli)
    return 0


def finish(cli: TrainCLI) -> None:
    """Export what was trained, with its loss curve and its card."""
    run = cli.run_folder.path
    exported = cli.model.export(run, cli.datamodule.tokenizer)
    if cli.trainer.is_global_zero:
        plot_losses(run / "metrics.jsonl", exported / "loss.png")
        write_model_card(run, exported)
        say(f"trained {cli.trainer.global_step} steps; exported {exported}")


@rank_zero_only
def say(line: str) -> None:
    """Print one line on the main process."""
    print(line, flush=True)


def train_description() -> str:
    return "Train a draft model or a target; see configs/train for complete examples."


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
