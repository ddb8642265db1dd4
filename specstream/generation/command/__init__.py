"""What `generate.py` does: read the options, build the pipeline, decode, report.

Reading order: `options` (what can be said), `one_prompt` (text as it is committed), `display` and
`comparison` (what it shows), `many_prompts` (a file of them), `devices` (over several).  None of
it knows how decoding works.
"""

from __future__ import annotations

from specstream.generation.base import TextPipeline
from specstream.generation.command.options import Options, parse_options
from specstream.generation.loading import build_pipeline, find_device, load_run


def run_generation(arguments: list[str]) -> int:
    """Generate as the arguments say; returns the exit code.  ValueError for a user's mistake."""
    import torch

    options = parse_options(arguments)
    _show_slow_loading_only()
    try:
        return _generate(options)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU is out of memory; lower --batch_size or --max_new_tokens, or --quantize both"
        ) from error


def _generate(options: Options) -> int:
    if options.prompts is not None:
        from specstream.generation.command.many_prompts import generate_many

        return generate_many(
            options, options.devices, lambda device: make_pipeline(options, device)
        )
    from specstream.generation.command.one_prompt import generate_one

    return generate_one(make_pipeline(options, options.device), options)


def make_pipeline(options: Options, device: str) -> TextPipeline:
    """Load and put together what the options name, on `device`."""
    if options.run is not None:
        return load_run(
            options.run,
            sampling=options.sampling,
            limits=options.limits,
            verifier=options.verifier,
            lengths=options.draft_length,
            lookup=options.lookup,
            batch_size=options.batch_size,
            compile=options.compile,
            chat=options.chat,
            dtype=run_dtype(options),
            device=device,
            attn_implementation=options.attn_implementation or "sdpa",
            quantize_models=options.quantize,
        )
    assert options.target is not None, "parse_options asks for a run or a target"
    return build_pipeline(
        options.target(),
        options.drafter,
        sampling=options.sampling,
        limits=options.limits,
        verifier=options.verifier,
        lengths=options.draft_length,
        lookup=options.lookup,
        batch_size=options.batch_size,
        compile=options.compile,
        chat=options.chat,
        device=device,
        quantize_models=options.quantize,
    )


def run_dtype(options: Options) -> str:
    """Return the dtype of a run's models, which for several GPUs are loaded on the CPU."""
    dtype = options.dtype or "auto"
    return "bfloat16" if dtype == "auto" and find_device(options.device) != "cpu" else dtype


def _show_slow_loading_only() -> None:
    """Let the progress bars of `transformers` appear after two seconds instead of at once."""
    from transformers.utils import logging

    logging.set_tqdm_hook(lambda bar, places, names: bar(*places, **{"delay": 2.0, **names}))
