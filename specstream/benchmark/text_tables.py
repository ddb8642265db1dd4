"""The tables of causal text: speeds, drafters with task metrics, trained drafters by their tau."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specstream.benchmark.cells import (
    EXACT,
    Column,
    JsonRow,
    Line,
    StudyTables,
    Summary,
    Table,
    joined,
    model_name,
    number,
    qualities,
    speedup,
    times,
    weaker_guarantee,
    with_content,
)


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


SPEED_COLUMNS = [
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


DISTILLATION_COLUMNS = [
    Column("drafters", lambda row: row["method"]),
    Column("seeds", lambda row: str(len(row["seeds"]))),
    Column("tau", number("tau", ".3f")),
    Column("by seed", lambda row: " ".join(f"{tau:.3f}" for tau in row["taus"])),
    Column("alpha", number("alpha", ".3f")),
    Column("alpha by position", lambda row: " ".join(f"{a:.2f}" for a in row["alphas"])),
    Column("tau against the baseline, paired", against_baseline),
    Column("interval over", lambda row: row["interval_over"] or ""),
]


DRAFTER_COLUMNS = [
    Column("method", lambda row: row["method"]),
    Column("speedup", speedup),
    Column("call reduction", times("call_reduction")),
]  # then the task metric


DRAFTER_COLUMNS_AFTER = [
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


def speed_tables(rows: list[JsonRow]) -> list[Table]:
    """Return the table of one task under one setting."""
    first = rows[0]
    title = f"{first['task']}, {first['setting']} ({first['sampling']}; {_size(first)})"
    return [with_content(title, SPEED_COLUMNS, rows)]


def drafter_tables(rows: list[JsonRow]) -> list[Table]:
    """Return the table of one task under one law."""
    columns = [*DRAFTER_COLUMNS, *qualities(rows), *against_target(rows), *DRAFTER_COLUMNS_AFTER]
    title = f"{rows[0]['task']} ({rows[0]['sampling']}; {_size(rows[0])} at most)"
    return [with_content(title, columns, rows)]


def distillation_tables(rows: list[JsonRow]) -> list[Table]:
    """Return the table of one task under one law."""
    first = rows[0]
    steps = f"{first['steps']} steps each, {first['drafted'] or 'as many as each can'} drafted"
    title = f"{first['task']}, {first['sampling']} ({steps}; {_size(first)})"
    return [with_content(title, DISTILLATION_COLUMNS, rows)]


def _size(row: JsonRow) -> str:
    return f"{row['num_prompts']} prompts, {row['max_new_tokens']} new tokens"


def fastest_exact(rows: Sequence[JsonRow]) -> list[Line]:
    """Return the exact method with the largest speedup over the strongest plain decoding."""
    exact = [row for row in rows if row["role"] == "ours" and row["guarantee"] in EXACT]
    held = [(row, strongest_plain(row, rows)) for row in exact]
    gains = [row["tokens_per_second"] / plain["tokens_per_second"] for row, plain in held]
    if not gains:
        return []
    row, plain = held[gains.index(max(gains))]
    return [Line(row, {"plain": plain, "gains": gains})]


def strongest_plain(row: JsonRow, rows: Sequence[JsonRow]) -> JsonRow:
    """Return what decodes without a draft in the least time: of a drafter's baseline, or of any."""

    def is_plain(other: JsonRow) -> bool:
        if row["study"] == "drafters":
            return other["role"] == "plain" and other["target"] == row["baseline"]
        alike = other["batch_size"] == row["batch_size"]
        return alike and other["role"] in ("plain", "transformers")

    return max((r for r in rows if is_plain(r)), key=lambda other: other["tokens_per_second"])


def most_committed(rows: Sequence[JsonRow]) -> list[Line]:
    """Return the drafters with the largest tau of those that are held against a baseline."""
    compared = [row for row in rows if row["difference"] is not None]
    baseline = [row for row in rows if row["method"] == row["baseline"]]
    if not compared or not baseline:
        return []
    return [Line(max(compared, key=lambda row: row["tau"]), {"plain": baseline[0]})]


def _text_task(row: JsonRow) -> str:
    return joined((row["task"], row.get("setting", ""), row["sampling"]))


def _baseline(row: JsonRow) -> str:
    return f"{row['baseline']}: {row['beside']['plain']['tau']:.3f}"


def _plain_speed(row: JsonRow) -> str:
    """Name who decodes without a draft, or of which target, and say how fast."""
    plain = row["beside"]["plain"]
    name = {**plain, "method": model_name(plain["target"])} if "target" in plain else plain
    return f"{method(name)}: {plain['tokens_per_second']:.0f}"


def _promise(row: JsonRow) -> str:
    """Say whose law is meant where it is not that of the target beside."""
    if row.get("target") == row.get("baseline"):
        return str(row["guarantee"])
    return f"{row['guarantee']}, of {model_name(row['target'])}"


def _gained(row: JsonRow) -> str:
    """Return the speedup over the strongest plain decoding; its interval is over our own."""
    is_ours = row["beside"]["plain"]["role"] == "plain"
    return speedup(row) if is_ours else f"{max(row['beside']['gains']):.2f}x"


def _range_of_gains(row: JsonRow) -> str:
    gains = row["beside"]["gains"]
    return f"{len(gains)}: {min(gains):.2f}x to {max(gains):.2f}x" if len(gains) > 1 else ""


def _text(row: JsonRow) -> str:
    """Say how many texts are the target's own, and how good they are."""
    share = share_of_same_texts(row) if "identical_share" in row else same(row)
    parts = [f"its target's text: {share}"] if share else []
    for name, value in list((row["quality"] or {}).items())[:1]:
        words = name.replace("_", " ")
        parts.append(f"{words} {100 * value:.2f} ({100 * row['quality_plain'][name]:.2f})")
    return "; ".join(parts)


TEXT_SUMMARY = Summary(
    "Text, token by token",
    (
        Column("task", _text_task, True),
        Column("without a draft: tokens/s", _plain_speed, True),
        Column("best exact method", method, True),
        Column("guarantee", _promise, True),
        Column("tau", number("tau", ".2f")),
        Column("speedup", _gained),
        Column("all exact methods", _range_of_gains),
        Column("text, its quality (plain's)", _text, True),
        Column("repeated 4-grams", number("repeated_4grams", ".0%")),
    ),
    "Rule: of every task, setting and law the exact method with the largest speedup over decoding "
    "without a draft, by us or by `transformers`, whichever is faster; a drafter with a target of "
    "its own, which its guarantee names, is held against the study's baseline. The largest of "
    "several is chosen after they were measured: read it beside the range of all. Where nothing "
    "says whether it was compiled, nothing was. tau counts the tokens of a target call, one "
    "without a draft; text that repeats itself is easily drafted.",
    "speedup",
)
TRAINED_SUMMARY = Summary(
    "Trained drafters of text",
    (
        Column("task", _text_task, True),
        Column("baseline: tau", _baseline, True),
        Column("best other", lambda row: str(row["method"]), True),
        Column("seeds", lambda row: str(len(row["seeds"]))),
        Column("tau", number("tau", ".3f")),
        Column("paired difference", against_baseline),
        Column("interval over", lambda row: row["interval_over"] or ""),
    ),
    "Rule: of every task and law the loss, or the kind of drafter, with the largest tau besides "
    "the baseline, all trained for as many steps.",
)
SPEED = StudyTables(speed_tables, fastest_exact, TEXT_SUMMARY)
DRAFTERS = StudyTables(drafter_tables, fastest_exact, TEXT_SUMMARY)
DISTILLATION = StudyTables(distillation_tables, most_committed, TRAINED_SUMMARY)
