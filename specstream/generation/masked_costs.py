"""What passes over canvases cost on this machine, for the cost model that text uses too.

Drafted are denoising steps.  Of nested steps each makes the target's pass one canvas larger; beside
a drafter a step costs the drafter's time, and the pass that scores the draft is always the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specstream.drafters.base import CanvasDrafter
from specstream.generation.costs import fastest, key_of, stored
from specstream.generation.lengths import DraftLength, StepCosts
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.sampling import Noise, Sampling
from specstream.structures import Canvas

WIDTH_STEP = 32  # positions; canvases are measured at widths rounded up to it


def nested_costs(
    target: PretrainedMaskedLM, lengths: DraftLength, rows: int, width: int
) -> StepCosts:
    """Return the stored table of passes over 1 + k canvases for each of `rows`."""
    width = _rounded(target, width)

    @torch.inference_mode()
    def measure() -> StepCosts:
        canvases = [_canvas(target, rows * (1 + k), width) for k in (0, *lengths.choices)]
        plain, *verify = fastest([lambda c=c: target(c.tokens, c.lengths) for c in canvases])
        return _table(plain, lengths, verify, [0.0] * len(verify))

    key = key_of(target.device, "nested", *_network(target), lengths.choices, rows, width)
    return stored(key, lengths.max_tokens + 1, measure)


def drafted_costs(
    target: PretrainedMaskedLM,
    drafter: CanvasDrafter,
    lengths: DraftLength,
    copies: int,
    rows: int,
    width: int,
) -> StepCosts:
    """Return the stored table of drafting k steps and of scoring a draft on `copies` canvases."""
    width = _rounded(target, width)

    @torch.inference_mode()
    def measure() -> StepCosts:
        noise = Noise(0, target.device)
        canvas = _canvas(target, rows, width)
        scored = _canvas(target, rows * copies, width)
        cache = drafter.new_cache(rows, width)
        passes = [
            lambda: target(canvas.tokens, canvas.lengths),
            lambda: target(scored.tokens, scored.lengths),
        ]
        for k in lengths.choices:
            passes.append(
                lambda n=k: drafter.propose(canvas, cache, [n] * rows, Sampling(0.0), noise).tokens
            )
        plain, verify, *draft = fastest(passes)
        return _table(plain, lengths, [verify] * len(draft), draft)

    sizes = (sum(p.numel() for p in drafter.parameters()), str(drafter), copies)
    key = key_of(target.device, "dual", *_network(target), *sizes, lengths.choices, rows, width)
    return stored(key, lengths.max_tokens + 1, measure)


def _rounded(target: PretrainedMaskedLM, width: int) -> int:
    width = -(-width // WIDTH_STEP) * WIDTH_STEP
    return width if target.max_positions is None else min(width, target.max_positions)


def _network(target: PretrainedMaskedLM) -> tuple[object, ...]:
    parameters = sum(p.numel() for p in target.parameters())
    return target.path, parameters, target.dtype, target.config._attn_implementation


def _canvas(target: PretrainedMaskedLM, rows: int, width: int) -> Canvas:
    """Return canvases that are all masks."""
    tokens = torch.full((rows, width), target.mask_id, device=target.device)
    numbers: Tensor = torch.arange(rows, device=target.device)
    lengths = torch.full_like(numbers, width)
    return Canvas(
        tokens, torch.ones_like(tokens).bool(), lengths, numbers, torch.zeros_like(numbers)
    )


def _table(
    plain: float, lengths: DraftLength, verify: Sequence[float], draft: Sequence[float]
) -> StepCosts:
    """Put what was measured for the lengths that may be chosen where they are looked for."""
    verifying = [plain] * (lengths.max_tokens + 1)
    drafting = [0.0] * (lengths.max_tokens + 1)
    for k, spent, made in zip(lengths.choices, verify, draft, strict=True):
        verifying[k], drafting[k] = spent, made
    return StepCosts(plain, tuple(verifying), tuple(drafting))
