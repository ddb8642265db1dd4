"""One prompt of a masked diffusion model: its canvas round by round, the text, then the numbers."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from specstream.generation.canvases import complete_canvas, mask_blocks
from specstream.generation.command.comparison import REPEATS
from specstream.generation.command.display import DIM, RESET, report_lines, say
from specstream.generation.command.one_prompt import INTERRUPTED, write_stats
from specstream.generation.command.options import Options
from specstream.generation.masked import MaskedPipeline
from specstream.structures import CanvasStep, Completion, Origin, Stats
from specstream.unmasking import StaticSchedule, Unmasking


@dataclass(frozen=True, slots=True)
class Mark:
    """How `--show_drafts` marks a position: on a terminal by colour, elsewhere as (sign token)."""

    meaning: str
    colour: str
    sign: str


KEPT = Mark("drafted and kept", "\x1b[32m", "+")  # green
REMASKED = Mark("drafted and masked again", "\x1b[31m", "-")  # red
OWN = Mark("filled by the target", "\x1b[36m", "*")  # cyan
MASK = "."


@dataclass(frozen=True, slots=True)
class Filled:
    """One filling of a canvas."""

    completion: Completion
    stats: Stats


@dataclass(frozen=True, slots=True)
class Timed:
    """A way of filling a canvas as `compare` has found it; `seconds` are a median."""

    name: str
    filled: Filled
    seconds: float


@dataclass(frozen=True, slots=True)
class CanvasComparison:
    """What this run cost beside the plain target (itself, if it is that) and with fewer steps."""

    ours: Timed
    plain: Timed
    fewer: Sequence[Timed]
    greedy: bool  # whether the texts are to be compared too: tokens drawn at random differ

    def as_dict(self) -> dict[str, object]:
        """Return the keys that `--compare` adds to `--stats`."""
        same = self.ours.filled.completion.tokens == self.plain.filled.completion.tokens
        return {
            "baseline_seconds": self.plain.seconds,
            "baseline_target_calls": self.plain.filled.stats.target_calls,
            "speedup": self.plain.seconds / self.ours.seconds,
            "identical": same if self.greedy else None,
        }

    def lines(self) -> list[str]:
        """Return the table: seconds, calls, and how much of the plain target's text is the same."""
        rows = [self.ours, *([] if self.plain is self.ours else [self.plain]), *self.fewer]
        width = max(len(row.name) for row in rows) + 2
        lines = [f"{'':<{width}}{'seconds':>9}{'calls':>7}{'speedup':>9}{'same as plain':>15}"]
        for row in rows:
            same = f"{agreement(row.filled, self.plain.filled):.0%}" if self.greedy else "drawn"
            lines.append(
                f"{row.name:<{width}}{row.seconds:>9.3f}{row.filled.stats.target_calls:>7}"
                f"{self.plain.seconds / row.seconds:>8.2f}x{same:>15}"
            )
        return lines


def fill_one(pipeline: MaskedPipeline, options: Options) -> int:
    """Fill the canvas of `options.prompt` and show it; returns the exit code, 130 after Ctrl-C."""
    assert options.prompt is not None
    options.canvas.check_room(len(pipeline.encode(options.prompt).tokens))
    display = RoundDisplay(pipeline).show if options.show_drafts else None
    found: Filled | None = None
    comparison: CanvasComparison | None = None
    try:
        found = fill(pipeline, options.prompt, options.seed, display)
        print(found.completion.text, flush=True)
        if options.compare:
            other = "fewer steps" if is_plain(pipeline) else "the plain target"
            say(f"comparing with {other} ...")
            comparison = compare(pipeline, found, options.prompt, options.seed)
    except KeyboardInterrupt:
        say("interrupted " + ("before the canvas was full" if found is None else "while comparing"))
        return INTERRUPTED
    stats = found.stats
    if comparison is not None:  # the timed runs were warm, the first was not
        stats = replace(stats, seconds=comparison.ours.seconds)
    say("")
    for line in report_lines(stats) + (comparison.lines() if comparison else []):
        say(line)
    if options.stats is not None:
        write_stats(Path(options.stats), stats, comparison.as_dict() if comparison else None)
    return 0


def fill(
    pipeline: MaskedPipeline,
    prompt: str,
    seed: int,
    show: Callable[[CanvasStep], None] | None = None,
) -> Filled:
    """Fill one canvas; `show` is told each round."""
    tokens: list[int] = []
    origins: dict[int, Origin] = {}
    for step in pipeline.generate([prompt], seed=seed):
        if show is not None:
            show(step)
        tokens = step.tokens
        for place in step.filled:
            origins[place] = Origin.ACCEPTED if place in step.drafted else Origin.PLAIN
    completion = complete_canvas(
        pipeline.processor,
        pipeline.encode(prompt),
        0,
        tokens,
        origins,
        pipeline.sampler.limits.ignore_eos,
    )
    return Filled(completion, replace(pipeline.stats))


class RoundDisplay:
    """Writes the canvas after each round to stderr, and before the first what the marks mean."""

    def __init__(self, pipeline: MaskedPipeline) -> None:
        self.processor, self.mask_id = pipeline.processor, pipeline.target.mask_id
        self.coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        self.rounds = 0

    def show(self, step: CanvasStep) -> None:
        """Write what a round did."""
        if not self.rounds:  # not before: a prompt that is refused is not shown
            say(self.legend())
        self.rounds += 1
        kept = set(step.drafted) & set(step.filled)
        own = len(step.filled) - len(kept)
        counts = f"{len(kept)} kept, {len(step.remasked)} remasked, {own} by the target"
        say(f"{self.rounds:3d} " + (f"{DIM}{counts}{RESET}" if self.coloured else counts))
        say("    " + self.render(step))

    def legend(self) -> str:
        """Return the line that explains the marks."""
        if self.coloured:
            marks = [f"{mark.colour}{mark.meaning}{RESET}" for mark in (KEPT, REMASKED, OWN)]
        else:
            texts = ((KEPT, "x"), (REMASKED, ""), (OWN, "x"))
            marks = [f"{self._mark(text, mark)} {mark.meaning}" for mark, text in texts]
        return "legend: " + ", ".join([*marks, f"{MASK} masked"])

    def render(self, step: CanvasStep) -> str:
        """Return the canvas as text; what was masked again is a mark without a token."""
        drafted, filled, remasked = set(step.drafted), set(step.filled), set(step.remasked)
        pieces = []
        for place, token in enumerate(step.tokens):
            text = MASK if token == self.mask_id else self.processor.decode([token])
            text = text.replace("\n", "\\n")
            if place in remasked:
                text = self._mark(MASK if self.coloured else "", REMASKED)
            elif place in filled:
                text = self._mark(text, KEPT if place in drafted else OWN)
            pieces.append(text)
        return "".join(pieces)

    def _mark(self, text: str, mark: Mark) -> str:
        return f"{mark.colour}{text}{RESET}" if self.coloured else f"({mark.sign}{text})"


def compare(pipeline: MaskedPipeline, first: Filled, prompt: str, seed: int) -> CanvasComparison:
    """Time `pipeline`, the plain target, and the plain target with fewer steps, in turns.

    `first` was the pipeline's warm-up.
    """
    methods = {"this run": pipeline}
    if not is_plain(pipeline):
        methods["plain target"] = plain_target(pipeline, pipeline.sampler.unmasking)
    for schedule in fewer_steps(pipeline, prompt):
        name = f"plain, {schedule.num_steps} step" + "s" * (schedule.num_steps > 1)
        methods[name] = plain_target(pipeline, schedule)
    found = [first] + [fill(method, prompt, seed) for method in list(methods.values())[1:]]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(REPEATS):
        for name, method in methods.items():
            seconds[name].append(fill(method, prompt, seed).stats.seconds)
    rows = [
        Timed(name, filled, statistics.median(seconds[name]))
        for name, filled in zip(methods, found, strict=True)
    ]
    num_full = 1 if is_plain(pipeline) else 2
    plain, fewer = rows[num_full - 1], rows[num_full:]
    return CanvasComparison(rows[0], plain, fewer, pipeline.sampler.sampling.greedy)


def is_plain(pipeline: MaskedPipeline) -> bool:
    """Whether this is the plain target already; every other way is a subclass."""
    return type(pipeline) is MaskedPipeline


def plain_target(pipeline: MaskedPipeline, unmasking: Unmasking) -> MaskedPipeline:
    """Return the target of `pipeline` alone, filling by `unmasking`."""
    return MaskedPipeline(
        pipeline.target,
        pipeline.processor,
        replace(pipeline.sampler, unmasking=unmasking),
        pipeline.batch_size,
        pipeline.compiled,
    )


def fewer_steps(pipeline: MaskedPipeline, prompt: str) -> list[StaticSchedule]:
    """Return schedules with a half and a quarter of the steps that the fullest block takes.

    One step a mask is the most that a schedule takes, and what a rule in its place is held to.
    """
    canvas = torch.tensor([pipeline.encode(prompt).tokens])
    _, masks = mask_blocks(canvas == pipeline.target.mask_id, pipeline.sampler.block_tokens)
    most, rule = int(masks.max()), pipeline.sampler.unmasking
    schedule = rule if isinstance(rule, StaticSchedule) else StaticSchedule(most)
    steps = min(schedule.num_steps, most)
    return [replace(schedule, num_steps=n) for n in (steps // 2, steps // 4) if n]


def agreement(one: Filled, other: Filled) -> float:
    """Return the share of filled positions with the same token."""
    pairs = list(zip(one.completion.tokens, other.completion.tokens, strict=False))
    most = max(len(one.completion.tokens), len(other.completion.tokens), 1)
    return sum(a == b for a, b in pairs) / most
