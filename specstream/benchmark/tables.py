"""Rows as tables: the same columns on the terminal and in the README."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from specstream.benchmark.media_cells import known_batch, known_seconds_as_ms, over_equal_seconds
from specstream.models.quantization import IN_INT8

JsonRow = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and what stands below it."""

    heading: str
    cell: Callable[[JsonRow], str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that belong together, under their title."""

    title: str
    columns: list[Column]
    rows: list[JsonRow]
    is_plotted: bool = True


def number(key: str, form: str) -> Callable[[JsonRow], str]:
    """Return a cell that formats a number, empty where there is none."""
    return lambda row: "" if row.get(key) is None else format(row[key], form)


def seconds_as_ms(key: str) -> Callable[[JsonRow], str]:
    """Return a cell of seconds, in milliseconds."""
    return lambda row: f"{1000 * row[key]:.2f}"


def times(key: str) -> Callable[[JsonRow], str]:
    """Return a cell such as 1.85x."""
    return lambda row: "" if row.get(key) is None else f"{row[key]:.2f}x"


def speedup(row: JsonRow) -> str:
    """Return the speedup over plain decoding with its interval."""
    if row["speedup_interval"] is None:
        return times("speedup_vs_plain")(row)
    low, high = row["speedup_interval"]
    return f"{row['speedup_vs_plain']:.2f}x [{low:.2f}, {high:.2f}]"


def same(row: JsonRow) -> str:
    """Say whether greedy output is the plain target's."""
    if row["identical"] is None:
        return ""
    if row["identical"]:
        return "yes"
    if row["differences"]:
        return f"no: {row['differences']} of {row['num_prompts']}"
    return f"yes, {row['ties']} ties"


def method(row: JsonRow) -> str:
    """Name a method, and its variant where another was slower."""
    return row["method"] if len(row["variants"]) == 1 else f"{row['method']} ({row['variant']})"


def against_baseline(row: JsonRow) -> str:
    """Return the paired difference with its interval."""
    if row["difference"] is None:
        return "baseline" if row["method"] == row["baseline"] else ""
    low, high = row["interval"]
    return f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] ({row['relative']:+.1%})"


def share_of_same_texts(row: JsonRow) -> str:
    """Say how many greedy texts are those of plain decoding, and why others are not."""
    if row["identical_share"] is None:
        return ""
    reasons = [f"{row['ties']} ties"] * bool(row["ties"])
    reasons += [f"{row['differences']} beyond rounding"] * bool(row["differences"])
    return ", ".join([f"{row['identical_share']:.0%}", *reasons])


def drafters_own(key: str, form: str) -> Callable[[JsonRow], str]:
    """Return a cell for a number that plain decoding does not have."""
    return lambda row: "" if row["role"] == "plain" else format(row[key], form)


def weaker_guarantee(row: JsonRow) -> str:
    """Return what a method promises where that is less than the target's law."""
    return "" if row["guarantee"] == "exact law" else str(row["guarantee"])


def promised(row: JsonRow) -> str:
    """Return what a method promises where that is less, or where its target became int8."""
    if row["law"].endswith(IN_INT8):
        return f"{row['guarantee']} of {row['law']}"
    return weaker_guarantee(row)


def qualities(rows: Sequence[JsonRow]) -> list[Column]:
    """Return a column for each score of the task metric, in percent."""

    def cell(name: str) -> Callable[[JsonRow], str]:
        return lambda row: f"{100 * row['quality'][name]:.2f}"

    return [Column(name.replace("_", " "), cell(name)) for name in rows[0]["quality"]]


def against_target(rows: Sequence[JsonRow]) -> list[Column]:
    """Return how far each score is from that of the task's target, and on how many prompts.

    Older files do not say; the number is left out where it is that of the timed prompts.
    """

    def cell(name: str) -> Callable[[JsonRow], str]:
        def found(row: JsonRow) -> str:
            if row.get("quality_differences") is None:
                return ""
            gap, (low, high) = row["quality_differences"][name], row["quality_intervals"][name]
            return f"{100 * gap:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"

        return found

    columns = [
        Column(f"{name.replace('_', ' ')} over the target's", cell(name))
        for name in rows[0]["quality"]
    ]
    if any(row.get("quality_prompts", row["num_prompts"]) != row["num_prompts"] for row in rows):
        columns.append(Column("prompts judged", number("quality_prompts", "d")))
    return columns


def judged(key: str, form: str) -> Callable[[JsonRow], str]:
    """Return a cell for what says something of free text only, beside a judge."""
    return lambda row: "" if row["judge_nll"] is None else number(key, form)(row)


def filler(row: JsonRow) -> str:
    """Name a way to fill canvases, and the plain one that the others have to beat."""
    return f"{row['method']} (best plain)" if row["best_plain"] else str(row["method"])


def milliseconds(row: JsonRow) -> str:
    """Return the time of a prompt."""
    return f"{1000 * row['seconds']:.1f}"


def versus(key: str) -> Callable[[JsonRow], str]:
    """Return a speedup over a plain sampler with its interval."""

    def cell(row: JsonRow) -> str:
        low, high = row[f"{key}_interval"]
        return f"{row[key]:.2f}x [{low:.2f}, {high:.2f}]"

    return cell


def above_plain(row: JsonRow) -> str:
    """Say at which equal cost a method is better than plain sampling."""
    if row["kind"] == "plain":
        return ""
    known = {"calls": row["above_plain"], "time": row["above_plain_seconds"]}
    above = [name for name, is_above in known.items() if is_above is True]
    level = [f"{name} level" for name, is_above in known.items() if is_above == "level"]
    unknown = [f"{name}?" for name, is_above in known.items() if is_above is None]
    return ", ".join([*above, *level, *unknown]) or "no"


def quality_difference(row: JsonRow) -> str:
    """Return how much better than the reference, with its interval; empty in older files."""
    if row.get("quality_difference") is None:
        return ""
    scale, form = (100, "+.2f") if row["quality"] else (1, "+.3f")
    gap, low, high = (
        scale * value for value in (row["quality_difference"], *row["quality_interval"])
    )
    return f"{gap:{form}} [{low:{form}}, {high:{form}}]"


def with_noise(key: str, noise: str) -> Callable[[JsonRow], str]:
    """Return a cell of a distance and the deviation it would have if there were none."""
    return lambda row: f"{row[key]:+.4f} (noise {row[noise]:.4f})"


SPEED = [
    Column("method", method),
    Column("tau", number("tau", ".2f")),
    Column("alpha", number("alpha", ".2f")),
    Column("drafted", number("mean_length", ".2f")),
    Column("plain rounds", number("share_plain", ".0%")),
    Column("tokens/s", number("tokens_per_second", ".0f")),
    Column("speedup", speedup),
    Column("bound", times("bound")),
    Column("efficiency", number("efficiency", ".2f")),
    Column("vs transformers", times("speedup_vs_hf")),
    Column("vs assisted", times("speedup_vs_hf_assisted")),
    Column("vs batch 1", times("speedup_vs_batch_1")),
    Column("same text", same),
    Column("int8 / bf16 bytes", number("bytes_ratio", ".3f")),
    Column("repeated 4-grams", number("repeated_4grams", ".0%")),
]
DISTILLATION = [
    Column("drafters", lambda row: row["method"]),
    Column("seeds", lambda row: str(len(row["seeds"]))),
    Column("tau", number("tau", ".3f")),
    Column("by seed", lambda row: " ".join(f"{tau:.3f}" for tau in row["taus"])),
    Column("alpha", number("alpha", ".3f")),
    Column("alpha by position", lambda row: " ".join(f"{a:.2f}" for a in row["alphas"])),
    Column("tau against the baseline, paired", against_baseline),
    Column("interval over", lambda row: row["interval_over"] or ""),
]
DRAFTERS = [
    Column("method", lambda row: row["method"]),
    Column("speedup", speedup),
    Column("call reduction", times("call_reduction")),
]  # then the task metric
DRAFTERS_AFTER = [
    Column("extra parameters", drafters_own("extra_parameters", ",")),
    Column("of Medusa's", drafters_own("share_of_medusa", ".3g")),
    Column(
        "LoRA parameters", lambda row: f"{row['lora_parameters']:,}" * bool(row["lora_parameters"])
    ),
    Column("tau", number("tau", ".2f")),
    Column("alpha", number("alpha", ".2f")),
    Column("drafted", number("mean_length", ".2f")),
    Column("tokens/s", number("tokens_per_second", ".0f")),
    Column("bound", times("bound")),
    Column("efficiency", number("efficiency", ".2f")),
    Column("same text", share_of_same_texts),
    Column("guarantee", weaker_guarantee),
    Column("repeated 4-grams", number("repeated_4grams", ".0%")),
]

STEPS = [
    Column("positions", number("length", "d")),
    Column("block", number("block_length", "d")),
    Column("target parameters", number("target_parameters", ",")),
    Column("drafter parameters", number("drafter_parameters", ",")),
    Column("target step, ms", seconds_as_ms("target_seconds")),
    Column("drafter step, ms", seconds_as_ms("drafter_seconds")),
    Column("without cache, ms", seconds_as_ms("uncached_seconds")),
    Column("cheaper", times("ratio")),
]
MASKED = [Column("method", filler)]  # then the task metric
MASKED_AFTER = [
    Column("judge NLL", number("judge_nll", ".3f")),
    Column("better than all steps", quality_difference),
    Column("bits a character", number("judge_bits_per_character", ".3f")),
    Column("entropy", judged("entropy", ".2f")),
    Column("distinct 2-grams", judged("distinct_2", ".2f")),
    Column("calls", number("target_calls", ".2f")),
    Column("full passes", number("full_passes", ".2f")),
    Column("ms", milliseconds),
    Column("fewer calls", times("call_ratio")),
    Column("than best plain", times("call_ratio_vs_best")),
    Column("speedup", versus("speedup")),
    Column("over best plain", versus("speedup_vs_best")),
    Column("above plain", above_plain),
    Column("acceptance", number("acceptance", ".2f")),
    Column("drafted", number("mean_drafted", ".1f")),
    Column("same text", number("identical_share", ".0%")),
    Column("guarantee", lambda row: "" if row["kind"] == "plain" else str(row["guarantee"])),
]
MATCHED = [
    Column("method", filler),
    Column("judge NLL", number("judge_nll", ".3f")),
    Column("full passes", number("full_passes", ".2f")),
    Column("plain full passes", lambda row: number("matched_passes", ".2f")(row) or row["matched"]),
    Column("fewer", times("matched_ratio")),
    Column("entropy", number("entropy", ".2f")),
    Column("plain entropy", number("matched_entropy", ".2f")),
]
MEDIA = [
    Column("method", lambda row: row["method"]),
    Column("steps", number("num_steps", "d")),
    Column("eta", number("eta", "g")),
    Column("rounds", number("rounds", ".2f")),
    Column("fewer rounds", times("round_ratio")),
    Column("rows", number("target_rows", ".1f")),
    Column("draft calls", number("draft_calls", ".2f")),
    Column("draft passes", number("draft_passes", ".2f")),
    Column("acceptance", number("acceptance", ".2f")),
    Column("ms alone", seconds_as_ms("seconds_alone")),
    Column("speedup", versus("speedup_alone")),
    Column("ms in batch", seconds_as_ms("seconds_in_batch")),
    Column("in batch", times("speedup_in_batch")),
    Column("over equal seconds", over_equal_seconds),
    Column("distance to data", with_noise("data_distance", "data_noise")),
    Column("to plain samples", with_noise("plain_distance", "plain_noise")),
    Column("p", number("plain_p_value", ".3f")),
    Column("int8 / bf16 bytes", number("bytes_ratio", ".3f")),
    Column("frame change", number("temporal_consistency", ".2f")),
    Column("spectrum, dB", number("spectrum_distance", ".2f")),
    Column("guarantee", promised),
]
SOLVERS = [
    Column("method", lambda row: row["method"]),
    Column("rounds", number("rounds", ".2f")),
    Column("rows", number("target_rows", ".1f")),
    Column("draft passes", number("draft_passes", ".2f")),
    Column("ms in batch", known_seconds_as_ms("seconds_in_batch")),
    Column("PSNR, dB", number("psnr", ".1f")),
    Column("distance to data", number("data_distance", "+.4f")),
    Column("guarantee", weaker_guarantee),
]


def make_tables(rows: Sequence[JsonRow]) -> list[Table]:
    """Group rows into tables, in the order they were measured; empty columns are left out."""
    tables = []
    for title, columns, group in _groups(rows):
        shown = [column for column in columns if any(column.cell(row) for row in group)]
        tables.append(Table(title, shown, group))
        matched = [row for row in group if row.get("matched")]
        if matched:
            at = "as plain sampling in random order with the same judge NLL"
            tables.append(Table(f"{title.split(';')[0]}): {at}", MATCHED, matched, False))
    return tables


def _groups(rows: Sequence[JsonRow]) -> Iterator[tuple[str, list[Column], list[JsonRow]]]:
    def key(row: JsonRow) -> tuple[str, ...]:
        return (row["study"], row["task"], row.get("setting", ""), row.get("sampling", ""))

    for (study, task, setting, sampling), members in groupby(rows, key):
        group = list(members)
        if study == "steps":
            yield f"{task} (batch {group[0]['batch_size']}; seconds of one step)", STEPS, group
            continue
        if study in ("media", "solvers"):
            yield _media_title(group[0]), MEDIA if study == "media" else SOLVERS, group
            continue
        tokens = f"{group[0]['num_prompts']} prompts, {group[0]['max_new_tokens']} new tokens"
        if study == "speed":
            yield f"{task}, {setting} ({sampling}; {tokens})", SPEED, group
        elif study == "drafters":
            columns = [*DRAFTERS, *qualities(group), *against_target(group), *DRAFTERS_AFTER]
            yield f"{task} ({sampling}; {tokens} at most)", columns, group
        elif study == "masked":
            masks = f"{group[0]['num_prompts']} prompts, {group[0]['max_new_tokens']} masks"
            columns = [*MASKED, *qualities(group), *MASKED_AFTER]
            yield f"{task} ({sampling}; {masks}; costs of a prompt)", columns, group
        else:
            drafted = group[0]["drafted"] or "as many as each can"
            steps = f"{group[0]['steps']} steps each, {drafted} drafted"
            yield f"{task}, {sampling} ({steps}; {tokens})", DISTILLATION, group


def _media_title(row: JsonRow) -> str:
    """Say what was drawn, and what it is compared with."""
    if row["study"] == "solvers":
        solution = f"beside {row['reference_steps']} Euler steps from the same noise"
        return f"{row['task']}, eta 0 ({row['num_samples']} samples {solution}{known_batch(row)})"
    counts = f"{row['num_samples']} samples, {row['num_held_out']} held-out ones"
    return f"{row['task']}, {row['setting']} ({counts}; batch {row['batch_size']})"


def print_tables(rows: Sequence[JsonRow]) -> None:
    """Print the tables to stdout."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in make_tables(rows):
        shown = RichTable(title=table.title, title_justify="left", show_edge=False)
        for i, column in enumerate(table.columns):
            shown.add_column(column.heading, justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*(column.cell(row) for column in table.columns))
        console.print(shown)


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    lines = [
        "| " + " | ".join(column.heading for column in table.columns) + " |",
        "| --- " + "| ---: " * (len(table.columns) - 1) + "|",
    ]
    lines += ["| " + " | ".join(c.cell(row) for c in table.columns) + " |" for row in table.rows]
    return "\n".join(lines)
