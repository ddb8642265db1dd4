"""The results file: a JSON list with one object for each row of the table, written whole."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from specstream.benchmark.drafter_records import DrafterRow
from specstream.benchmark.media_records import MediaRow, SolverRow
from specstream.files import write_whole


@dataclass(frozen=True, slots=True)
class Machine:
    """On what, with what and from what a row was measured."""

    hardware: str
    dtype: str
    threads: int
    versions: dict[str, str | None]
    git_commit: str | None
    git_dirty: bool | None
    command: str


@dataclass(frozen=True, slots=True)
class Speedups:
    """Ratios of seconds a token; `speedup_interval` is a 95 % bootstrap interval over prompts."""

    speedup_vs_plain: float | None
    speedup_interval: tuple[float, float] | None
    speedup_vs_hf: float | None
    speedup_vs_hf_assisted: float | None
    speedup_vs_batch_1: float | None


@dataclass(frozen=True, slots=True)
class Counts:
    """What our pipelines count; a peer does not.

    `bytes_ratio` is over the layers that became int8: their bytes as they are held, scales
    included, over those of bfloat16; None where none did.
    """

    tau: float | None = None
    alpha: float | None = None
    alphas: list[float] = field(default_factory=list)
    mean_length: float | None = None
    share_plain: float | None = None
    target_calls: int | None = None
    draft_calls: int | None = None
    guarantee: str | None = None
    bytes_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Bound:
    """What the acceptance allows at the measured times, and how much of it was reached.

    t_plain, t_verify and t_draft are the seconds of a plain pass, of verifying and of drafting
    `drafted` tokens.
    """

    drafted: float | None = None
    t_plain: float | None = None
    t_verify: float | None = None
    t_draft: float | None = None
    bound: float | None = None
    efficiency: float | None = None
    eta: float | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Greedy outputs beside the plain target's: how many prompts differ, and why.

    A difference whose first tokens have logits within rounding is a tie: passes over one token and
    over several round differently, and either token is the target's greedy choice.
    """

    identical: bool | None = None
    ties: int | None = None
    differences: int | None = None  # beyond rounding
    largest_gap: float | None = None  # of the logits at the first token that differs
    gap_tolerance: float | None = None  # the smallest that was applied


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """One method on one task under one setting; None where a number has no meaning.

    In JSON the parts are one flat object.  Seconds are for all prompts, medians over the repeats;
    of several variants the row is the fastest's.
    """

    study: str = "speed"
    task: str
    setting: str
    method: str
    role: str
    variant: str
    variants: dict[str, float]  # seconds of each
    batch_size: int
    sampling: str
    num_prompts: int
    prompt_tokens: float
    max_new_tokens: int
    repeats: int
    elements: int
    seconds: float
    tokens_per_second: float
    speedups: Speedups
    counts: Counts
    bound: Bound
    agreement: Agreement
    quality: float | None
    repeated_4grams: float | None
    machine: Machine


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean over seeds of tau minus the baseline's tau with the same seed; empty for the baseline.

    `relative` is in shares of the baseline's tau.  The 95 % interval of the difference is a t
    interval over seeds, or with one seed a bootstrap interval over prompts.
    """

    pairs: int | None = None
    difference: float | None = None
    relative: float | None = None
    interval: tuple[float, float] | None = None
    interval_over: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationRow:
    """One way to draft: tau and acceptance of its drafters, one for each seed, on held-out prompts.

    `tau` is the mean over seeds; alphas are of all of them together.
    """

    study: str = "distillation"
    task: str
    method: str
    baseline: str
    sampling: str
    num_prompts: int
    max_new_tokens: int
    drafted: int | None  # None: each drafter's most
    steps: int | None
    seeds: list[int]
    taus: list[float]
    tau: float
    alpha: float
    alphas: list[float]
    difference: PairedDifference
    machine: Machine


@dataclass(frozen=True, slots=True)
class SampleQuality:
    """How good the filled text is: the task's metric, the judge's surprise, variety."""

    quality: dict[str, float]
    judge_nll: float | None
    judge_bits_per_character: float | None
    entropy: float
    distinct_2: float | None


@dataclass(frozen=True, slots=True)
class FillingCosts:
    """What filling one canvas takes.

    `target_calls` are passes one after the other, of a batch where there are several rows;
    `full_passes` count every canvas that a pass reads.  A pass of a self-speculative head's causal
    layer is the share of a full pass that its operations are, and of that method `target_calls` are
    its full passes.  The 95 % interval of `seconds` is a bootstrap interval over prompts.
    """

    target_calls: float
    full_passes: float
    draft_calls: float
    seconds: float
    seconds_interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class PlainComparison:
    """Against plain sampling: the reference, with all its steps, and the fewest steps as good.

    Intervals as for `FillingCosts`.  `quality_difference` is the deciding score minus the
    reference's (of a judge, how much lower the NLL is).  `above_plain` says whether a method lies
    above the curve of quality that plain sampling reaches at as many calls, `above_plain_seconds`
    in as much time: "level" where the interval of the distance from the curve holds zero, None for
    plain sampling, and for what is worse and cheaper than all of it.
    """

    reference: str
    call_ratio: float | None  # None: no calls at all
    speedup: float
    speedup_interval: tuple[float, float]
    best_plain: bool  # whether this is the plain row with the fewest steps that is as good
    best_plain_method: str
    call_ratio_vs_best: float | None
    speedup_vs_best: float
    speedup_vs_best_interval: tuple[float, float]
    above_plain: bool | str | None
    above_plain_seconds: bool | str | None
    identical_share: float | None  # of the prompts, with the reference, at temperature 0
    quality_difference: float | None = None  # None: the reference itself
    quality_interval: tuple[float, float] | None = None
    above_plain_interval: tuple[float, float] | None = None
    above_plain_seconds_interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class MatchedQuality:
    """Where plain sampling in random order says what the judge finds as likely, by its full passes.

    For self-speculation on tasks that a judge decides, else empty.  `matched` is "reached" or
    "beyond the curve"; `matched_ratio` is over the row's own full passes, and `matched_entropy`
    that of the plain texts there.
    """

    matched: str | None = None
    matched_passes: float | None = None
    matched_ratio: float | None = None
    matched_entropy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedRow:
    """One way of filling canvases on one task under one law: quality and costs of a prompt."""

    study: str = "masked"
    task: str
    target: str
    method: str
    kind: str
    guarantee: str
    sampling: str
    batch_size: int
    num_prompts: int
    prompt_tokens: float
    max_new_tokens: int
    repeats: int
    samples: SampleQuality
    costs: FillingCosts
    comparison: PlainComparison
    matched: MatchedQuality
    acceptance: float | None
    mean_drafted: float | None
    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """A denoising step of a target and of its drafter, on canvases of one length, in seconds."""

    study: str = "steps"
    task: str
    batch_size: int
    length: int
    block_length: int
    target_parameters: int
    drafter_parameters: int
    target_seconds: float
    uncached_seconds: float  # the drafter's network, the whole canvas read again
    drafter_seconds: float  # a whole step in one block, the others cached
    ratio: float  # target over drafter
    machine: Machine


Row = SpeedRow | DistillationRow | DrafterRow | MaskedRow | StepRow | MediaRow | SolverRow
STUDIES = frozenset({"speed", "distillation", "drafters", "masked", "steps", "media", "solvers"})


def describe_machine(device: str, dtype: str, arguments: Sequence[str]) -> Machine:
    """Return the facts of this process, for every row of it."""
    import torch

    from specstream.training.provenance import provenance

    facts: dict[str, Any] = provenance(None, sys.argv)
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{facts['cpu']}, {facts['cpu_cores']} CPU cores"
    return Machine(
        hardware=hardware,
        dtype=dtype,
        threads=torch.get_num_threads(),
        versions={name: facts["versions"][name] for name in ("torch", "transformers")},
        git_commit=facts["git_commit"],
        git_dirty=facts["git_dirty"],
        command=" ".join(["python -m specstream.benchmark", *arguments]),
    )


def as_json(rows: Sequence[Row | dict[str, Any]], indent: int | None = None) -> str:
    """Return the rows as JSON, floats with six digits."""
    objects = [row if isinstance(row, dict) else flat(row) for row in rows]
    return json.dumps([_rounded(o) for o in objects], indent=indent)


def flat(row: Row) -> dict[str, Any]:
    """Return a row as one flat object, its parts merged into it."""
    merged: dict[str, Any] = {}
    for entry in fields(row):
        value = getattr(row, entry.name)
        if is_dataclass(value) and not isinstance(value, type):
            merged |= asdict(value)
        else:
            merged[entry.name] = value
    return merged


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the results file whole, so that an older one survives a full disk."""
    write_whole(path, as_json(rows, indent=1) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file; ValueError in one line when it is not one."""
    try:
        rows = json.loads(path.read_text())
        studies = {row["study"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is not a results file: {error}") from error
    if not studies or not studies <= STUDIES:
        raise ValueError(f"'{path}' is not a results file: it holds {sorted(studies) or 'no rows'}")
    return list(rows)
