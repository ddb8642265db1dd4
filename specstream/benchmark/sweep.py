"""Train the drafters that `distillation` compares: one run for each divergence and seed.

    python -m specstream.benchmark.sweep --steps 700 --jobs 2

A plain loop that calls train.py with overrides, each run in a process of its own with `threads`
threads.  It may be stopped and started again: finished runs are skipped, begun ones resumed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from specstream.benchmark.study import say
from specstream.config_errors import OneLineErrors
from specstream.drafters.loading import RECORD

DIVERGENCES = (
    "CrossEntropy",
    "ForwardKL",
    "ReverseKL",
    "JSD",
    "TotalVariation",
    "NegativeLogAcceptance",
    "LKHybrid",
    "EndToEndTV",
    "DPace",
)
DIVERGENCE_KEY = "model.init_args.divergence"
SEED_KEYS = (
    "seed_everything",
    "data.init_args.seed",
    "model.init_args.drafter.init_args.model.init_args.seed",
)


@dataclass(frozen=True)
class Sweep:
    """The runs to train.

    Args:
        train_config: the recipe of all of them.
        folder: where the runs go, one folder each.
        steps: of every run.
        divergences: classes of specstream.divergences.
        seeds: for each divergence.
        paired: the divergences that get `paired_seeds` too.
        paired_seeds: more seeds for these.
        seed_keys: options of the recipe that are set to the seed.
        jobs: runs at once.
        threads: of each.
        options: further words for train.py.
    """

    train_config: str = "configs/train/quickstart.yaml"
    folder: str = "checkpoints/divergences"
    steps: int = 700
    divergences: list[str] = field(default_factory=lambda: list(DIVERGENCES))
    seeds: list[int] = field(default_factory=lambda: [0])
    paired: list[str] = field(default_factory=lambda: ["CrossEntropy", "ForwardKL"])
    paired_seeds: list[int] = field(default_factory=lambda: [1, 2])
    seed_keys: list[str] = field(default_factory=lambda: list(SEED_KEYS))
    jobs: int = 1
    threads: int = 1
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import specstream.divergences

        for name in [*self.divergences, *self.paired]:
            if not hasattr(specstream.divergences, name):
                raise ValueError(f"there is no divergence '{name}'; {', '.join(DIVERGENCES)}")
        if min(self.jobs, self.threads, self.steps) < 1:
            raise ValueError("jobs, threads and steps must be at least 1")
        for path in (self.train_config, "train.py"):
            if not Path(path).is_file():
                raise ValueError(f"there is no file '{path}' here")

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Divergence and seed of every run, in the order they are begun."""
        more = [(name, seed) for seed in self.paired_seeds for name in self.paired]
        return list(dict.fromkeys([*((n, s) for s in self.seeds for n in self.divergences), *more]))

    def run_folder(self, divergence: str, seed: int) -> Path:
        """Where a run lies."""
        return Path(self.folder, f"{divergence}-{seed}")

    def command(self, divergence: str, seed: int) -> list[str] | None:
        """Return the words that train, resume or replace a run; None when it is finished."""
        run = self.run_folder(divergence, seed)
        if (run / "draft" / RECORD).is_file():
            return None
        words = [sys.executable, "train.py", "--config", self.train_config, "--run", str(run)]
        words += [f"--{key}={seed}" for key in self.seed_keys]
        words += [f"--{DIVERGENCE_KEY}=specstream.divergences.{divergence}"]
        words += [f"--trainer.max_steps={self.steps}", "--trainer.enable_progress_bar=false"]
        words += self.options
        if (run / "last.ckpt").exists():
            return [*words, "--ckpt_path", "last"]
        return [*words, "--overwrite", "true"]  # nothing in it to lose

    def train(self, run: tuple[str, int]) -> int:
        """Train one run in a process of its own, its output in a file beside the folder."""
        words, folder = self.command(*run), self.run_folder(*run)
        if words is None:
            say(f"{folder}: finished already")
            return 0
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"{folder}: begun")
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        with folder.with_suffix(".log").open("a") as log:
            done = subprocess.run(words, stdout=log, stderr=log, env={**os.environ, **threads})
        outcome = "finished" if done.returncode == 0 else f"exit code {done.returncode}"
        say(f"{folder}: {outcome}, output in {folder.with_suffix('.log')}")
        return done.returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all runs; returns 0, 1 when one failed, 2 for a mistake, 130 after Ctrl-C."""
    parser = OneLineErrors(prog="python -m specstream.benchmark.sweep", description=__doc__)
    parser.add_class_arguments(Sweep)
    parser.built_class = None
    try:
        parsed = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
        sweep = Sweep(**vars(parsed))
    except ValueError as error:
        say(" ".join(str(error).split()))
        return 2
    pool = ThreadPoolExecutor(sweep.jobs)
    try:
        return int(any(pool.map(sweep.train, sweep.runs)))
    except KeyboardInterrupt:  # the trainings got it too: they save and end
        say("interrupted: run the same command again to go on")
        pool.shutdown(wait=True, cancel_futures=True)
        return 130
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


if __name__ == "__main__":
    raise SystemExit(main())
