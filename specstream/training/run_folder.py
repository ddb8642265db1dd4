"""The folder of one training run: what lies in it, and when it may be written.

    checkpoints/<name>/
        config.yaml  provenance.json  metrics.jsonl  samples.jsonl  (wandb/  wandb.json)
        last.ckpt  best.ckpt          every trained tensor, and what resuming needs
        draft/ or model/              what generation loads

A run that exists is refused, unless it is resumed or `--overwrite true` is given.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

WRITTEN_FILES = ("config.yaml", "provenance.json", "metrics.jsonl", "samples.jsonl", "wandb.json")
WRITTEN_FOLDERS = ("draft", "model")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the rules for opening it."""

    path: Path

    @property
    def last(self) -> Path:
        return self.path / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "best.ckpt"

    def exists(self) -> bool:
        """Whether a training has written here."""
        names = (*WRITTEN_FILES, *WRITTEN_FOLDERS)
        return any((self.path / name).exists() for name in names) or any(self.path.glob("*.ckpt"))

    def open(self, overwrite: bool, ckpt_path: str | None) -> Path | None:
        """Apply the rules; returns the checkpoint to resume from, or None to start anew.

        `ckpt_path` is `last`, `best` or the path of a checkpoint.  Creates and removes nothing.
        Raises ValueError when no run can be written here, when the run exists and neither resuming
        nor overwriting was asked for, or when the checkpoint to resume from does not exist.
        """
        self.check_place()
        if ckpt_path is not None:
            checkpoint = {"last": self.last, "best": self.best}.get(ckpt_path, Path(ckpt_path))
            if not checkpoint.exists():
                others = self.other_checkpoints(checkpoint)
                offer = f"; there is {others[0]}" if others else ""
                raise ValueError(f"ckpt_path: there is no checkpoint {checkpoint}{offer}")
            return checkpoint
        if self.exists() and not overwrite:
            raise ValueError(
                f"run: {self.path} exists already; give --ckpt_path last to resume it, "
                "--overwrite true to replace it, or --run another folder"
            )
        return None

    def check_place(self) -> None:
        """Raise ValueError for a path that is not a run's own folder, or cannot become one."""
        try:
            place, here = self.path.resolve(), Path.cwd()
            if place == here or place in here.parents or place == Path(place.anchor):
                raise ValueError(
                    f"run: '{self.path}' is the working directory or holds it; give a folder of "
                    "its own, like checkpoints/<name>"
                )
            present = next(path for path in (place, *place.parents) if path.exists())
        except OSError as error:  # a name too long, a folder that may not be entered
            raise ValueError(f"run: '{self.path}' cannot be used: {error.strerror}") from error
        if not present.is_dir():
            raise ValueError(f"run: '{self.path}' cannot be a folder: {present} is a file")
        if not os.access(present, os.W_OK | os.X_OK):
            raise ValueError(f"run: '{self.path}' cannot be written: no permission in {present}")

    def clear(self) -> None:
        """Remove what an earlier run wrote, and nothing else."""
        for name in WRITTEN_FILES:
            (self.path / name).unlink(missing_ok=True)
        for checkpoint in self.path.glob("*.ckpt*"):
            if checkpoint.is_dir():  # of a sharded model
                shutil.rmtree(checkpoint)
            else:
                checkpoint.unlink()
        for name in WRITTEN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def other_checkpoints(self, but: Path) -> list[Path]:
        """Return the checkpoints of this run, without `but`, the newest first."""
        found = [path for path in self.path.glob("*.ckpt") if path.resolve() != but.resolve()]
        return sorted(found, key=lambda path: -path.stat().st_mtime)


@rank_zero_only
def say(line: str) -> None:
    """Print one line, in the main process only."""
    print(line, flush=True)
