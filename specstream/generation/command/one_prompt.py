"""One prompt: its text as it is committed, then the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from specstream.files import write_whole
from specstream.generation.autoregressive import AutoregressivePipeline
from specstream.generation.base import TextPipeline
from specstream.generation.command.comparison import Comparison, Run, compare
from specstream.generation.command.display import TextDisplay, report_lines, say
from specstream.generation.command.options import Options
from specstream.structures import Stats

INTERRUPTED = 130


def generate_one(pipeline: TextPipeline, options: Options) -> int:
    """Decode `options.prompt` and show it; returns the exit code, 130 after Ctrl-C.

    Raises ValueError for a prompt that the models cannot take.
    """
    assert options.prompt is not None
    if options.compare and isinstance(pipeline, AutoregressivePipeline):
        raise ValueError("compare: this is the plain target already, there is no drafter")
    display = TextDisplay(pipeline.processor, options.limits.stop, options.show_drafts)
    comparison: Comparison | None = None
    try:
        run = stream(pipeline, options, display)
        if options.compare:
            say("comparing with the plain target ...")
            comparison = compare(pipeline, run, options.prompt, options.seed)
    except KeyboardInterrupt:
        display.end()
        say(f"interrupted after {display.shown} tokens; the text above is what was committed")
        return INTERRUPTED
    stats = run.stats
    if comparison is not None:  # the timed runs were warm, the first was not
        stats = replace(stats, seconds=comparison.seconds)
    say("")
    for line in report_lines(stats, comparison):
        say(line)
    if options.stats is not None:
        write_stats(Path(options.stats), stats, comparison.as_dict() if comparison else None)
    return 0


def stream(pipeline: TextPipeline, options: Options, display: TextDisplay) -> Run:
    """Decode once, showing each step as it is committed."""
    assert options.prompt is not None
    tokens: list[int] = []
    for step in pipeline.generate([options.prompt], seed=options.seed):
        if not tokens:  # not before: a prompt that is refused is not shown
            display.start("" if options.chat else options.prompt)
        tokens += step.tokens
        display.show(step)
    display.end()
    return Run(tokens, replace(pipeline.stats))


def write_stats(path: Path, stats: Stats, also: Mapping[str, object] | None = None) -> None:
    """Write the one JSON object of `--stats`, whole or not at all; `also` is added to it."""
    facts = stats.as_dict() | dict(also or {})
    write_whole(path, json.dumps(facts, indent=2) + "\n")
