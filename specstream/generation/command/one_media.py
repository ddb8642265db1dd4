"""Samples of a diffusion model: a progress bar, the file, then the numbers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from specstream.files import write_whole
from specstream.generation.command.comparison import REPEATS
from specstream.generation.command.display import guarantee_of, quantized_rows, say
from specstream.generation.command.media_comparison import (
    Sampled,
    compare,
    comparison_facts,
    comparison_report,
    is_approximate,
    is_plain,
)
from specstream.generation.command.one_prompt import INTERRUPTED
from specstream.generation.command.options import Options, wrong
from specstream.generation.command.preview import Preview
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.media_given import Asked, asked_for
from specstream.generation.media_loading import MediaRun
from specstream.generation.refinement import RefinementPipeline
from specstream.media_processor import MediaProcessor
from specstream.models.scheduler_config import width_remark
from specstream.structures import Stats


def generate_media(run: MediaRun, options: Options) -> int:
    """Sample what the prompt asks for and write it; returns the exit code, 130 after Ctrl-C.

    Raises ValueError for a prompt that the model does not know, or a file it cannot write.
    """
    path = output_path(options, run.processor)
    media = options.media
    if media.guidance != 1 and not options.prompt and run.told is None:
        wrong("media.guidance", "is the weight of a prompt, and the prompt is empty")
    asked = asked_for(run, options.prompt or "", media.given, media.samples)
    refines = isinstance(run.pipeline, RefinementPipeline)
    if options.compare and is_plain(run.pipeline):
        raise ValueError("compare: this is the plain target already, there is no drafter")
    preview = preview_beside(path, run, options)
    try:
        with preview or nullcontext():
            first = show_progress(run.pipeline, asked, options, preview)
            check_finite(first, run.pipeline)
            run.processor.write(run.media(first), path)
    except KeyboardInterrupt:
        kept = None if preview is None or not preview.is_written else preview.path
        say(f"interrupted; {'nothing was written' if kept is None else f'{kept} is a preview'}")
        return INTERRUPTED
    stats = replace(run.pipeline.stats, modality=run.processor.kind)
    if run.told is not None:
        stats.quantized = stats.quantized | run.told.memory
        for role, made in run.told.memory.items():
            if "reason" in made:
                say(f"{role}: not quantised: {made['reason']}")
    for line in refinement_report(stats) if refines else media_report(stats):
        say(line)
    for line in remarks(run):
        say(line)
    say(f"wrote {path}")
    try:
        rows = show_comparison(run, asked, options, path)
    except KeyboardInterrupt:
        say("interrupted; the samples are written, what they are held beside is not")
        return INTERRUPTED
    if options.stats is not None:
        import json

        facts = stats.as_dict() | comparison_facts(rows)
        write_whole(Path(options.stats), json.dumps(facts, indent=2) + "\n")
    return 0


def show_comparison(run: MediaRun, asked: Asked, options: Options, path: Path) -> list[Sampled]:
    """Hold the samples beside the plain target's, where that is asked for or due.

    Due it is to what promises no law; models of `diffusers` are too dear to be asked unasked.
    Returns a row for each way of sampling, none where nothing is compared.
    """
    due = options.compare is None and is_approximate(run.pipeline)
    if due and run.told is not None:
        say("not held beside the plain target with as few steps: --compare true does that")
    if not options.compare and (not due or run.told is not None):
        return []
    say("comparing with the plain target ...")
    repeats = REPEATS if options.compare else 1
    how = (asked, options.media.samples, options.media.num_steps, options.seed)
    rows = compare(run.pipeline, *how, run.media, repeats)
    for line in comparison_report(rows):
        say(line)
    if options.compare:
        plain, beside = beside_paths(path)
        run.processor.write(run.media(rows[1].samples), plain)
        run.processor.write(run.media(torch.cat([row.samples for row in rows])), beside)
        say(f"wrote {plain}, and {beside}: {', then '.join(row.name for row in rows)}")
    return rows


def beside_paths(output: Path) -> tuple[Path, Path]:
    """Return where `--compare` writes the plain target's samples, and all ways side by side."""
    plain, beside = (f"{output.stem}-{name}{output.suffix}" for name in ("plain", "compare"))
    return output.with_name(plain), output.with_name(beside)


def output_path(options: Options, processor: MediaProcessor) -> Path:
    """Return the file that is written; ValueError where its kind is another or has no writer."""
    if options.output is None:
        wrong("output", f"needed: the {processor.suffix} file that gets the {processor.kind}")
    path = Path(str(options.output))
    if path.suffix != processor.suffix:
        wrong("output", f"this model makes {processor.suffix} files, not '{path.suffix}'")
    processor.check_writer()
    if options.compare:
        for beside in beside_paths(path):
            check_beside(beside, "compare", options)
    if options.media.preview_every is not None:
        if not processor.is_seen:
            wrong("media.preview_every", "is for pictures, and this model's sounds are waveforms")
        check_beside(preview_path(path), "media.preview_every", options)
    return path


def check_beside(beside: Path, option: str, options: Options) -> None:
    """Raise ConfigError where what `option` writes beside the output is another file already."""
    if beside.exists() and not beside.is_file():
        wrong("output", f"'{beside}', which --{option} writes, is a folder or the like")
    if beside.exists() and not options.overwrite:
        wrong("output", f"'{beside}' exists; give --overwrite true to replace it")
    others = {f"media.{name}": file for name, file in asdict(options.media.given).items()}
    for name, file in (others | {"stats": options.stats}).items():
        if file is not None and Path(file).resolve() == beside.resolve():
            wrong(name, f"'{file}' is also what --{option} writes beside --output")


def preview_path(output: Path) -> Path:
    """Return where the samples of an output are to be seen while they are drawn."""
    return output.with_name(f"{output.stem}.preview.png")


def preview_beside(output: Path, run: MediaRun, options: Options) -> Preview | None:
    """Return what shows samples while they are drawn; None where nobody asks for it."""
    every = options.media.preview_every
    if every is None:
        return None
    return Preview(run, preview_path(output), options.media.samples, every)


def check_finite(samples: Tensor, pipeline: DenoisingSampler) -> None:
    """Raise ValueError for samples that are no numbers, with what may help."""
    if bool(samples.isfinite().all()):
        return
    advice = "; bring media.guidance nearer to 1" if pipeline.guidance != 1 else ""
    advice = "; try --dtype float32" if pipeline.target.dtype != torch.float32 else advice
    raise ValueError(f"the samples hold numbers that are not finite{advice}")


def show_progress(
    pipeline: DenoisingSampler, asked: Asked, options: Options, preview: Preview | None
) -> Tensor:
    """Sample once with a bar that counts steps, and shows rounds and acceptance."""
    samples = options.media.samples
    steps = pipeline.grid.num_steps
    if isinstance(pipeline, RefinementPipeline):
        steps = pipeline.total_steps
    columns = (
        TextColumn("denoising"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=samples * steps, values="")
        for step in pipeline.generate(
            samples, asked.condition, seed=options.seed, known=asked.known
        ):
            stats = pipeline.stats
            kept = "" if stats.acceptance is None else f", {stats.acceptance:.0%} of drafts stand"
            values = f"{stats.target_calls or stats.draft_calls} rounds{kept}"
            bar.update(task, advance=step.accepted + 1, values=values)
            if preview is not None:
                preview.show(step)
    return pipeline.samples


def media_report(stats: Stats) -> list[str]:
    """Return the table of a run, one line for each number."""
    rows = [
        ("guarantee", guarantee_of(stats)),
        ("samples", f"{stats.prompts} in {stats.seconds:.2f} s"),
    ]
    if stats.target_calls:
        rows.append(("target rounds", f"{stats.target_calls}, of {stats.target_rows} rows in all"))
    else:
        rows.append(("student rounds", f"{stats.draft_calls}; the target was not asked"))
    if stats.accepted_length is not None and stats.draft_calls and stats.target_calls:
        rows.append(("accepted length", f"{stats.accepted_length:.2f} steps a round (tau)"))
    if stats.acceptance is not None:
        rows.append(("acceptance", f"{stats.acceptance:.1%} of {sum(stats.tested)} tested drafts"))
        rows.append(("alpha by step", " ".join(f"{alpha:.2f}" for alpha in stats.alphas)))
    if stats.predicted_ratio is not None:
        rows.append(("by costs", prediction_of(stats)))
    return as_table(rows + quantized_rows(stats))


def prediction_of(stats: Stats) -> str:
    """Say what measured costs predict of drafting, and what was done."""
    assert stats.predicted_at is not None and stats.mean_length is not None
    ratio = f"take {stats.predicted_ratio:.2f} times as long here"
    if not stats.draft_calls:
        return f"drafting would {ratio} if {stats.predicted_at:.0%} of drafts stood: not drafted"
    return f"{stats.mean_length:.1f} steps drafted a round; drafting should {ratio}"


def remarks(run: MediaRun) -> list[str]:
    """Return a line where drafts are asked for at another guidance than they were trained for.

    And one where the steps of a model of `diffusers` are not as wide as its scheduler has them.
    """
    lines, pipeline = [], run.pipeline
    drafter = pipeline.drafter if isinstance(pipeline, DenoisingPipeline) else None
    trained = None if drafter is None else drafter.trained_guidance
    if trained not in (None, pipeline.guidance):
        lines.append(
            f"the drafter was trained for guidance {trained:g}: with {pipeline.guidance:g} the "
            "samples are as exact, but fewer drafts may stand"
        )
    wider = None if run.told is None else width_remark(run.told.parts.scheduler)
    if wider is not None and pipeline.eta:
        lines.append(wider)
    return lines


def refinement_report(stats: Stats) -> list[str]:
    """Return the table of a run that refines: what of its drafts was done again."""
    assert stats.acceptance is not None
    rows = [
        ("guarantee", guarantee_of(stats)),
        ("samples", f"{stats.prompts} in {stats.seconds:.2f} s"),
        ("target rounds", f"{stats.target_calls}, of {stats.target_rows} rows in all"),
    ]
    if stats.draft_calls:  # else the target has drafted for itself
        rows.append(("draft rounds", f"{stats.draft_calls} of a smaller model"))
    rows.append(("refined", f"{1 - stats.acceptance:.1%} of {sum(stats.tested)} parts"))
    return as_table(rows + quantized_rows(stats))


def as_table(rows: list[tuple[str, str]]) -> list[str]:
    """Return a line for each name and value."""
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{value}" for name, value in rows]
