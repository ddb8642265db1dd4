"""Finished run folders, and how the drafter in each was trained."""

from __future__ import annotations

import glob
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from specstream.benchmark.study import say
from specstream.drafters.loading import RECORD, read_record

Compared = Literal["divergence", "drafter"]


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run folder whose training came to its end."""

    folder: Path
    method: str  # what is compared: the divergence with its unusual options, or the drafter
    seed: int
    steps: int | None
    target: str

    @property
    def draft(self) -> str:
        """Where its drafter lies."""
        return str(self.folder / "draft")


def find_runs(pattern: str, compared: Compared = "divergence") -> list[TrainedRun]:
    """Return the finished runs that match `pattern`; unfinished ones are named and left out.

    Raises ValueError when there is none, or when two were trained alike.
    """
    runs: list[TrainedRun] = []
    for folder in sorted(map(Path, glob.glob(pattern))):
        if not (folder / "config.yaml").is_file():
            continue
        if not (folder / "draft" / RECORD).is_file():
            say(f"left out: '{folder}' is not finished")
            continue
        runs.append(read_run(folder, compared))
    if not runs:
        raise ValueError(f"no finished run matches '{pattern}'")
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        other = seen.setdefault((run.method, run.seed), run.folder)
        if other != run.folder:
            raise ValueError(
                f"'{other}' and '{run.folder}' are both {run.method} with seed {run.seed}"
            )
    return runs


def read_run(folder: Path, compared: Compared) -> TrainedRun:
    """Read how a run was trained from its config.yaml; ValueError when it trained no drafter."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    try:
        model = config["model"]["init_args"]
        label = describe_training(model) if compared == "divergence" else describe_drafter(model)
        steps, seed = config["trainer"]["max_steps"], int(config["seed_everything"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{folder}' is not a run that trained a drafter: {error!r}") from error
    return TrainedRun(
        folder, label, seed, steps, str(read_record(folder / "draft")["target"]["path"])
    )


def describe_training(model: dict[str, Any]) -> str:
    """Return what a module's options say of its divergence, and of the texts it trained on."""
    label = describe_block(model["divergence"] or {"class_path": "ForwardKL"})
    if model.get("on_policy_fraction"):
        source = model["on_policy_source"]
        label += f", {model['on_policy_fraction']:.0%} on policy by the {source}"
    return label


def describe_drafter(model: dict[str, Any]) -> str:
    """Return a drafter's class, and whether a block is corrected in turn."""
    name = str(model["drafter"]["class_path"]).rpartition(".")[2]
    sequential = model["drafter"].get("init_args", {}).get("markov_rank")
    return f"{name}, sequential" if sequential else name


def describe_block(block: dict[str, Any]) -> str:
    """Return a divergence's block in short: its class, and those options that are not defaults."""
    module, _, name = str(block["class_path"]).rpartition(".")
    if not module:
        return name
    usual = getattr(importlib.import_module(module), name)()
    unusual = []
    for key, value in (block.get("init_args") or {}).items():
        default = getattr(usual, key)
        if isinstance(value, dict):
            value, default = describe_block(value), type(default).__name__
        if value != default:
            unusual.append(f"{key}={value}")
    return f"{name}({', '.join(unusual)})" if unusual else name
