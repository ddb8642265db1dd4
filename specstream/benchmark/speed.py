"""The table of speeds: every method against plain decoding, in alternating runs of one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from specstream.benchmark.methods import Method
from specstream.benchmark.pair import Pair, Task
from specstream.benchmark.prompts import gather
from specstream.benchmark.rows import Machine, Row, describe_machine
from specstream.benchmark.runners import Decoding
from specstream.benchmark.speed_rows import Result, RowMaker
from specstream.benchmark.study import Study, say
from specstream.benchmark.timing import Plan, alternate
from specstream.generation import Limits
from specstream.generation.loading import find_device
from specstream.sampling import Sampling


@dataclass(frozen=True)
class Setting:
    """Methods that are compared with one another, and what they all decode.

    Args:
        name: what the table calls it.
        methods: who decodes; each needs a plain one of its batch size beside it.
        sampling: the law.
        max_new_tokens: tokens a prompt.
        num_prompts: held-out prompts.
        ignore_eos: go on after an end of sequence, so that all outputs have one length.
        ragged: cut the prompts to different lengths.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    methods: list[Method]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    num_prompts: int = 32
    ignore_eos: bool = True
    ragged: bool = False
    tasks: list[str] | None = None

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, not {self.num_prompts}")
        plain = {m.batch_size for m in self.methods if m.role == "plain"}
        for method in self.methods:
            if method.batch_size not in plain:
                raise ValueError(
                    f"setting '{self.name}': '{method.label}' needs a Plain method of batch size "
                    f"{method.batch_size} to be compared with"
                )

    @property
    def limits(self) -> Limits:
        """Where an output ends."""
        return Limits(self.max_new_tokens, ignore_eos=self.ignore_eos)


@dataclass(frozen=True)
class SpeedStudy(Study):
    """Measures the speed of methods on tasks.

    Args:
        tasks: pairs of models with their prompts.
        settings: what is compared, on every task unless it names some.
        repeats: timed runs of every method over all prompts; medians count.
        warmups: blocks of prompts decoded by everyone before anything is timed.
        only_tasks, only_settings: names, to measure a part.
        limit_prompts: no setting decodes more prompts, for a quick look.
        seed: of the draws.
        dtype: of the weights; auto is bfloat16 where the hardware computes in it.
        device: auto, cpu, cuda or cuda:N.
        attn_implementation: sdpa or eager.
        compile: compile our methods; the plain side is the faster of eager and compiled.
    """

    tasks: list[Task]
    settings: list[Setting]
    repeats: int = 3
    warmups: int = 2
    only_tasks: list[str] | None = None
    only_settings: list[str] | None = None
    limit_prompts: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "sdpa"
    compile: bool = False

    def check(self) -> None:
        if self.repeats < 1 or self.warmups < 0 or (self.limit_prompts or 1) < 1:
            raise ValueError("repeats and limit_prompts must be at least 1 and warmups at least 0")
        names = [task.name for task in self.tasks]
        asked = [*(self.only_tasks or []), *(t for s in self.settings for t in s.tasks or [])]
        for wanted, known, what in (
            (asked, names, "task"),
            (self.only_settings or [], [s.name for s in self.settings], "setting"),
        ):
            unknown = [name for name in wanted if name not in known]
            if unknown:
                raise ValueError(f"there is no {what} '{unknown[0]}'; there are {', '.join(known)}")
        for task in self._tasks:
            asked_for = {m.draft for s in self._settings(task) for m in s.methods}
            task.check({kind for kind in asked_for if kind is not None})
        find_device(self.device)

    @property
    def _tasks(self) -> list[Task]:
        return [t for t in self.tasks if self.only_tasks is None or t.name in self.only_tasks]

    def _settings(self, task: Task) -> list[Setting]:
        chosen = [s for s in self.settings if s.tasks is None or task.name in s.tasks]
        return [s for s in chosen if self.only_settings is None or s.name in self.only_settings]

    def run(self, arguments: Sequence[str]) -> Iterator[list[Row]]:
        for task in self._tasks:
            pair = Pair(task, self.dtype, self.device, self.attn_implementation)
            dtype = str(pair.target.dtype).removeprefix("torch.")
            machine = describe_machine(pair.place, dtype, arguments)
            for setting in self._settings(task):
                if self.compile:  # the last setting's graphs, each with its packed weights
                    torch.compiler.reset()
                rows, complete = self.measure(pair, setting, machine)
                yield rows
                if not complete:
                    raise KeyboardInterrupt

    def measure(self, pair: Pair, setting: Setting, machine: Machine) -> tuple[list[Row], bool]:
        """Time one setting on one task; returns its rows and whether all repeats were run."""
        prompts = gather(
            pair.task.prompts,
            min(setting.num_prompts, self.limit_prompts or setting.num_prompts),
            pair.task.target,
            pair.processor,
            setting.ragged,
        )
        size = math.lcm(*(method.batch_size for method in setting.methods))
        numbers = list(range(len(prompts)))
        blocks = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        plan = Plan(prompts, blocks, self.repeats, self.warmups, self.seed, pair.place)
        decoding = Decoding(setting.sampling, setting.limits, self.compile)
        runners = [(m, r) for m in setting.methods for r in m.runners(pair, decoding)]
        say(f"{pair.task.name}, {setting.name}: {len(runners)} decoders, {len(prompts)} prompts")
        progress = Rounds(self.repeats * len(blocks))
        found, complete = alternate([runner for _, runner in runners], plan, progress.advance)
        owned = list(zip((method for method, _ in runners), found, strict=True))
        results = [Result(m, [did for owner, did in owned if owner is m]) for m in setting.methods]
        maker = RowMaker(
            pair, setting.name, setting.sampling, setting.limits, machine, prompts, results
        )
        return [maker.row(result) for result in results], complete


class Rounds:
    """Says on stderr how far the alternating runs are, every tenth of the way."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self) -> None:
        """Count one block decoded by all."""
        self.done += 1
        if self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            say(f"  {self.done * 100 // self.total} %")
