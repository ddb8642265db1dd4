"""The tables of media: drafted steps that keep a law, and solvers of the deterministic sampler.

A coupling promises the law of the plain sampler with all its steps, and takes fewer rounds for it;
so the same rounds are given to that sampler with fewer steps, and to the deterministic one, and
all of them are held beside held-out data (videos composed by rule share their digits with those of
training).  What has no law to keep is held beside the solution of the same noise instead: decibels
at a number of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from specstream.benchmark.media_checks import check_compared, check_counts, check_finite
from specstream.benchmark.media_curves import SolverCurve
from specstream.benchmark.media_methods import (
    EqualRounds,
    EqualSeconds,
    MediaModels,
    MediaSetting,
    PlainSteps,
    SamplingMethod,
    SamplingRunner,
)
from specstream.benchmark.media_records import SolverRow
from specstream.benchmark.media_rows import Drawn, MediaRowMaker, SolverRowMaker, Timed, draw
from specstream.benchmark.media_seconds import equal_seconds
from specstream.benchmark.media_solving import SolverTable
from specstream.benchmark.rows import Machine, Row, describe_machine
from specstream.benchmark.study import Asked, Study, check_names, say
from specstream.benchmark.timing import Plan, alternate
from specstream.data import MediaDataModule
from specstream.data.media_sources import MediaSource, Samples
from specstream.generation.loading import find_device
from specstream.generation.solvers import SolverPipeline
from specstream.metrics import missing_clip
from specstream.models.denoiser import FORM


@dataclass(frozen=True)
class MediaTask:
    """A diffusion model, and data of its kind.

    Args:
        name: what the table calls it.
        target: the folder of the model, `<run>/model`.
        data: where held-out data come from; what is held out follows from `validation_fraction`.
        num_steps: of the plain sampler, N; a table for each.
        etas: of the plain sampler; a table for each.
        num_samples: drawn by each method, of all classes alike.
        num_solved: drawn by each solver.
        batch_size: samples drawn together.
        guidance: weight of the class; 1 is none.
        validation_fraction: share of the data that training held out; 1: all of it, as of a file
            that training does not read.
    """

    name: str
    target: str
    data: MediaSource
    num_steps: list[int] = field(default_factory=lambda: [50])
    etas: list[float] = field(default_factory=lambda: [1.0])
    num_samples: int = 512
    num_solved: int = 64
    batch_size: int = 64
    guidance: float = 1.0
    validation_fraction: float = 0.1

    def missing(self) -> str | None:
        """Say what this task needs and is not there; None when all is."""
        if Path(self.target, FORM).is_file():
            return None
        return f"task '{self.name}': there is no diffusion model in '{self.target}'"

    def check(self) -> None:
        """Raise ValueError for options that make no sense."""
        if min(self.num_samples, self.num_solved) < 2 or self.batch_size < 1:
            raise ValueError(
                f"task '{self.name}': num_samples and num_solved must be at least 2 and "
                "batch_size at least 1"
            )
        check_counts(self, ("num_samples", "num_solved", "batch_size"), f"task '{self.name}': ")
        if not math.isfinite(self.guidance):
            raise ValueError(
                f"task '{self.name}': guidance must be a finite number, got {self.guidance}"
            )
        if not self.num_steps or min(self.num_steps) < 2:
            raise ValueError(f"task '{self.name}': num_steps must be at least 2 each")
        if not self.etas or not 0 < min(self.etas) <= max(self.etas) <= 1:
            raise ValueError(f"task '{self.name}': etas must be above 0 and at most 1 each")
        if not 0 < self.validation_fraction <= 1:
            raise ValueError(
                f"task '{self.name}': validation_fraction must be above 0 and at most 1, got "
                f"{self.validation_fraction}"
            )
        self.data.check()

    @property
    def settings(self) -> list[MediaSetting]:
        """The plain samplers that drafts are of."""
        return [
            MediaSetting(num_steps, eta, self.guidance, self.batch_size)
            for eta in self.etas
            for num_steps in self.num_steps
        ]

    def held_out(self) -> Samples:
        """Return the samples that training has not seen."""
        fraction = self.validation_fraction if self.validation_fraction < 1 else 0.0
        module = MediaDataModule(self.data, validation_fraction=fraction)
        chosen = torch.from_numpy(module.numbers(held_out=fraction > 0))
        samples = module.samples
        told = {name: value[chosen] for name, value in samples.condition.items()}
        return Samples(samples.states[chosen], **told)

    def check_target(self, models: MediaModels, held_out: Samples) -> None:
        """Raise ValueError where the target's states are not the data's, or it cannot be guided."""
        processor, number = models.processor, len(held_out.states)
        if number < 2:
            raise ValueError(
                f"task '{self.name}': training held out {number} samples, and the laws of two or "
                "more are compared: give another validation_fraction"
            )
        if self.guidance != 1 and not (processor.classes or processor.text_size):
            raise ValueError(
                f"task '{self.name}': guidance is the weight of a prompt, and its target takes none"
            )
        wanted, found = models.target.shape, tuple(held_out.states.shape[1:])
        if found != wanted:
            raise ValueError(
                f"task '{self.name}': the target's states are {list(wanted)}, the data's "
                f"{list(found)}"
            )


@dataclass(frozen=True)
class MediaStudy(Study):
    """Draws samples with every method, compares their laws, and times them in alternating runs.

    Args:
        tasks: what is drawn, by which target.
        methods: who draws; one of them is `PlainSteps` without options, the reference.
        solvers: of the deterministic sampler, compared by their distance from its solution.
        solver_steps: of the deterministic sampler that adaptive solvers go faster than.
        reference_steps: of the solution.
        num_permutations: of the test against the plain samples.
        timed_samples: drawn one by one in every repeat.
        repeats: timed runs of every method; medians count.
        only_tasks, only_methods: names, to measure a part.
        skip_missing: leave out tasks and methods whose files are not there, saying so.
        seed: of the draws.
        device: auto, cpu, cuda or cuda:N.
        clip_model: folder of a CLIP model of `transformers`, which says how well pictures show
            their classes; null: no such column.
    """

    tasks: list[MediaTask]
    methods: list[SamplingMethod]
    solvers: list[SolverCurve] = field(default_factory=list)
    solver_steps: int = 50
    reference_steps: int = 1000
    num_permutations: int = 199
    timed_samples: int = 8
    repeats: int = 3
    only_tasks: list[str] | None = None
    only_methods: list[str] | None = None
    skip_missing: bool = False
    seed: int = 0
    device: str = "auto"
    clip_model: str | None = None

    def check(self) -> None:
        steps = (self.solver_steps, self.reference_steps)
        if min(self.num_permutations, self.timed_samples, self.repeats, *steps) < 1:
            raise ValueError(
                "num_permutations, timed_samples, repeats, solver_steps and reference_steps must "
                "be at least 1"
            )
        check_counts(self, ("num_permutations", "timed_samples", "repeats"))
        self._leave_out(None if self.clip_model is None else missing_clip(self.clip_model))
        asked: list[Asked] = [*self.methods, *self.solvers]
        check_names(self.tasks, asked, self.only_tasks, self.only_methods)
        for task in self._asked_tasks:
            reason = task.missing()
            self._leave_out(reason)
            if reason is None:
                task.check()
                self._check_methods(task)
        check_compared(self.methods)
        if not self._tasks:
            raise ValueError("no task is left to measure")
        if not any(self._methods(task) or self._curves(task) for task in self._tasks):
            raise ValueError("no method or solver is left to measure")
        find_device(self.device)

    def _check_methods(self, task: MediaTask) -> None:
        for method in self._asked(task):
            self._leave_out(method.missing(), f"{task.name}: ")
        methods = self._methods(task)
        if methods and not (isinstance(methods[0], PlainSteps) and methods[0].is_reference):
            raise ValueError(
                f"task '{task.name}' has no PlainSteps method without options, which the others "
                "are compared with"
            )

    def _leave_out(self, reason: str | None, where: str = "") -> None:
        """Say that something is missing, or refuse to go on without it."""
        if reason is not None and not self.skip_missing:
            raise ValueError(f"{reason} (skip_missing: true leaves it out)")
        if reason is not None:
            say(f"left out: {where}{reason}")

    @property
    def _asked_tasks(self) -> list[MediaTask]:
        return [t for t in self.tasks if self.only_tasks is None or t.name in self.only_tasks]

    @property
    def _tasks(self) -> list[MediaTask]:
        return [task for task in self._asked_tasks if task.missing() is None]

    def _is_asked(self, method: Asked, task: MediaTask) -> bool:
        is_own = method.tasks is None or task.name in method.tasks
        return is_own and (self.only_methods is None or method.name in self.only_methods)

    def _asked(self, task: MediaTask) -> list[SamplingMethod]:
        return [method for method in self.methods if self._is_asked(method, task)]

    def _methods(self, task: MediaTask) -> list[SamplingMethod]:
        """Return who draws, the reference first, each before what it has to beat."""
        asked = [method for method in self._asked(task) if method.missing() is None]
        found = [each for method in asked for each in (method, *method.beside())]
        return sorted(found, key=lambda m: not (isinstance(m, PlainSteps) and m.is_reference))

    def run(self, arguments: Sequence[str]) -> Iterator[list[Row]]:
        for task in self._tasks:
            data = task.held_out()
            models = MediaModels(task.target, self.device, data.text)
            task.check_target(models, data)
            self._build(task, models)
            held_out = data.states
            dtype = str(models.target.dtype).removeprefix("torch.")
            machine = describe_machine(models.place, dtype, arguments)
            for setting in task.settings if self._methods(task) else []:
                rows, complete = self.measure(task, models, setting, held_out, machine)
                yield rows
                if not complete:
                    raise KeyboardInterrupt
            solved = self.solve(task, models, held_out, machine)
            if solved:
                yield list(solved)

    def _build(self, task: MediaTask, models: MediaModels) -> None:
        """Raise ValueError for what a method cannot do, before hours are spent on the others."""
        for setting in task.settings:
            for method in self._methods(task):
                if not isinstance(method, EqualRounds) and method.refusal(setting) is None:
                    method.pipeline(models, setting)
        for curve in self._curves(task):
            list(curve.points(models, self._solved_setting(task)))

    def _curves(self, task: MediaTask) -> list[SolverCurve]:
        return [curve for curve in self.solvers if self._is_asked(curve, task)]

    def _solved_setting(self, task: MediaTask) -> MediaSetting:
        return MediaSetting(self.solver_steps, 0.0, task.guidance, task.batch_size)

    def measure(
        self,
        task: MediaTask,
        models: MediaModels,
        setting: MediaSetting,
        held_out: Tensor,
        machine: Machine,
    ) -> tuple[list[Row], bool]:
        """Draw and time one task under one setting; returns its rows and whether all was timed."""
        drawn = self.draw(task, models, setting)
        timed, complete = self.time(models, setting, drawn)
        plain = drawn[0].method.pipeline(models, setting)
        classes = models.condition(models.prompts(task.num_samples, self.seed))
        other = plain.complete(task.num_samples, classes, seed=self.seed)  # from other noise
        maker = MediaRowMaker(
            task.name, task.target, setting, held_out, other, self.num_permutations,
            models.processor.spectrogram, machine, models.processor.kind,
            models.names(models.prompts(task.num_samples, self.seed + 1)), self.clip_model,
        )  # fmt: skip
        return list(maker.rows(drawn, timed)), complete

    def draw(self, task: MediaTask, models: MediaModels, setting: MediaSetting) -> list[Drawn]:
        """Draw samples with every method that can, each from the same noise."""
        say(f"{task.name}, {setting.label}: {task.num_samples} samples of each method")
        seed = self.seed + 1  # not that of the samples they are compared with
        condition = models.condition(models.prompts(task.num_samples, seed))
        drawn: list[Drawn] = []
        for method in self._methods(task):
            known = self._known(setting, drawn)
            reason = method.refusal(known)
            if reason is not None:
                say(f"left out of {task.name}, {setting.label}: {reason}")
                continue
            if isinstance(method, EqualSeconds):
                other = next(each for each in drawn if each.method.name == method.method)
                few = models.prompts(setting.batch_size, self.seed)
                known = equal_seconds(
                    method, other.pipeline, models, known, few, self.seed, self.repeats
                )
            found = draw(method, models, known, condition, seed=seed, num_samples=task.num_samples)
            check_finite(found.samples, task.name, method.name)
            say(f"  {method.name}: {found.rounds:.2f} rounds")
            drawn.append(found)
        return drawn

    def _known(self, setting: MediaSetting, drawn: Sequence[Drawn]) -> MediaSetting:
        """Return the setting with what the methods before took; their seconds are a first guess."""
        return replace(
            setting,
            rounds={each.method.name: each.calls for each in drawn},
            shares={each.method.name: each.seconds / drawn[0].seconds for each in drawn},
        )

    def time(
        self, models: MediaModels, setting: MediaSetting, drawn: Sequence[Drawn]
    ) -> tuple[list[Timed], bool]:
        """Time the methods in turns, on samples alone and on a batch."""
        prompts = [[number] for number in models.prompts(self.timed_samples, self.seed)]
        batch = [[number] for number in models.prompts(setting.batch_size, self.seed)]
        single = [[number] for number in range(len(prompts))]
        place = models.place
        apart = [each.method.pipeline(models, each.setting.alone()) for each in drawn]
        alone, whole = alternate(
            [SamplingRunner(models, pipeline) for pipeline in apart],
            Plan(prompts, single, self.repeats, 1, self.seed, place),
        )
        in_batch, rest = alternate(
            [SamplingRunner(models, each.pipeline) for each in drawn],
            Plan(batch, [list(range(len(batch)))], self.repeats, 1, self.seed, place),
        )
        pairs = zip(alone, in_batch, strict=True)
        return [Timed(*pair) for pair in pairs], whole and rest

    def solve(
        self, task: MediaTask, models: MediaModels, held_out: Tensor, machine: Machine
    ) -> list[SolverRow]:
        """Solve the deterministic sampler in every way, and hold it beside the solution."""
        curves = self._curves(task)
        if not curves:
            return []
        setting = self._solved_setting(task)
        prompts = models.prompts(task.num_solved, self.seed)
        exact = SolverPipeline(
            models.target,
            self.reference_steps,
            guidance=task.guidance,
            batch_size=task.batch_size,
        )
        say(f"{task.name}: {len(prompts)} samples in {self.reference_steps} steps")
        solution = exact.complete(len(prompts), models.condition(prompts), seed=self.seed)
        check_finite(solution, task.name, "the solution")
        maker = SolverRowMaker(
            task.name, task.target, held_out, solution, self.reference_steps,
            models.processor.kind, machine,
        )  # fmt: skip
        return SolverTable(models, setting, prompts, self.seed, maker).rows(curves)
