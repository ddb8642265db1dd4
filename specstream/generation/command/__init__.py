"""What `generate.py` does: read the options, build the pipeline, decode, report.

Reading order: `options`, `canvas_options` and `media_options` (what can be said), `one_prompt`
(text as it is committed), `one_canvas` (of a masked model), `one_media` (of a diffusion model) and
`preview`, `display` and `comparison` (what it shows), `many_prompts` (a file of them), `devices`
(over several).  None of it knows how decoding works.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from specstream.generation.base import TextPipeline
from specstream.generation.command.canvas_options import CanvasOptions
from specstream.generation.command.media_options import MediaOptions
from specstream.generation.command.options import (
    SHARED,
    Options,
    parse_options,
    refuse_for_one_prompt,
    wrong,
)
from specstream.generation.loading import build_pipeline, find_device, load_run
from specstream.generation.masked import MaskedPipeline
from specstream.generation.masked_loading import (
    build_masked_pipeline,
    is_masked_run,
    load_masked_run,
)
from specstream.generation.media_loading import (
    MediaRun,
    SamplerOptions,
    is_media_run,
    load_media_run,
    media_of_target,
)
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.verification import CanvasVerifier


def run_generation(arguments: list[str]) -> int:
    """Generate as the arguments say; returns the exit code.  ValueError for a user's mistake."""
    import torch

    options = parse_options(arguments)
    _show_slow_loading_only()
    try:
        return _generate(options)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU is out of memory; lower --batch_size, --max_new_tokens or the size of media, "
            "or quantize the models"
        ) from error


def _generate(options: Options) -> int:
    if options.prompts is not None:
        from specstream.generation.command.many_prompts import generate_many

        return generate_many(options, options.devices, lambda device: make_text(options, device))
    pipeline = make_pipeline(options, options.device)
    if isinstance(pipeline, MediaRun):
        from specstream.generation.command.one_media import generate_media

        return generate_media(pipeline, options)
    if isinstance(pipeline, MaskedPipeline):
        from specstream.generation.command.one_canvas import fill_one

        return fill_one(pipeline, options)
    from specstream.generation.command.one_prompt import generate_one

    return generate_one(pipeline, options)


def make_pipeline(options: Options, device: str) -> TextPipeline | MaskedPipeline | MediaRun:
    """Load and put together what the options name, on `device`."""
    if options.run is not None and is_media_run(options.run):
        return make_media_run(options, None)
    target = None if options.target is None else options.target()
    if isinstance(target, PretrainedDenoiser):
        return make_media_run(options, target)
    if options.media != MediaOptions():
        wrong("media", "is for diffusion models of media, and this is a model of text")
    refuse_for_one_prompt(options, SHARED)
    if options.run is not None and is_masked_run(options.run):
        return make_masked_pipeline(options, device, None)
    if isinstance(target, PretrainedMaskedLM):
        return make_masked_pipeline(options, device, target)
    return make_text_pipeline(options, device, target)


def make_text(options: Options, device: str) -> TextPipeline | MaskedPipeline:
    """Do what `make_pipeline` does, for a file of prompts; ValueError for models of media."""
    pipeline = make_pipeline(options, device)
    if isinstance(pipeline, MediaRun):
        wrong("prompts", "a file of prompts is for text; media are made one --prompt at a time")
    return pipeline


def make_media_run(options: Options, target: PretrainedDenoiser | None) -> MediaRun:
    """Put together what samples media; ValueError for options that are for text."""
    default = Options()
    own = {"run", "target", "prompt", "output", "overwrite", "batch_size", "seed", "device"}
    own |= {"compare", "stats", "media", "dtype", "prompts", "quantize", "quantize_method"}
    for name in sorted(vars(default).keys() - own):
        if getattr(options, name) != getattr(default, name):
            wrong(name, "is for text, and this is a diffusion model of media")
    media = options.media
    how = SamplerOptions(
        num_steps=media.num_steps,
        eta=media.eta,
        guidance=media.guidance,
        sampler=media.sampler,
        tolerance=media.tolerance,
        order=media.order,
        free_draft=media.free_draft,
        window=media.window,
        refinement=media.refinement,
        size=media.size,
        frame_rate=media.frame_rate,
        batch_size=None if options.batch_size == Options.batch_size else options.batch_size,
        devices=media.devices,
        quantize_models=options.quantize,
        quantize_method=options.quantize_method,
    )
    if target is not None:
        return media_of_target(target, how)
    return load_media_run(str(options.run), how, options.device, options.dtype)


def make_masked_pipeline(
    options: Options, device: str, target: PretrainedMaskedLM | None
) -> MaskedPipeline:
    """Put together what fills canvases; ValueError for options that are for causal text."""
    for name in ("lookup", "chat"):
        if getattr(options, name):
            wrong(name, "is for causal text, and this is a masked diffusion model")
    canvas = options.canvas
    if target is not None and canvas.windows != CanvasOptions.windows:
        wrong("canvas.windows", "is for a run with a self-speculative head")
    how: dict[str, Any] = {
        "sampler": options.sampler,
        "nested_steps": canvas.nested_steps,
        "verifier": options.verifier,
        "lengths": options.draft_length,
        "copies": canvas.copies,
        "max_target_calls": canvas.max_target_calls,
        "sure": canvas.sure,
        "batch_size": options.batch_size,
        "compile": options.compile,
        "device": device,
        "quantize_models": options.quantize,
        "quantize_method": options.quantize_method,
    }
    if target is not None:
        return build_masked_pipeline(target, options.drafter, **how)
    assert options.run is not None
    attention = options.attn_implementation or "sdpa"
    return load_masked_run(
        options.run,
        windows=canvas.windows,
        dtype=run_dtype(options),
        attn_implementation=attention,
        **how,
    )


def make_text_pipeline(options: Options, device: str, target: nn.Module | None) -> TextPipeline:
    """Put together what decodes causal text; ValueError for options that are for canvases."""
    if options.canvas != CanvasOptions():
        wrong("canvas", "is for masked diffusion models, and this is causal text")
    if isinstance(options.verifier, CanvasVerifier):
        wrong("verifier", f"{type(options.verifier).__name__} judges canvases, not causal text")
    how: dict[str, Any] = {
        "sampling": options.sampling,
        "limits": options.limits,
        "verifier": options.verifier,
        "lengths": options.draft_length,
        "lookup": options.lookup,
        "batch_size": options.batch_size,
        "compile": options.compile,
        "chat": options.chat,
        "device": device,
        "quantize_models": options.quantize,
        "quantize_method": options.quantize_method,
    }
    if target is not None:
        return build_pipeline(target, options.drafter, **how)
    assert options.run is not None, "parse_options asks for a run or a target"
    attention = options.attn_implementation or "sdpa"
    return load_run(options.run, dtype=run_dtype(options), attn_implementation=attention, **how)


def run_dtype(options: Options) -> str:
    """Return the dtype of a run's models, which for several GPUs are loaded on the CPU."""
    dtype = options.dtype or "auto"
    return "bfloat16" if dtype == "auto" and find_device(options.device) != "cpu" else dtype


def _show_slow_loading_only() -> None:
    """Let the progress bars of `transformers` appear after two seconds instead of at once."""
    from transformers.utils import logging

    logging.set_tqdm_hook(lambda bar, places, names: bar(*places, **{"delay": 2.0, **names}))
