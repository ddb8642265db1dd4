"""The tables of media: samplers by law and costs, and solvers by what they miss."""

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
    number,
    seconds_as_ms,
    times,
    versus,
    weaker_guarantee,
    with_content,
)
from specstream.benchmark.media_cells import (
    kernel_distance,
    known_batch,
    known_seconds_as_ms,
    over_equal_seconds,
)
from specstream.models.quantization import IN_INT8

PLAIN = ("plain", "equal rounds", "equal seconds")  # the target alone


def promised(row: JsonRow) -> str:
    """Return what a method promises where that is less, or where its target became int8."""
    if row["law"].endswith(IN_INT8):
        return f"{row['guarantee']} of {row['law']}"
    return weaker_guarantee(row)


def with_noise(key: str, noise: str) -> Callable[[JsonRow], str]:
    """Return a cell of a distance and the deviation it would have if there were none."""
    return lambda row: f"{row[key]:+.4f} (noise {row[noise]:.4f})"


SAMPLER_COLUMNS = [
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
    Column("random-feature KID x 1000", kernel_distance),
    Column("CLIP score", number("clip_score", ".1f")),
    Column("int8 / bf16 bytes", number("bytes_ratio", ".3f")),
    Column("frame change", number("temporal_consistency", ".2f")),
    Column("spectrum, dB", number("spectrum_distance", ".2f")),
    Column("guarantee", promised),
]


SOLVER_COLUMNS = [
    Column("method", lambda row: row["method"]),
    Column("rounds", number("rounds", ".2f")),
    Column("rows", number("target_rows", ".1f")),
    Column("draft passes", number("draft_passes", ".2f")),
    Column("ms in batch", known_seconds_as_ms("seconds_in_batch")),
    Column("PSNR, dB", number("psnr", ".1f")),
    Column("SSIM", number("ssim", ".4f")),
    Column("LPIPS", number("lpips", ".4f")),
    Column("distance to data", number("data_distance", "+.4f")),
    Column("guarantee", weaker_guarantee),
]


def sampler_tables(rows: list[JsonRow]) -> list[Table]:
    """Return the table of one task under one setting."""
    first = rows[0]
    counts = f"{first['num_samples']} samples, {first['num_held_out']} held-out ones"
    title = f"{first['task']}, {first['setting']} ({counts}; batch {first['batch_size']})"
    return [with_content(title, SAMPLER_COLUMNS, rows)]


def solver_tables(rows: list[JsonRow]) -> list[Table]:
    """Return the table of one task."""
    first = rows[0]
    solution = f"beside {first['reference_steps']} Euler steps from the same noise"
    title = (
        f"{first['task']}, eta 0 ({first['num_samples']} samples {solution}{known_batch(first)})"
    )
    return [with_content(title, SOLVER_COLUMNS, rows)]


def fewest_rounds(rows: Sequence[JsonRow]) -> list[Line]:
    """Return the exact method with the fewest rounds, beside what keeps no law and is as near.

    A setting of which plain samplers alone were measured has no line.
    """
    plain = next(row for row in rows if row["method"] == row["reference"])
    others = [row for row in rows if row["kind"] not in PLAIN]
    kept = [r for r in others if r["guarantee"] in EXACT and r["law"] == plain["law"]]
    nearest = plain["data_distance"] + plain["data_noise"]
    near = [row for row in rows if row["data_distance"] <= nearest]
    few = _fewest([row for row in near if row["kind"] in PLAIN])
    free = _fewest([row for row in near if row in others and row["guarantee"] not in EXACT])
    if not others:
        return []
    return [Line(_fewest(kept) or plain, {"plain": plain, "few": few, "free": free})]


def _fewest(rows: Sequence[JsonRow]) -> JsonRow | None:
    """Return the row with the fewest rounds, of equals the fastest alone."""
    return min(rows, key=lambda row: (row["rounds"], -row["speedup_alone"]), default=None)


def _is_drafted(row: JsonRow) -> bool:
    return row["kind"] not in PLAIN


def _of_drafted(cell: Callable[[JsonRow], str]) -> Callable[[JsonRow], str]:
    """Return a cell that is empty where no exact draft was measured."""
    return lambda row: cell(row) if _is_drafted(row) else ""


def _exact_method(row: JsonRow) -> str:
    return str(row["method"]) if _is_drafted(row) else "none measured"


def _rounds(row: JsonRow) -> str:
    return f"{row['rounds']:.2f} ({row['beside']['plain']['rounds']:.2f})"


def _alone(row: JsonRow) -> str:
    """Return the speedup of a sample drawn alone; one timed sample has no interval."""
    low, high = row["speedup_alone_interval"]
    return (versus if low < high else times)("speedup_alone")(row)


def _distance(row: JsonRow) -> str:
    plain = row["beside"]["plain"]
    return (
        f"{row['data_distance']:+.4f} ({plain['data_distance']:+.4f}, noise "
        f"{plain['data_noise']:.4f})"
    )


def _rival(name: str) -> Callable[[JsonRow], str]:
    """Return a cell of what else draws as good samples: its rounds and its speedup."""

    def cell(row: JsonRow) -> str:
        rival = row["beside"][name]
        if rival is None:
            return ""
        return f"{rival['method']}: {rival['rounds']:.0f} rounds, {times('speedup_alone')(rival)}"

    return cell


SAMPLER_SUMMARY = Summary(
    "Images, video and sound",
    (
        Column("task, plain sampler", lambda row: f"{row['task']}, {row['setting']}", True),
        Column("exact method", _exact_method, True),
        Column("guarantee", _of_drafted(lambda row: str(row["guarantee"])), True),
        Column("rounds (plain's)", _of_drafted(_rounds)),
        Column("fewer", _of_drafted(times("round_ratio"))),
        Column("speedup alone", _of_drafted(_alone)),
        Column("in a batch", _of_drafted(times("speedup_in_batch"))),
        Column("distance to data (plain's)", _of_drafted(_distance)),
        Column("target alone, as near", _rival("few"), True),
        Column("no promise, as near", _rival("free"), True),
    ),
    "Rule: of every task and plain sampler the exact method with the fewest rounds of calls, "
    "whatever its time. Beside it what has the fewest rounds of all that keeps no law and whose "
    "samples are as near to the data, within the noise of the plain sampler's distance: the target "
    "alone, with fewer steps or a better solver, and methods without a promise (a student asks "
    "the target in no round). Speedups are over the plain sampler.",
)
SAMPLERS = StudyTables(sampler_tables, fewest_rounds, SAMPLER_SUMMARY)
SOLVERS = StudyTables(solver_tables)
