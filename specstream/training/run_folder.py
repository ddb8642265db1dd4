"""The folder of one training run: what lies in it, and when it may be written.

    checkpoints/<name>/
        config.yaml  provenance.json  metrics.jsonl  samples.jsonl  (wandb/  wandb.json)
        last.ckpt  best.ckpt          every trained tensor, and what resuming needs
        draft/ or model/              what generation loads
        target/                       a target that was tuned together with its drafter
        samples/                      what validation of media has sampled
        .replaced/                    the run before, until this one has saved something

A run that exists is refused, unless it is resumed or `--overwrite true` is given.  A run that is
overwritten is first set aside: it is given back when its successor fails before a first checkpoint,
and still lies in `.replaced` when that one was killed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

WRITTEN_FILES = ("config.yaml", "provenance.json", "metrics.jsonl", "samples.jsonl", "wandb.json")
WRITTEN_FOLDERS = ("draft", "model", "target", "samples")


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

    @property
    def replaced(self) -> Path:
        return self.path / ".replaced"

    @property
    def moving(self) -> Path:
        """What is on its way into `replaced` or back; all of it belongs to one run."""
        return self.path / ".replaced.part"

    def exists(self) -> bool:
        """Whether a training has written here."""
        names = (*WRITTEN_FILES, self.replaced.name, self.moving.name)
        return self.has_saved() or any((self.path / name).exists() for name in names)

    def has_saved(self) -> bool:
        """Whether there is something to resume from, or to generate with."""
        folders = (self.path / name for name in WRITTEN_FOLDERS)
        return any(self.path.glob("*.ckpt")) or any(folder.exists() for folder in folders)

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
            aside = [str(path) for path in (self.replaced, self.moving) if path.exists()]
            raise ValueError(
                f"run: {self.path} exists already; give --ckpt_path last to resume it, "
                "--overwrite true to replace it, or --run another folder"
                + "".join(f"; the run before it lies in {path}" for path in aside)
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

    def set_aside(self) -> None:
        """Move what an earlier run wrote, and nothing else, into `replaced`.

        What a run wrote that was killed before it saved anything is removed instead: the run that
        it was to replace is still aside.
        """
        if self.replaced.exists() and not self.has_saved():
            self.clear()
            return
        for path in self.written():
            self.moving.mkdir(exist_ok=True)
            remove(self.moving / path.name)
            path.rename(self.moving / path.name)
        if self.moving.exists():
            remove(self.replaced)
            self.moving.rename(self.replaced)

    def settle(self) -> None:
        """Drop the run that was set aside, or give it back where its successor saved nothing."""
        if self.replaced.exists() and not self.moving.exists():
            if self.has_saved():
                remove(self.replaced)
                return
            self.clear()
            self.replaced.rename(self.moving)
        if self.moving.exists():
            for path in self.moving.iterdir():
                path.rename(self.path / path.name)
            self.moving.rmdir()
            say(f"nothing was saved; {self.path} holds the run before again")

    def clear(self) -> None:
        """Remove what a run wrote, and nothing else."""
        for path in self.written():
            remove(path)

    def written(self) -> list[Path]:
        """Return what lies here of a run, nothing that is aside."""
        paths = [self.path / name for name in (*WRITTEN_FILES, *WRITTEN_FOLDERS)]
        return [path for path in paths if path.exists()] + sorted(self.path.glob("*.ckpt*"))

    def other_checkpoints(self, but: Path) -> list[Path]:
        """Return the checkpoints that lie here, aside too, without `but`; the newest first."""
        folders = (self.path, self.replaced, self.moving)
        found = [path for folder in folders for path in folder.glob("*.ckpt")]
        others = [path for path in found if path.resolve() != but.resolve()]
        return sorted(others, key=lambda path: -path.stat().st_mtime)


def remove(path: Path) -> None:
    """Remove a file, or a folder such as the checkpoint of a sharded model; it may be missing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@rank_zero_only
def say(line: str) -> None:
    """Print one line, in the main process only."""
    print(line, flush=True)


def check_apart(target: str, run: Path) -> None:
    """Raise ValueError for a target in a folder that the run writes, and for a run inside it."""
    folder = Path(target).resolve()
    if target and folder.is_dir() and folder in (run.resolve(), *run.resolve().parents):
        raise ValueError(
            f"run: {run} is in the folder of the target {target!r}; give --run another"
        )
    if any(Path(target).resolve() == (run / name).resolve() for name in WRITTEN_FOLDERS):
        raise ValueError(
            f"run: {run} holds the target {target!r}, which would be replaced; give --run another "
            "folder"
        )
