"""Samples of a diffusion model: a progress bar, the file, then the numbers."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from specstream.files import write_whole
from specstream.generation.command.comparison import REPEATS
from specstream.generation.command.display import guarantee_of, quantized_rows, say
from specstream.generation.command.one_prompt import INTERRUPTED
from specstream.generation.command.options import Options, wrong
from specstream.generation.command.preview import Preview
from specstream.generation.consistency import ConsistencyPipeline
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.media_given import Asked, asked_for
from specstream.generation.media_loading import MediaRun
from specstream.generation.refinement import RefinementPipeline
from specstream.generation.solvers import SolverPipeline
from specstream.generation.step_caching import StepCachePipeline
from specstream.media_processor import MediaProcessor
from specstream.structures import Guarantee, Stats


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one way of sampling gave; `seconds` are a median where it was repeated."""

    name: str
    samples: Tensor
    stats: Stats
    seconds: float


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
    rows: list[Sampled] = []
    preview = preview_beside(path, run, options)
    try:
        with preview or nullcontext():
            first = show_progress(run.pipeline, asked, options, preview)
            if options.compare:
                say("comparing with the plain target ...")
                rows = compare(run.pipeline, asked, options)
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
    for line in guidance_remarks(run.pipeline):
        say(line)
    say(f"wrote {path}")
    if rows:
        beside = path.with_name(f"{path.stem}-compare{path.suffix}")
        run.processor.write(run.media(torch.cat([row.samples for row in rows])), beside)
        for line in comparison_report(rows):
            say(line)
        say(f"wrote {beside}: {', then '.join(row.name for row in rows)}")
    if options.stats is not None:
        import json

        facts = stats.as_dict() | comparison_facts(rows)
        write_whole(Path(options.stats), json.dumps(facts, indent=2) + "\n")
    return 0


def output_path(options: Options, processor: MediaProcessor) -> Path:
    """Return the file that is written; ValueError where its kind is another or has no writer."""
    if options.output is None:
        wrong("output", f"needed: the {processor.suffix} file that gets the {processor.kind}")
    path = Path(str(options.output))
    if path.suffix != processor.suffix:
        wrong("output", f"this model makes {processor.suffix} files, not '{path.suffix}'")
    processor.check_writer()
    if options.compare:
        check_beside(path.with_name(f"{path.stem}-compare{path.suffix}"), "compare", options)
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


def compare(pipeline: DenoisingSampler, asked: Asked, options: Options) -> list[Sampled]:
    """Time the pipeline, the plain target, and the plain target with as many steps as rounds."""
    media = options.media

    def sampled(way: DenoisingSampler) -> Tensor:
        return way.complete(media.samples, asked.condition, seed=options.seed, known=asked.known)

    sampled(pipeline)
    calls, steps = pipeline.stats.target_calls, media.num_steps
    names = {RefinementPipeline: "refined", StepCachePipeline: "cached"}
    ours = names.get(type(pipeline), "drafted")
    if isinstance(pipeline, ConsistencyPipeline):
        calls, steps, ours = pipeline.stats.draft_calls, pipeline.student.num_steps, "student"
    rounds = round(calls / max(1, -(-media.samples // pipeline.batch_size)))

    def plain(num_steps: int) -> DenoisingPipeline:
        return DenoisingPipeline(
            pipeline.target,
            num_steps,
            pipeline.eta,
            pipeline.guidance,
            batch_size=pipeline.batch_size,
        )

    ways: dict[str, DenoisingSampler] = {ours: pipeline}
    ways |= {f"plain, {number} steps": plain(number) for number in (steps, max(1, rounds))}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(REPEATS):
        for name, way in ways.items():
            found[name] = sampled(way)
            seconds[name].append(way.stats.seconds)
    return [
        Sampled(name, found[name], way.stats, statistics.median(seconds[name]))
        for name, way in ways.items()
    ]


def is_plain(pipeline: DenoisingSampler) -> bool:
    """Whether every round of a sampler is one step of the target's own."""
    undrafted = isinstance(pipeline, DenoisingPipeline) and pipeline.drafter is None
    return undrafted or isinstance(pipeline, SolverPipeline)


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


def guidance_remarks(pipeline: DenoisingSampler) -> list[str]:
    """Return a line where drafts are asked for at another guidance than they were trained for."""
    drafter = pipeline.drafter if isinstance(pipeline, DenoisingPipeline) else None
    trained = None if drafter is None else drafter.trained_guidance
    if trained in (None, pipeline.guidance):
        return []
    return [
        f"the drafter was trained for guidance {trained:g}: with {pipeline.guidance:g} the samples "
        "are as exact, but fewer drafts may stand"
    ]


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


def comparison_report(rows: list[Sampled]) -> list[str]:
    """Return a line for each way of sampling."""
    lines = [f"{'':<18}{'rounds':>8}{'rows':>8}{'seconds':>10}"]
    for row in rows:
        stats = row.stats
        rounds = stats.target_calls or stats.draft_calls  # of a student, which is asked alone
        counts = f"{rounds:>8}{stats.target_rows:>8}"
        lines.append(f"{row.name:<18}{counts}{row.seconds:>10.3f}")
    if rows[0].stats.guarantee is Guarantee.HEURISTIC:
        lines.append(
            f"{rows[0].name} samples have no law that is promised: judge them by what they are"
        )
        return lines
    if rows[0].stats.guarantee is Guarantee.BOUNDED_ERROR:
        lines.append("the drafted samples are near the plain ones of the same noise, not equal")
        return lines
    lines.append(
        "the drafted samples have the law of the plain ones with as many steps; each run draws "
        "its own"
    )
    return lines


def comparison_facts(rows: list[Sampled]) -> dict[str, object]:
    """Return the keys that `--compare` adds to `--stats`."""
    if not rows:
        return {}
    ours, plain = rows[0], rows[1]
    return {
        "baseline_seconds": plain.seconds,
        "baseline_target_calls": plain.stats.target_calls,
        "speedup": plain.seconds / ours.seconds,
        "identical": None,
    }
