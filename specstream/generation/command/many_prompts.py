"""A file of prompts to a file of continuations, in the order of the prompts.

Prompts are cut into batches once, and each prompt keeps its number, which keys its noise: so the
output does not depend on how many processes share the batches.  Each process appends what it has
finished to a part of its own beside the output; the parts are put in order at the end, and after
Ctrl-C too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from specstream.data import PromptFile
from specstream.files import write_whole
from specstream.generation.base import TextPipeline
from specstream.generation.command.display import report_lines, say
from specstream.generation.command.one_prompt import INTERRUPTED, write_stats
from specstream.generation.command.options import Options
from specstream.generation.masked import MaskedPipeline
from specstream.structures import Guarantee, Stats


@dataclass(frozen=True, slots=True)
class Job:
    """The prompts of a file, cut into batches, and where their continuations go."""

    prompts: list[str]
    batches: list[list[int]]  # numbers of the prompts decoded together
    output: Path
    seed: int

    def part(self, rank: int) -> Path:
        """The file that process `rank` appends to."""
        return self.output.with_name(f".{self.output.name}.{rank}.part")


def generate_many(
    options: Options, devices: int, make_pipeline: Callable[[str], TextPipeline | MaskedPipeline]
) -> int:
    """Decode a file of prompts; returns the exit code, 130 after Ctrl-C.

    Raises ValueError for a file that cannot be read, and for a prompt that does not fit, before
    any is decoded.
    """
    assert options.prompts is not None and options.output is not None
    prompts = PromptFile(options.prompts, options.template, options.limit).read()
    pipeline = make_pipeline(options.device if devices == 1 else "cpu")
    check_all(pipeline, prompts)
    if isinstance(pipeline, MaskedPipeline):
        options.canvas.check_room(max(len(pipeline.encode(p).tokens) for p in prompts))
    job = Job(
        prompts,
        [
            list(range(first, min(first + options.batch_size, len(prompts))))
            for first in range(0, len(prompts), options.batch_size)
        ],
        Path(options.output),
        options.seed,
    )
    if devices == 1:
        finished = decode_here(pipeline, job)
        return finish(job, finished, devices, options)
    from specstream.generation.command.devices import decode_over_devices

    outcome = decode_over_devices(pipeline, job, devices, options.device)
    if not outcome.is_main_process:
        return 0
    return finish(job, outcome.finished, devices, options)


def check_all(pipeline: TextPipeline | MaskedPipeline, prompts: Sequence[str]) -> None:
    """Raise ValueError with the number of a prompt that does not fit."""
    for number, prompt in enumerate(prompts, start=1):
        try:
            pipeline.encode(prompt)
        except ValueError as error:
            raise ValueError(f"prompt {number} of {len(prompts)}: {error}") from error


def decode_here(pipeline: TextPipeline | MaskedPipeline, job: Job) -> bool:
    """Decode all batches in this process; returns False after Ctrl-C."""
    job.part(0).unlink(missing_ok=True)
    with Progress(len(job.prompts)) as progress:
        try:
            for batch in job.batches:
                decode_batch(pipeline, job, batch, job.part(0))
                progress.advance(len(batch))
        except KeyboardInterrupt:
            return False
    return True


def decode_batch(
    pipeline: TextPipeline | MaskedPipeline, job: Job, batch: list[int], part: Path
) -> None:
    """Decode one batch and append its rows to `part`; on Ctrl-C those rows that had ended."""
    texts = dict.fromkeys(batch, "")
    counts = dict.fromkeys(batch, 0)
    ended = []
    try:
        prompts = [job.prompts[number] for number in batch]
        if isinstance(pipeline, MaskedPipeline):
            for filled in pipeline.complete(prompts, seed=job.seed, indices=batch):
                texts[filled.prompt], counts[filled.prompt] = filled.text, len(filled.tokens)
                ended.append(filled.prompt)
            return
        for step in pipeline.generate(prompts, seed=job.seed, indices=batch):
            texts[step.prompt] += step.text
            counts[step.prompt] += len(step.tokens)
            if step.finished:
                ended.append(step.prompt)
    finally:
        rows = [
            {"index": n, "prompt": job.prompts[n], "text": texts[n], "num_tokens": counts[n]}
            for n in sorted(ended)
        ]
        line = json.dumps({"rows": rows, "stats": stats_record(pipeline.stats)})
        with part.open("a") as file:
            file.write(line + "\n")


def finish(job: Job, finished: bool, devices: int, options: Options) -> int:
    """Put the parts in order, write output and statistics, and say so."""
    parts = [read_part(job.part(rank)) for rank in range(devices)]
    rows = [row for part in parts for record in part for row in record["rows"]]
    rows.sort(key=lambda row: row["index"])
    if rows:
        write_whole(job.output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    for rank in range(devices):
        job.part(rank).unlink(missing_ok=True)
    if not finished:
        where = f", written to {job.output}" if rows else ""
        say(f"interrupted: {len(rows)} of {len(job.prompts)} prompts finished{where}")
        return INTERRUPTED
    assert len(rows) == len(job.prompts), "every process appended all its batches"
    stats = total_stats([[record["stats"] for record in part] for part in parts])
    for line in report_lines(stats):
        say(line)
    say(f"{len(rows)} continuations written to {job.output}")
    if options.stats is not None:
        write_stats(Path(options.stats), stats)
    return 0


def read_part(part: Path) -> list[dict[str, Any]]:
    """Return what one process finished, without a last line that was cut off."""
    if not part.is_file():
        return []
    lines = part.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def stats_record(stats: Stats) -> dict[str, Any]:
    """Return the counts as JSON can hold them."""
    return asdict(stats) | {"guarantee": stats.guarantee.value}


def total_stats(parts: list[list[dict[str, Any]]]) -> Stats:
    """Add the counts of all batches; seconds are those of the process that took longest."""
    records = [record for part in parts for record in part]
    first = records[0]
    total = Stats(
        first["modality"],
        Guarantee(first["guarantee"]),
        quantized=first["quantized"],
        law=first["law"],
    )
    for field in fields(Stats):
        values = [record[field.name] for record in records]
        if field.type == "list[int]":
            width = max(map(len, values))
            padded = [value + [0] * (width - len(value)) for value in values]
            setattr(total, field.name, [sum(column) for column in zip(*padded, strict=True)])
        elif field.type == "int":
            setattr(total, field.name, sum(values))
    if first["full_passes"] is not None:
        total.full_passes = sum(record["full_passes"] for record in records)
    total.seconds = max(sum(record["seconds"] for record in part) for part in parts)
    return total


class Progress:
    """A bar over prompts on stderr, where that is a terminal."""

    def __init__(self, total: int, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self.bar = Bar(
            *Bar.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self.task = self.bar.add_task("prompts", total=total)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, count: int) -> None:
        """Count prompts that are finished."""
        self.bar.advance(self.task, count)
