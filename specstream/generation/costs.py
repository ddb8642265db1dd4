"""Measure what the passes of a pair of models cost on this machine, once, and keep the table."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specstream.files import write_whole
from specstream.generation.batch import Batch
from specstream.generation.lengths import DraftLength, StepCosts
from specstream.generation.target_pass import observation, pad_draft
from specstream.sampling import Noise
from specstream.structures import Stats

if TYPE_CHECKING:
    from specstream.generation.speculative import SpeculativePipeline

CONTEXT = 64  # committed tokens a row while measuring
WARMUPS = 2
FEWEST_TURNS = 3  # timed runs of each pass, at least
MOST_TURNS = 30  # and at most
SECONDS = 2.0  # after which no further turn is begun


def stored_costs(pipeline: SpeculativePipeline, folder: Path | None = None) -> StepCosts:
    """Return the pair's table from the user's cache folder, measured now if it is not there."""
    size = pipeline.lengths.max_tokens + 1
    return stored(_key(pipeline), size, lambda: measure_costs(pipeline), folder)


def stored(
    key: str, size: int, measure: Callable[[], StepCosts], folder: Path | None = None
) -> StepCosts:
    """Return the table of `key`, which has `size` entries, from the cache folder, or measure it."""
    if folder is None:
        from platformdirs import user_cache_path

        folder = user_cache_path("specstream") / "costs"
    path = folder / f"{key}.json"
    try:
        found = json.loads(path.read_text())
        costs = StepCosts(found["plain"], tuple(found["verify"]), tuple(found["draft"]))
        seconds = [costs.round_seconds(k) for k in range(size)]
        if len(costs.verify) == len(costs.draft) == size and 0 < min(seconds) < math.inf:
            return costs
    except (OSError, ValueError, LookupError, TypeError):
        pass  # absent or damaged: measured again and replaced
    costs = measure()
    _write(path, costs)
    return costs


@torch.inference_mode()
def measure_costs(pipeline: SpeculativePipeline) -> StepCosts:
    """Time plain passes, and verifying and drafting of each length the pipeline may choose."""
    lengths = [CONTEXT] * pipeline.batch_size
    top = pipeline.lengths.max_tokens
    batch = Batch(
        [[t % pipeline.target.vocab_size for t in range(n)] for n in lengths],
        range(pipeline.batch_size),
        2 * CONTEXT + 2 * pipeline.headroom,
        pipeline.limits,
        pipeline.processor,
        Stats("text", pipeline.guarantee),
        pipeline.target.device,
        pipeline.target.vocab_size if pipeline.sampling.needs_history else None,
        pipeline.compiled,
    )
    context, noise = batch.context, Noise(0, pipeline.target.device)
    capacity = context.tokens.shape[1]
    cache = pipeline.target.new_cache(pipeline.batch_size, capacity)
    state = pipeline.drafter.new_cache(pipeline.batch_size, capacity)
    nothing = pipeline.draft(context, state, [0] * len(lengths), noise)
    # A drafter that lives on what target passes show is shown one.
    shown = pipeline.verify(context, cache, nothing, noise, riding=True)
    pipeline.drafter.observe(
        observation(shown, [0] * len(lengths), torch.full_like(context.lengths, top)), state
    )
    passes: list[Callable[[], object]] = [lambda: pipeline.verify(context, cache, nothing, noise)]
    for k in pipeline.lengths.choices:
        wanted = [k] * len(lengths)
        # A drafter that finds nothing drafts nothing, but what it finds later is verified.
        made = pad_draft(pipeline.draft(context, state, wanted, noise), k)
        passes.append(lambda d=made: pipeline.verify(context, cache, d, noise, riding=True))
        passes.append(lambda w=wanted: pipeline.draft(context, state, w, noise))
    plain, *others = fastest(passes)
    return cost_table(plain, pipeline.lengths, others[::2], others[1::2])


def cost_table(
    plain: float, lengths: DraftLength, verify: Sequence[float], draft: Sequence[float]
) -> StepCosts:
    """Put what was measured for the lengths that may be chosen where they are looked for."""
    verifying = [plain] * (lengths.max_tokens + 1)
    drafting = [0.0] * (lengths.max_tokens + 1)
    for k, spent, made in zip(lengths.choices, verify, draft, strict=True):
        verifying[k], drafting[k] = spent, made
    return StepCosts(plain, tuple(verifying), tuple(drafting))


def fastest(passes: Sequence[Callable[[], object]]) -> list[float]:
    """Return the least seconds of each pass over several turns through all of them.

    Other programs only ever add time, and taking turns spreads what they add over all passes: the
    least is the steadiest estimate of what a pass costs, and a table outlives the moment.  Where a
    turn takes longer than all of them are to take, as one of a large model does, it is the last.
    """
    began = time.perf_counter()
    for _ in range(WARMUPS):
        for run in passes:
            run()
        if time.perf_counter() - began > SECONDS:
            break
    least = [math.inf] * len(passes)
    started = time.perf_counter()
    for turn in range(MOST_TURNS):
        for i, run in enumerate(passes):
            _synchronize()
            before = time.perf_counter()
            run()
            _synchronize()
            least[i] = min(least[i], time.perf_counter() - before)
        spent = time.perf_counter() - started
        if spent > SECONDS and (turn == 0 or turn + 1 >= FEWEST_TURNS):
            break
    return least


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _key(pipeline: SpeculativePipeline) -> str:
    """Identify what the times depend on: both models, how they run, and the machine."""
    target, drafter = pipeline.target, pipeline.drafter
    return key_of(
        target.device,
        target.path,
        *(sum(p.numel() for p in model.parameters()) for model in (target, drafter)),
        str(drafter),
        type(pipeline.verifier).__name__,
        target.dtype,
        sorted({str(p.dtype) for p in drafter.parameters()}),
        target.config._attn_implementation,
        pipeline.sampling,  # top-p sorts, a penalty keeps history
        pipeline.stats.quantized,
        pipeline.batch_size,
        pipeline.compiled,
        pipeline.lengths.choices,
    )


def key_of(device: torch.device, *parts: object) -> str:
    """Return a name for `parts` and the machine that they run on."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    machine_parts = (torch.__version__, machine, os.cpu_count(), torch.get_num_threads())
    return hashlib.sha256(repr((*parts, machine_parts)).encode()).hexdigest()[:24]


def _write(path: Path, costs: StepCosts) -> None:
    """Write the table whole or not at all; a folder that cannot be written costs a measurement."""
    try:
        write_whole(path, json.dumps(asdict(costs)))
    except OSError:
        return
