"""What a terminal shows: text as it is committed, tokens coloured by origin, a table at the end.

The text goes to stdout, everything about it to stderr, so that `generate.py ... > file` keeps the
text alone.  Colours appear on a terminal only (and not with NO_COLOR); elsewhere `show_drafts`
marks tokens with brackets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO

from specstream.generation.command.comparison import Comparison
from specstream.models.quantization import USUAL
from specstream.processors import TextProcessor, TextStream
from specstream.structures import Origin, Stats, Step

COLOURS = {
    Origin.ACCEPTED: "\x1b[32m",  # green
    Origin.CORRECTION: "\x1b[31m",  # red
    Origin.BONUS: "\x1b[36m",  # cyan
    Origin.PLAIN: "",
}
BRACKETS = {
    Origin.ACCEPTED: ("", ""),
    Origin.CORRECTION: ("[", "]"),
    Origin.BONUS: ("<", ">"),
    Origin.PLAIN: ("{", "}"),
}
MEANINGS = {
    Origin.ACCEPTED: "drafted and accepted",
    Origin.CORRECTION: "the target's correction",
    Origin.BONUS: "the target's bonus",
    Origin.PLAIN: "nothing drafted",
}
DIM, RESET = "\x1b[2m", "\x1b[0m"


class TextDisplay:
    """Writes a continuation to `out` as it grows; `shown` counts its tokens."""

    def __init__(
        self,
        processor: TextProcessor,
        stop: Iterable[str] = (),
        show_drafts: bool = False,
        out: TextIO | None = None,
    ) -> None:
        self.out = sys.stdout if out is None else out
        self.coloured = self.out.isatty() and "NO_COLOR" not in os.environ
        self.show_drafts = show_drafts
        self.stream = TextStream(processor, tuple(stop))
        self.shown = 0

    def start(self, prompt: str) -> None:
        """Write the prompt that is to be continued, and the legend if there are colours."""
        if self.show_drafts:
            say("legend: " + ", ".join(self._mark(text, kind) for kind, text in MEANINGS.items()))
        self._write(f"{DIM}{prompt}{RESET}" if self.coloured and prompt else prompt)

    def show(self, step: Step) -> None:
        """Write what a round committed."""
        self.shown += len(step.tokens)
        if not self.show_drafts:
            self._write(step.text)
            return
        for token, origin in zip(step.tokens, step.origins, strict=True):
            self.stream.push([token])
            self._write(self._mark(self.stream.take(), origin))
        if step.finished:
            self.stream.close()
            self._write(self._mark(self.stream.take(final=True), Origin.PLAIN))

    def end(self) -> None:
        """End the last line."""
        self._write("\n")

    def _mark(self, text: str, origin: Origin) -> str:
        if not text:
            return ""
        if not self.coloured:
            left, right = BRACKETS[origin]
            return f"{left}{text}{right}"
        colour = COLOURS[origin]
        return f"{colour}{text}{RESET}" if colour else text

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def report_lines(stats: Stats, comparison: Comparison | None = None) -> list[str]:
    """Return the table of a run, one line for each number; what does not apply is left out."""
    seconds = stats.seconds or float("nan")
    rows = [
        ("guarantee", guarantee_of(stats)),
        (
            "tokens",
            f"{stats.elements} in {stats.seconds:.2f} s, {stats.elements / seconds:.1f} tokens/s",
        ),
        ("target calls", calls_of(stats)),
    ]
    if stats.accepted_length is not None and stats.draft_calls:
        rows.append(("accepted length", f"{stats.accepted_length:.2f} tokens a target call (tau)"))
    if stats.acceptance is not None:
        rows.append(("acceptance", f"{stats.acceptance:.1%} of {sum(stats.tested)} tested drafts"))
        rows.append(("alpha by position", " ".join(f"{alpha:.2f}" for alpha in stats.alphas)))
    if stats.mean_length is not None and stats.share_plain is not None and stats.draft_calls:
        plain = f"{stats.share_plain:.0%} of the rounds without a draft"
        rows.append(("drafted", f"{stats.mean_length:.2f} tokens a round, {plain}"))
    rows += quantized_rows(stats)
    if comparison is not None:
        rows += comparison_rows(comparison)
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{value}" for name, value in rows]


def quantized_rows(stats: Stats) -> list[tuple[str, str]]:
    """Return what became int8, in how many bytes, and what did not, for each model."""
    rows = []
    for role, made in stats.quantized.items():
        assert isinstance(made, dict)
        if made["method"] == "none":
            continue
        how = "" if made["method"] == USUAL else f" ({made['method']})"
        layers = f"{made['linear_layers']} linear layers{how}"
        share = f"{made['share_of_parameters']:.0%} of its parameters"
        size = f"{made['bytes']:,}, {made['bytes_ratio']:.3f}x those of bfloat16"
        kinds = made["not_converted"].items()
        left = ", ".join(f"{kind.replace('_', ' ')} {part:.1%}" for kind, part in kinds)
        rows.append(("int8 weights", f"{role}: {layers}, {share}"))
        rows.append(("their bytes", f"{role}: {size}"))
        rows.append(("not converted", f"{role}: {left or 'nothing'}"))
    return rows


def guarantee_of(stats: Stats) -> str:
    """Name what a run promises, and of which law where that is not simply the target's."""
    own = Stats.__dataclass_fields__["law"].default
    return stats.guarantee.value + ("" if stats.law == own else f", of {stats.law}")


def calls_of(stats: Stats) -> str:
    """Return the target's calls, and its passes over one row where they are another number."""
    passes = stats.full_passes
    if passes is None or passes == stats.target_calls:
        return f"{stats.target_calls}"
    return f"{stats.target_calls}, as much work as {passes:.2f} passes over one row"


def comparison_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the rows that set a run beside the plain target."""
    plain = f"{comparison.baseline_elements} in {comparison.baseline_seconds:.2f} s"
    rows = [
        ("plain tokens", f"{plain}, {comparison.baseline_target_calls} target calls"),
        ("speedup", f"{comparison.speedup:.2f}x over the plain target (ratio of medians)"),
    ]
    if comparison.identical is None:
        rows.append(("identical", "not expected: tokens are drawn, each run draws its own"))
    elif comparison.identical:
        rows.append(("identical", "yes, to the greedy text of the plain target"))
    else:
        rows.append(("identical", f"no: {comparison.difference}"))
    return rows


def say(line: str) -> None:
    """Print one line about the run."""
    print(line, file=sys.stderr, flush=True)
