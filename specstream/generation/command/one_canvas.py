"""One prompt of a masked diffusion model: its canvas round by round, the text, then the numbers."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specstream.generation.command.display import DIM, RESET, report_lines, say
from specstream.generation.command.one_prompt import INTERRUPTED, write_stats
from specstream.generation.command.options import Options
from specstream.generation.masked import MaskedPipeline
from specstream.structures import CanvasStep, Completion, Stats
from specstream.unmasking import StaticSchedule

REPEATS = 3
DRAFTED, REMASKED, FILLED = "\x1b[32m", "\x1b[31m", "\x1b[36m"  # green, red, cyan


@dataclass(frozen=True, slots=True)
class Filled:
    """One filling of a canvas."""

    completion: Completion
    stats: Stats


def fill_one(pipeline: MaskedPipeline, options: Options) -> int:
    """Fill the canvas of `options.prompt` and show it; returns the exit code, 130 after Ctrl-C."""
    assert options.prompt is not None
    rows: list[tuple[str, Filled, float]] = []
    try:
        if options.show_drafts:
            show_rounds(pipeline, options.prompt, options.seed)
        found = fill(pipeline, options.prompt, options.seed)
        print(found.completion.text, flush=True)
        if options.compare:
            say("comparing with the plain target ...")
            rows = compare(pipeline, options.prompt, options.seed)
    except KeyboardInterrupt:
        say("interrupted before the canvas was full")
        return INTERRUPTED
    stats = found.stats if not rows else replace(found.stats, seconds=rows[0][2])
    say("")
    for line in report_lines(stats):
        say(line)
    for line in comparison_lines(rows):
        say(line)
    if options.stats is not None:
        write_stats(Path(options.stats), stats, also=baseline_facts(rows))
    return 0


def fill(pipeline: MaskedPipeline, prompt: str, seed: int) -> Filled:
    """Fill one canvas silently."""
    (completion,) = pipeline.complete([prompt], seed=seed)
    return Filled(completion, replace(pipeline.stats))


def show_rounds(pipeline: MaskedPipeline, prompt: str, seed: int) -> None:
    """Write the canvas after each round to stderr: drafted and kept, remasked, the target's own."""
    coloured = sys.stderr.isatty()
    marks = ("drafted and kept", "drafted and masked again", "filled by the target")
    colours = (DRAFTED, REMASKED, FILLED)
    plain = ("(+)", "(-)", "(*)")
    legend = zip(marks, colours, plain, strict=True)
    say("legend: " + ", ".join(f"{c}{m}{RESET}" if coloured else f"{p} {m}" for m, c, p in legend))
    for number, step in enumerate(pipeline.generate([prompt], seed=seed), start=1):
        kept = set(step.drafted) - set(step.remasked)
        own = [place for place in step.filled if place not in kept]
        counts = f"{len(kept)} kept, {len(step.remasked)} remasked, {len(own)} by the target"
        say(f"{number:3d} {DIM if coloured else ''}{counts}{RESET if coloured else ''}")
        say("    " + render(pipeline, step, coloured))


def render(pipeline: MaskedPipeline, step: CanvasStep, coloured: bool) -> str:
    """Return the canvas as text, masks as dots."""
    kept = set(step.drafted) - set(step.remasked)
    pieces = []
    for place, token in enumerate(step.tokens):
        text = "." if token == pipeline.target.mask_id else pipeline.processor.decode([token])
        text = text.replace("\n", "\\n")
        if place in step.remasked:
            pieces.append(f"{REMASKED}.{RESET}" if coloured else "-")
        elif place in kept:
            pieces.append(f"{DRAFTED}{text}{RESET}" if coloured else text)
        elif place in step.filled:
            pieces.append(f"{FILLED}{text}{RESET}" if coloured else text)
        else:
            pieces.append(text)
    return "".join(pieces)


def compare(pipeline: MaskedPipeline, prompt: str, seed: int) -> list[tuple[str, Filled, float]]:
    """Time `pipeline`, the plain target, and the plain target with fewer steps, in turns.

    Returns (name, a filling, median seconds) of each, `pipeline` first, the full plain one second.
    """
    methods = [("this run", pipeline)] + plain_methods(pipeline)
    found = [fill(method, prompt, seed) for _, method in methods]  # warm-up
    seconds: list[list[float]] = [[] for _ in methods]
    for _ in range(REPEATS):
        for times, (_, method) in zip(seconds, methods, strict=True):
            times.append(fill(method, prompt, seed).stats.seconds)
    return [
        (name, filled, statistics.median(times))
        for (name, _), filled, times in zip(methods, found, seconds, strict=True)
    ]


def plain_methods(pipeline: MaskedPipeline) -> list[tuple[str, MaskedPipeline]]:
    """Return the plain target as it samples here, and with a half and a quarter of the steps."""
    rule = pipeline.sampler.unmasking
    rules = [("plain target", rule)]
    if isinstance(rule, StaticSchedule):
        fewer = [rule.num_steps // 2, rule.num_steps // 4]
        rules += [(f"plain, {n} steps", replace(rule, num_steps=n)) for n in fewer if n]
    return [
        (
            name,
            MaskedPipeline(
                pipeline.target,
                pipeline.processor,
                replace(pipeline.sampler, unmasking=each),
                pipeline.batch_size,
                pipeline.compiled,
            ),
        )
        for name, each in rules
    ]


def comparison_lines(rows: Sequence[tuple[str, Filled, float]]) -> list[str]:
    """Return the table of `compare`: seconds, calls, and how much of the plain text is the same."""
    if not rows:
        return []
    full = rows[1]
    lines = [f"{'':<18}{'seconds':>9}{'calls':>7}{'speedup':>9}{'same as plain':>15}"]
    for name, filled, seconds in rows:
        lines.append(
            f"{name:<18}{seconds:>9.3f}{filled.stats.target_calls:>7}"
            f"{full[2] / seconds:>8.2f}x{agreement(filled, full[1]):>14.0%}"
        )
    return lines


def agreement(one: Filled, other: Filled) -> float:
    """Return the share of filled positions with the same token."""
    pairs = list(zip(one.completion.tokens, other.completion.tokens, strict=False))
    most = max(len(one.completion.tokens), len(other.completion.tokens), 1)
    return sum(a == b for a, b in pairs) / most


def baseline_facts(rows: Sequence[tuple[str, Filled, float]]) -> dict[str, object]:
    """Return the keys that `--compare` adds to `--stats`."""
    if not rows:
        return {}
    (_, ours, seconds), (_, plain, baseline) = rows[:2]
    return {
        "baseline_seconds": baseline,
        "baseline_target_calls": plain.stats.target_calls,
        "speedup": baseline / seconds,
        "identical": ours.completion.tokens == plain.completion.tokens,
    }
