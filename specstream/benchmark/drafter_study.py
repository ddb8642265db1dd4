"""The table of drafters: many of them for one target, on tasks whose answers can be judged.

The columns are those of Speculative Streaming (Bhendawade et al. 2024, Table 1): speedup, call
reduction, the task metric of the plain target and of the method, extra parameters; beside them
what explains these: tau, acceptance, the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from specstream.benchmark.drafter_rows import DrafterRowMaker, Entry
from specstream.benchmark.methods import Drafted, Plain
from specstream.benchmark.pair import Pair, Task, is_model
from specstream.benchmark.questions import Question, QuestionFile, spread
from specstream.benchmark.rows import Machine, Row, describe_machine
from specstream.benchmark.runners import Decoding
from specstream.benchmark.speed import Rounds
from specstream.benchmark.speed_rows import Result
from specstream.benchmark.study import Study, check_names, say
from specstream.benchmark.target_quality import TargetJudge
from specstream.benchmark.timing import Plan, alternate
from specstream.generation import Limits
from specstream.generation.loading import find_device
from specstream.metrics import TextQuality
from specstream.processors import TextProcessor
from specstream.sampling import Sampling


@dataclass(frozen=True)
class JudgedTask:
    """Questions with references, and the model that answers them.

    Args:
        name: what the table calls it.
        target: folder or hub id of the target; each method decodes its text unless it has a target
            of its own.
        questions: held-out prompts with their references.
        quality: how an answer is judged.
        max_prompt_tokens: leave out longer questions, and say how many; null keeps all, and one
            that the target has no room for is refused.
    """

    name: str
    target: str
    questions: QuestionFile
    quality: TextQuality
    max_prompt_tokens: int | None = None

    def check(self) -> None:
        """Raise ValueError for what can be seen to be wrong before anything is loaded."""
        if not is_model(self.target):
            raise ValueError(f"task '{self.name}': there is no folder '{self.target}'")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(
                f"task '{self.name}': max_prompt_tokens must be at least 1, not "
                f"{self.max_prompt_tokens}"
            )
        self.questions.check()

    def read(self) -> list[Question]:
        """Return the questions that are short enough."""
        found, most = self.questions.read_all(), self.max_prompt_tokens
        if most is None:
            return found
        encode = TextProcessor.from_pretrained(self.target).encode
        short = [question for question in found if len(encode(question.prompt)) <= most]
        num_long = len(found) - len(short)
        if num_long:
            say(f"left out of {self.name}: {num_long} questions of over {most} tokens")
        return short


@dataclass(frozen=True, slots=True)
class TaskQuestions:
    """The questions of a task that are timed, and those that its targets are judged on, if any."""

    timed: list[Question]
    judged: list[Question]


@dataclass(frozen=True)
class DrafterStudy(Study):
    """Decodes questions with every drafter in alternating runs, and judges the answers.

    Args:
        tasks: questions and the target that answers them.
        methods: the drafters; plain decoding of every target is measured beside them.
        samplings: the laws that are decoded.
        num_prompts: questions of each task that are timed, evenly over its file.
        quality_prompts: questions, evenly over the file, on which every target is judged, decoded
            plainly in batches off the clock; a method that keeps its target's text or law has the
            same figure.  null judges the answers that are timed, which are few.
        max_new_tokens: the longest answer; the end of sequence ends one before.
        repeats: timed runs of every method over all questions; medians count.
        warmups: questions decoded by everyone before anything is timed, the longest first.
        only_tasks, only_methods: names, to measure a part.
        skip_missing: leave out methods whose run is not there, saying so, instead of refusing.
        seed: of the draws.
        dtype: of the weights; auto is bfloat16 where the hardware computes in it.
        device: auto, cpu, cuda or cuda:N.
        attn_implementation: sdpa or eager.
        compile: compile our methods; the plain side is the faster of eager and compiled.
    """

    tasks: list[JudgedTask]
    methods: list[Drafted]
    samplings: list[Sampling] = field(default_factory=lambda: [Sampling(temperature=0)])
    num_prompts: int = 64
    quality_prompts: int | None = None
    max_new_tokens: int = 128
    repeats: int = 3
    warmups: int = 2
    only_tasks: list[str] | None = None
    only_methods: list[str] | None = None
    skip_missing: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "sdpa"
    compile: bool = False

    @property
    def limits(self) -> Limits:
        """Where an answer ends."""
        return Limits(self.max_new_tokens)

    def check(self) -> None:
        if min(self.num_prompts, self.repeats) < 1 or self.warmups < 0:
            raise ValueError("num_prompts and repeats must be at least 1 and warmups at least 0")
        if self.quality_prompts is not None and self.quality_prompts < 1:
            raise ValueError(f"quality_prompts must be at least 1, not {self.quality_prompts}")
        check_names(self.tasks, self.methods, self.only_tasks, self.only_methods)
        _ = self.limits  # what it refuses is refused here
        for task in self._tasks:
            task.check()
            for method in self._asked(task):
                reason = method.missing()
                if reason is not None and not self.skip_missing:
                    raise ValueError(f"{reason} (skip_missing: true leaves it out)")
                if reason is not None:
                    say(f"left out of {task.name}: {reason}")
                else:
                    method.own_target(task.target)
            if not self._methods(task):
                raise ValueError(f"task '{task.name}': no method is left to measure")
        find_device(self.device)

    @property
    def _tasks(self) -> list[JudgedTask]:
        return [t for t in self.tasks if self.only_tasks is None or t.name in self.only_tasks]

    def _asked(self, task: JudgedTask) -> list[Drafted]:
        own = [m for m in self.methods if m.tasks is None or task.name in m.tasks]
        return [m for m in own if self.only_methods is None or m.name in self.only_methods]

    def _methods(self, task: JudgedTask) -> list[Drafted]:
        return [method for method in self._asked(task) if method.missing() is None]

    def run(self, arguments: Sequence[str]) -> Iterator[list[Row]]:
        # What cannot be read is refused before anything is loaded or decoded.
        asked = {task.name: self.read(task) for task in self._tasks}
        for task in self._tasks:
            pairs = self.load_targets(task)
            first = pairs[task.target]
            dtype = str(first.target.dtype).removeprefix("torch.")
            machine = describe_machine(first.place, dtype, arguments)
            for sampling in self.samplings:
                if self.compile:  # the last law's graphs, each with its packed weights
                    torch.compiler.reset()
                rows, complete = self.measure(task, asked[task.name], pairs, sampling, machine)
                yield rows
                if not complete:
                    raise KeyboardInterrupt

    def read(self, task: JudgedTask) -> TaskQuestions:
        """Read the questions of a task; ValueError when there are fewer."""
        found, path = task.read(), task.questions.path
        counts = (self.num_prompts, self.quality_prompts or 0)
        return TaskQuestions(*(spread(found, count, path) for count in counts))

    def load_targets(self, task: JudgedTask) -> dict[str, Pair]:
        """Load the task's target, first, and those that its methods name, keyed by their paths."""
        methods = self._methods(task)
        named = [p for m in methods for p in (m.own_target(task.target), m.baseline) if p]
        pairs = {
            path: Pair(Task(task.name, path, []), self.dtype, self.device, self.attn_implementation)
            for path in dict.fromkeys([task.target, *named])
        }
        known = pairs[task.target].processor.tokenizer.get_vocab()
        for path, pair in pairs.items():
            if pair.processor.tokenizer.get_vocab() != known:
                raise ValueError(f"'{path}' and '{task.target}' have different tokenizers")
        return pairs

    def measure(
        self,
        task: JudgedTask,
        asked: TaskQuestions,
        pairs: dict[str, Pair],
        sampling: Sampling,
        machine: Machine,
    ) -> tuple[list[Row], bool]:
        """Time one task under one law; returns its rows and whether all repeats were run."""
        questions, judged = asked.timed, {}
        if asked.judged:
            say(f"{task.name}: judging {len(pairs)} targets on {len(asked.judged)} questions")
            judge = TargetJudge(task.quality, asked.judged, sampling, self.limits, self.seed)
            judged = {path: judge(pair) for path, pair in pairs.items()}
        first = pairs[task.target]
        prompts = [first.processor.encode(question.prompt) for question in questions]
        blocks = [[number] for number in range(len(prompts))]
        plan = Plan(prompts, blocks, self.repeats, self.warmups, self.seed, first.place)
        decoding = Decoding(sampling, self.limits, self.compile)
        entries = [Entry(Result(Plain(), []), path, task.target) for path in pairs]
        entries += [
            Entry(Result(m, []), m.own_target(task.target), m.baseline or task.target)
            for m in self._methods(task)
        ]
        runners = [
            (e, r) for e in entries for r in e.result.method.runners(pairs[e.target], decoding)
        ]
        say(f"{task.name}: {len(runners)} decoders, {len(prompts)} questions")
        progress = Rounds(self.repeats * len(blocks))
        found, complete = alternate([runner for _, runner in runners], plan, progress.advance)
        for (entry, _), did in zip(runners, found, strict=True):
            entry.result.variants.append(did)
        maker = DrafterRowMaker(
            task.name, pairs, task.quality, sampling, self.limits, machine, questions, prompts,
            entries, judged,
        )  # fmt: skip
        return [maker.row(entry) for entry in entries], complete
