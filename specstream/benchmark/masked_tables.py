"""The tables of masked diffusion: quality against calls, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specstream.benchmark.cells import (
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
    seconds_as_ms,
    times,
    versus,
    with_content,
)
from specstream.benchmark.pareto import Point, least_good


def judged(key: str, form: str) -> Callable[[JsonRow], str]:
    """Return a cell for what says something of free text only, beside a judge."""
    return lambda row: "" if row["judge_nll"] is None else number(key, form)(row)


def filler(row: JsonRow) -> str:
    """Name a way to fill canvases, and the plain one that the others have to beat."""
    return f"{row['method']} (best plain)" if row["best_plain"] else str(row["method"])


def milliseconds(row: JsonRow) -> str:
    """Return the time of a prompt."""
    return f"{1000 * row['seconds']:.1f}"


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


def score_name(row: JsonRow) -> str:
    """Name what decides."""
    return next(iter(row["quality"])).replace("_", " ") if row["quality"] else "minus judge NLL"


def score(row: JsonRow) -> float:
    """Return what decides, higher is better."""
    return float(next(iter(row["quality"].values())) if row["quality"] else -row["judge_nll"])


def promised(row: JsonRow) -> str:
    """Return what a method promises, and of which law where that is not the plain sampler's."""
    own = ", of the sequential law" if row["kind"] == "self-speculative" else ""
    return f"{row['guarantee']}{own}"


STEP_COLUMNS = [
    Column("positions", number("length", "d")),
    Column("block", number("block_length", "d")),
    Column("target parameters", number("target_parameters", ",")),
    Column("drafter parameters", number("drafter_parameters", ",")),
    Column("target step, ms", seconds_as_ms("target_seconds")),
    Column("drafter step, ms", seconds_as_ms("drafter_seconds")),
    Column("without cache, ms", seconds_as_ms("uncached_seconds")),
    Column("cheaper", times("ratio")),
]


FILLING_COLUMNS = [Column("method", filler)]  # then the task metric


FILLING_COLUMNS_AFTER = [
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
    Column("guarantee", lambda row: "" if row["kind"] == "plain" else promised(row)),
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


def step_tables(rows: list[JsonRow]) -> list[Table]:
    """Return the table of one pair of models."""
    title = f"{rows[0]['task']} (batch {rows[0]['batch_size']}; seconds of one step)"
    return [with_content(title, STEP_COLUMNS, rows)]


def filling_tables(rows: list[JsonRow]) -> list[Table]:
    """Return the table of one task under one law, and the comparison at equal judge NLL."""
    first = rows[0]
    name = f"{first['task']} ({first['sampling']}"
    masks = f"{first['num_prompts']} prompts, {first['max_new_tokens']} masks"
    columns = [*FILLING_COLUMNS, *qualities(rows), *FILLING_COLUMNS_AFTER]
    tables = [with_content(f"{name}; {masks}; costs of a prompt)", columns, rows)]
    matched = [row for row in rows if row.get("matched")]
    if matched:
        title = f"{name}): as plain sampling in random order with the same judge NLL"
        tables.append(Table(title, MATCHED, matched, False))
    return tables


def best_of_each_kind(rows: Sequence[JsonRow]) -> list[Line]:
    """Return of every kind the fastest as good as all plain steps, or else the best."""
    plain = [row for row in rows if row["kind"] == "plain"]
    full = next(i for i, row in enumerate(plain) if row["method"] == row["reference"])
    least = least_good([Point(row["target_calls"], score(row)) for row in plain], full)
    best_plain = next(row for row in plain if row["best_plain"])
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] != "plain"):
        own = [row for row in rows if row["kind"] == kind]
        least_here = min(least, max(map(score, own)))
        good = [row for row in own if score(row) >= least_here]
        chosen = max(good, key=lambda row: float(row["speedup_vs_best"]))
        lines.append(Line(chosen, {"plain": best_plain}))
    return lines


def _task(row: JsonRow) -> str:
    return f"{joined((*row['task'].split(', '), row['sampling']))} ({model_name(row['target'])})"


def _best_plain(row: JsonRow) -> str:
    plain = row["beside"]["plain"]
    return f"{plain['method']}: {plain['target_calls']:.2f}"


def _fewer_calls(row: JsonRow) -> str:
    return times("call_ratio_vs_best")(row) or "no calls"


def _score(row: JsonRow) -> str:
    """Return what decides, and the strongest plain sampler's."""
    plain = row["beside"]["plain"]
    if row["quality"]:
        return f"{score_name(row)} {100 * score(row):.2f} ({100 * score(plain):.2f})"
    return f"judge NLL {row['judge_nll']:.3f} ({plain['judge_nll']:.3f})"


FILLING_SUMMARY = Summary(
    "Masked diffusion",
    (
        Column("task (target)", _task, True),
        Column("strongest plain sampler: calls", _best_plain, True),
        Column("method", lambda row: str(row["method"]), True),
        Column("guarantee", promised, True),
        Column("fewer calls", _fewer_calls),
        Column("speedup", versus("speedup_vs_best")),
        Column("above plain", above_plain, True),
        Column("score (plain's)", _score, True),
    ),
    "Rule: of every task and kind of method the one with the largest speedup of those whose score "
    "is at most a point (a judge's: 0.01 nats) below that of all plain steps, and where none is, "
    "the one with the best score. The strongest plain sampler is as good as all steps by the same "
    'measure, in the fewest calls. "Above plain" says at which equal cost the score is better than '
    "plain sampling's, with a question mark where nothing plain is as cheap; of a judge's NLL "
    "less is better.",
    "pareto",
)
FILLINGS = StudyTables(filling_tables, best_of_each_kind, FILLING_SUMMARY)
STEPS = StudyTables(step_tables)
