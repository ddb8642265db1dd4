"""The table of fillings: quality against target calls and seconds, for every way to fill canvases.

Plain sampling in fewer steps is a method too, and the one to beat: each row says what it gains over
the plain sampler with all its steps, over the one with the fewest steps that is as good, and
whether it lies above the curve that plain samplers draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from specstream.benchmark.masked_judge import CausalJudge
from specstream.benchmark.masked_methods import (
    Filling,
    FillingRunner,
    MaskedMethod,
    MaskedModels,
    PlainSampling,
)
from specstream.benchmark.masked_prompts import CanvasPrompts, CanvasQuestion
from specstream.benchmark.masked_rows import MaskedRowMaker
from specstream.benchmark.pair import is_model
from specstream.benchmark.rows import Machine, Row, describe_machine
from specstream.benchmark.speed import Rounds
from specstream.benchmark.speed_rows import describe
from specstream.benchmark.study import Study, check_names, say
from specstream.benchmark.timing import Plan, alternate
from specstream.files import read_table
from specstream.generation import Limits
from specstream.generation.loading import find_device
from specstream.metrics import Solved, TextQuality
from specstream.models.masked_weights import HUB_NETWORKS
from specstream.models.supported import FORM
from specstream.processors import TextProcessor
from specstream.sampling import Sampling


@dataclass(frozen=True)
class MaskedTask:
    """What is filled, by which target, and how it is judged.

    Args:
        name: what the table calls it.
        target: folder or hub id of the masked diffusion model.
        prompts: what comes before the masks.
        quality: how an answer is judged; its first score decides.
        judge: folder or hub id of a causal LM; where there is no quality, its NLL decides.
        max_new_tokens: masks after a prompt.
        block_tokens: fill from left to right in blocks of so many; null fills the canvas at once.
        samplings: the laws of this task; null for those of the study.
    """

    name: str
    target: str
    prompts: CanvasPrompts
    quality: Solved | TextQuality | None = None
    judge: str | None = None
    max_new_tokens: int = 16
    block_tokens: int | None = None
    samplings: list[Sampling] | None = None

    def missing(self) -> str | None:
        """Say what this task needs and is not there; None when all is."""
        for path in (self.target, self.judge):
            if path is not None and not is_model(path):
                return f"task '{self.name}': there is no folder '{path}'"
        try:
            self.prompts.check()
        except ValueError as error:
            return f"task '{self.name}': {error}"
        return None

    def check(self) -> None:
        """Raise ValueError for options that make no sense together."""
        if self.quality is None and self.judge is None:
            raise ValueError(f"task '{self.name}' needs a quality or a judge")
        if isinstance(self.quality, TextQuality) and not self.prompts.has_references:
            raise ValueError(
                f"task '{self.name}': {type(self.quality).__name__} needs references, which "
                f"{type(self.prompts).__name__} do not have"
            )
        config = Path(self.target, "config.json")
        if config.is_file():
            found = read_table(config)
            if FORM not in found and str(found.get("model_type")) not in HUB_NETWORKS:
                raise ValueError(
                    f"task '{self.name}': '{self.target}' is a causal language model, not a masked "
                    "diffusion one"
                )


@dataclass(frozen=True)
class MaskedStudy(Study):
    """Fills canvases with every method in alternating runs, and judges what they hold.

    Args:
        tasks: what is filled, by which target.
        methods: who fills; the first plain one of a task has all its steps and is the reference.
        samplings: the laws that are filled under.
        num_prompts: of each task, evenly over what there is.
        batch_size: canvases that are filled together.
        repeats: timed runs of every method over all prompts; medians count.
        warmups: batches filled by everyone before anything is timed, the longest first.
        only_tasks, only_methods: names, to measure a part.
        skip_missing: leave out tasks and methods whose files are not there, saying so.
        seed: of the draws.
        dtype: of the weights; auto is bfloat16 where the hardware computes in it.
        device: auto, cpu, cuda or cuda:N.
        compile: compile the target's passes.
    """

    tasks: list[MaskedTask]
    methods: list[MaskedMethod]
    samplings: list[Sampling] = field(default_factory=lambda: [Sampling(temperature=0)])
    num_prompts: int = 64
    batch_size: int = 1
    repeats: int = 3
    warmups: int = 2
    only_tasks: list[str] | None = None
    only_methods: list[str] | None = None
    skip_missing: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    compile: bool = False

    def check(self) -> None:
        if min(self.num_prompts, self.repeats, self.batch_size) < 1 or self.warmups < 0:
            raise ValueError(
                "num_prompts, repeats and batch_size must be at least 1 and warmups at least 0"
            )
        check_names(self.tasks, self.methods, self.only_tasks, self.only_methods)
        for task in self._asked_tasks:
            reason = task.missing()
            self._leave_out(reason)
            if reason is None:
                self._check_task(task)
        if not self._tasks:
            raise ValueError("no task is left to measure")
        find_device(self.device)

    def _check_task(self, task: MaskedTask) -> None:
        task.check()
        for method in self._asked(task):
            self._leave_out(method.missing(), f"{task.name}: ")
        for filling in self.fillings(task):
            if not any(isinstance(m, PlainSampling) for m in self._methods(task, filling)):
                raise ValueError(
                    f"task '{task.name}' has no PlainSampling method, which the others are "
                    "compared with"
                )

    def _leave_out(self, reason: str | None, where: str = "") -> None:
        """Say that something is missing, or refuse to go on without it."""
        if reason is not None and not self.skip_missing:
            raise ValueError(f"{reason} (skip_missing: true leaves it out)")
        if reason is not None:
            say(f"left out: {where}{reason}")

    @property
    def _asked_tasks(self) -> list[MaskedTask]:
        return [t for t in self.tasks if self.only_tasks is None or t.name in self.only_tasks]

    @property
    def _tasks(self) -> list[MaskedTask]:
        return [task for task in self._asked_tasks if task.missing() is None]

    def _asked(self, task: MaskedTask) -> list[MaskedMethod]:
        own = [m for m in self.methods if m.tasks is None or task.name in m.tasks]
        return [m for m in own if self.only_methods is None or m.name in self.only_methods]

    def _methods(self, task: MaskedTask, filling: Filling) -> list[MaskedMethod]:
        """Return who fills, the plain ones first: the reference leads the table."""
        found = [m for m in self._asked(task) if m.missing() is None and not m.refusal(filling)]
        return sorted(found, key=lambda method: not isinstance(method, PlainSampling))

    def fillings(self, task: MaskedTask) -> list[Filling]:
        """Return what is filled on a task, under each of its laws."""
        limits = Limits(task.max_new_tokens)
        return [
            Filling(sampling, limits, task.block_tokens, self.batch_size, self.compile)
            for sampling in task.samplings or self.samplings
        ]

    def run(self, arguments: Sequence[str]) -> Iterator[list[Row]]:
        # What cannot be read is refused before any task is measured.
        questions = {task.name: self.read(task) for task in self._tasks}
        for task in self._tasks:
            models = MaskedModels(task.target, self.dtype, self.device)
            dtype = str(models.target.dtype).removeprefix("torch.")
            machine = describe_machine(models.place, dtype, arguments)
            judge = None if task.judge is None else CausalJudge(task.judge, models.place)
            for filling in self.fillings(task):
                if self.compile:
                    torch.compiler.reset()
                rows, complete = self.measure(
                    task, questions[task.name], models, judge, filling, machine
                )
                yield rows
                if not complete:
                    raise KeyboardInterrupt

    def read(self, task: MaskedTask) -> list[CanvasQuestion]:
        """Read what is given before the masks of a task; ValueError when there is less."""
        processor = TextProcessor.from_pretrained(task.target)
        return task.prompts.read(self.num_prompts, task.target, processor)

    def measure(
        self,
        task: MaskedTask,
        questions: Sequence[CanvasQuestion],
        models: MaskedModels,
        judge: CausalJudge | None,
        filling: Filling,
        machine: Machine,
    ) -> tuple[list[Row], bool]:
        """Time one task under one law; returns its rows and whether all repeats were run."""
        for method in self._asked(task):
            reason = method.refusal(filling)
            if reason is not None:
                say(f"left out of {task.name}, {describe(filling.sampling)}: {reason}")
        methods = self._methods(task, filling)
        pipelines = [method.pipeline(models, filling) for method in methods]
        prompts = [question.tokens for question in questions]
        # What does not fit is refused before anything is timed.
        widths = [len(pipelines[0].encode(prompt).tokens) for prompt in prompts]
        numbers = list(range(len(prompts)))
        size = self.batch_size
        blocks = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        for pipeline in pipelines:  # costs that choose lengths are measured before the clock runs
            for width in {max(widths[number] for number in block) for block in blocks}:
                pipeline.prepare(width)
        plan = Plan(prompts, blocks, self.repeats, self.warmups, self.seed, models.place)
        say(f"{task.name}: {len(methods)} ways to fill, {len(prompts)} prompts")
        progress = Rounds(self.repeats * len(blocks))
        runners = [FillingRunner(pipeline) for pipeline in pipelines]
        found, complete = alternate(runners, plan, progress.advance)
        maker = MaskedRowMaker(
            task.name, task.target, models.processor, questions, task.quality, judge, filling,
            machine,
        )  # fmt: skip
        return list(maker.rows(methods, found)), complete
